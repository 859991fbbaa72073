"""sd_notify(3): ready, status, stopping, and a watchdog fed by the event loop."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> None:
    """Sends assignments such as ``READY=1`` to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto("\n".join(lines).encode(), address)
        except OSError:
            return  # a manager that does not listen is no reason to stop


def watchdog_seconds() -> float | None:
    """How often the manager wants to hear from us, halved; None where it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if not text.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6 / 2

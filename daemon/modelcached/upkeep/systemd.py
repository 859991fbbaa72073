"""sd_notify(3): ready, status, stopping, and a watchdog fed by the event loop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from modelcached.cache import Cache
from modelcached.cache.requests import Phase, Transfer
from modelcached.units import format_size

STATUS_SECONDS = 2.0
"""How often the status line is looked at; it is sent when it has changed."""
PATIENCE_SECONDS = 300
"""A start that makes progress asks for so much time again, however little the unit gives (TimeoutStartSec)."""


def managed() -> bool:
    """Whether a service manager listens."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*lines: str) -> None:
    """Sends assignments such as ``READY=1`` to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            # A line is an assignment: what a name or an error brings along must not become one.
            channel.sendto("\n".join(" ".join(line.splitlines()) for line in lines).encode(), address)
        except OSError:
            return  # a manager that does not listen is no reason to stop


def watchdog_seconds() -> float | None:
    """How often the manager wants to hear from us, halved; None where it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if not text.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6 / 2


def recovering(done: int, of: int) -> None:
    """How far the start is, in repositories; and that it is alive, so that a large cache is waited for."""
    notify(f"STATUS=recovering the cache: {done} of {of} repositories", f"EXTEND_TIMEOUT_USEC={PATIENCE_SECONDS}000000")


class StatusTeller:
    """Keeps what `systemctl status` shows at what the daemon does."""

    def __init__(self, cache: Cache, tell: Callable[[str], None] = notify) -> None:
        self._cache = cache
        self._tell = tell
        self._told = ""

    async def look(self) -> None:
        """Once; says nothing where nothing has changed."""
        core = self._cache.core
        text = status_line(
            models=sum(1 for _ in core.index.snapshots()),
            used_bytes=core.space.used_bytes,
            budget_bytes=core.space.limits.budget_bytes,
            transfers=self._cache.transfers(),
            troubles=len(core.degraded) + bool(core.hub_trouble),
        )
        if text != self._told:
            self._tell(f"STATUS={text}")
            self._told = text


def status_line(
    *, models: int, used_bytes: int, budget_bytes: int, transfers: tuple[Transfer, ...], troubles: int
) -> str:
    """One line for people. Of the transfers, the one that somebody waits for and that has most to do comes first."""
    parts = [f"serving {_counted(models, 'model')}, {format_size(used_bytes)} of {format_size(budget_bytes)}"]
    if transfers:
        first, *others = sorted(transfers, key=lambda t: (t.background, -t.progress.bytes_total, str(t.snapshot)))
        more = f" and {len(others)} more" if others else ""
        parts.append(f"{_doing(first)}{more}")
    if troubles:
        parts.append(f"{_counted(troubles, 'trouble')}, see cachectl status")
    return "; ".join(parts)


def _doing(transfer: Transfer) -> str:
    progress = transfer.progress
    text = f"{progress.phase.name.lower()} {transfer.snapshot.repo_id}"
    if progress.phase is Phase.DOWNLOADING and progress.bytes_total:
        # Rounded down: 100 % is said of nothing that is not there.
        text += f", {progress.bytes_done * 100 // progress.bytes_total} % of {format_size(progress.bytes_total)}"
    return text


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

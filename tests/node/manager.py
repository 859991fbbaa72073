"""A service manager's end of sd_notify(3): it knows to the millisecond when a daemon is ready."""

from __future__ import annotations

import secrets
import socket
import time
from types import TracebackType
from typing import Self

from tests.node.daemon import START_SECONDS, Node


class Manager:
    """Give its ``environment`` to a node before it starts."""

    def __init__(self) -> None:
        name = f"modelcached-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{name}")
        self.environment = {"NOTIFY_SOCKET": f"@{name}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def hears(self, text: str, within_seconds: float = START_SECONDS) -> list[str]:
        """Everything that is said until a line begins so, and with it. TimeoutError where none does."""
        heard: list[str] = []
        deadline = time.monotonic() + within_seconds
        while not any(line.startswith(text) for line in heard):
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            heard += self._socket.recv(4096).decode().split("\n")
        return heard

    def start(self, node: Node, within_seconds: float = START_SECONDS) -> float:
        """Starts the daemon; seconds from its process to READY=1. TimeoutError where it is not ready in time."""
        node.environment |= self.environment
        began = time.perf_counter()
        node.start(wait=False)
        while True:
            self._socket.settimeout(max(0.001, began + within_seconds - time.perf_counter()))
            if b"READY=1" in self._socket.recv(4096).split(b"\n"):
                return time.perf_counter() - began

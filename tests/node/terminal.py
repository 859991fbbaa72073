"""A terminal for a program of ours, and what is drawn on it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from types import TracebackType
from typing import Self

from tests.node.daemon import BIN, Node


class Terminal:
    """cachectl on a terminal of its own; killed at the end of the block, if it still runs."""

    def __init__(self, node: Node, *arguments: str, columns: int = 80) -> None:
        self._ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environ = {**node.client_environment, "TERM": "xterm-256color"}
        command = [str(BIN / "cachectl"), *arguments]
        self.process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environ)
        os.close(its)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def until(self, text: str, seconds: float = 15) -> None:
        """Reads on until it is drawn."""
        seen, deadline = "", time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < deadline, f"not drawn: {text}\n{seen}"
            if select.select([self._ours], [], [], 0.2)[0]:
                seen += self._read().decode()

    def to_the_end(self) -> str:
        """All that is still drawn, escapes and all, until it has ended."""
        shown = bytearray()
        while piece := self._read():
            shown += piece
        return shown.decode()

    def _read(self) -> bytes:
        try:
            return os.read(self._ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return b""

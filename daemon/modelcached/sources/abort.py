"""Ending a fetch from another thread: nobody wants it any more, or next to nothing comes."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelcached.sources.tcp import bytes_received

FLOOR_BYTES_PER_SECOND = 4 << 10
"""Below this, over a whole stall timeout, a connection is stalled: a byte a second is never silence, and would hold
its range for months. 64 connections of such a rate make 2 Mbit/s, so no link that a model can come over is that slow;
were one, a range would go on where it is over a new connection every stall timeout, and lose nothing."""


class AbortedError(Exception):
    """The fetch was ended by its own side."""


class Abort:
    """Ends a running fetch from another thread: sets a mark and wakes the socket."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self.stalled = False
        """The fetch was ended because too little came; another may be begun."""

    @property
    def is_set(self) -> bool:
        """The fetch is to end."""
        return self._set.is_set()

    def wait(self, seconds: float) -> bool:
        """A pause that ends with the fetch; whether it has ended."""
        return self._set.wait(seconds)

    def attach(self, connected: socket.socket | None) -> None:
        """The socket that the fetch now waits on."""
        with self._lock:
            self._socket = connected
        if self._set.is_set():
            self.set()

    def set(self) -> None:
        """Ends the fetch."""
        self._set.set()
        with self._lock:
            self._shut_down()

    def stall(self) -> None:
        """Ends the wait for what the socket has to bring."""
        with self._lock:
            self.stalled = True
            self._shut_down()

    def received(self) -> tuple[socket.socket, int, bool] | None:
        """The socket, the bytes that it has received so far, and whether some of them wait for us; None without."""
        with self._lock:
            if self._socket is None:
                return None
            unread = bytearray(4)
            try:
                fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, unread)
                return self._socket, bytes_received(self._socket), struct.unpack("i", unread)[0] > 0
            except (OSError, ValueError):  # it is being closed
                return None

    def _shut_down(self) -> None:
        if self._socket is None:
            return
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


@dataclass(slots=True)
class _Window:
    """A time in which we waited for the peer."""

    over: socket.socket
    since: float
    received: int


class StallWatch:
    """Ends fetches whose peer sends less than the floor. ``look`` is to be called about once a second. Thread-safe.

    What counts is what the kernel has received, so that headers and redirects that trickle are seen too, however
    the body is read. Data that nobody has read yet means that we are the slow ones (transfer.rate_limit, the disk).
    """

    def __init__(self, stall_timeout_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._timeout = stall_timeout_seconds
        self._now = now
        self._windows: dict[Abort, _Window | None] = {}
        self._lock = threading.Lock()

    @contextmanager
    def over(self, abort: Abort) -> Iterator[None]:
        """Watches the fetch that ``abort`` ends."""
        with self._lock:
            self._windows[abort] = None
        try:
            yield
        finally:
            with self._lock:
                del self._windows[abort]

    def look(self) -> None:
        """Once at all that is watched."""
        now = self._now()
        with self._lock:
            for abort, window in self._windows.items():
                seen = abort.received()
                if seen is None or seen[2]:
                    self._windows[abort] = None
                elif window is None or window.over is not seen[0]:
                    self._windows[abort] = _Window(seen[0], now, seen[1])
                elif (seconds := now - window.since) >= self._timeout:
                    if seen[1] - window.received < seconds * FLOOR_BYTES_PER_SECOND:
                        abort.stall()
                    self._windows[abort] = _Window(seen[0], now, seen[1])

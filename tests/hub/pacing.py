"""How fast bodies flow and when they start: one rate for the whole Hub, and gates for the first byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from fnmatch import fnmatchcase

UNLIMITED_STEP_BYTES = 1024 * 1024
_SMALLEST_STEP_BYTES = 256
_LARGEST_STEP_BYTES = 64 * 1024
_STEPS_PER_SECOND = 100
_DISCONNECT_POLL_SECONDS = 0.1


class Rate:
    """A token bucket shared by all connections: bytes per second, None for no limit. Settable at any time.

    A step is a hundredth of a second's worth, so "in the middle of a file" exists even for small files;
    the bucket holds two steps, so a pause is not made up for by a burst.
    """

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._rate: float | None = None
        self._tokens = 0.0
        self._filled_at = time.monotonic()
        self._stopped = False
        self.set(bytes_per_second)

    @property
    def bytes_per_second(self) -> float | None:
        return self._rate

    def set(self, bytes_per_second: float | None) -> None:
        """Raises ValueError unless positive: to send nothing at all, close the gate."""
        if bytes_per_second is not None and bytes_per_second <= 0:
            raise ValueError(f"a rate must be positive, not {bytes_per_second}")
        with self._changed:
            self._rate = bytes_per_second
            self._tokens = 0.0
            self._filled_at = time.monotonic()
            self._changed.notify_all()

    def stop(self) -> None:
        """Let everybody through, once and for all: the Hub ends."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def step_bytes(self) -> int:
        """How much to take at once under the present rate."""
        rate = self._rate
        if rate is None:
            return UNLIMITED_STEP_BYTES
        return int(min(max(rate / _STEPS_PER_SECOND, _SMALLEST_STEP_BYTES), _LARGEST_STEP_BYTES))

    def take(self, byte_count: int) -> None:
        """Wait until that many bytes may be sent. One connection at a time waits on the bucket itself."""
        if self._rate is None:
            return
        with self._turn, self._changed:
            while self._rate is not None and not self._stopped:
                now = time.monotonic()
                room = max(2 * self.step_bytes, byte_count)
                self._tokens = min(room, self._tokens + (now - self._filled_at) * self._rate)
                self._filled_at = now
                if self._tokens >= byte_count:
                    self._tokens -= byte_count
                    return
                self._changed.wait((byte_count - self._tokens) / self._rate)


class Gate:
    """While closed, bodies of the files it matches wait before their first byte. Opens when the Hub stops."""

    def __init__(self, pattern: str = "*", *, closed: bool = False) -> None:
        self._changed = threading.Condition()
        self._pattern: str | None = pattern if closed else None
        self._waiting = 0
        self._stopped = False

    def close(self, pattern: str = "*") -> None:
        """Hold bodies of files whose path matches the glob."""
        with self._changed:
            self._pattern = pattern
            self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._pattern = None
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many bodies are held at this moment."""
        return self._waiting

    def wait_for_waiting(self, count: int, timeout: timedelta = timedelta(seconds=30)) -> bool:
        """Wait until at least `count` bodies are held."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting >= count, timeout.total_seconds())

    def pass_through(self, path: str, client_is_gone: Callable[[], bool]) -> None:
        """Return once the body may start, or its client has gone."""
        with self._changed:
            if not self._holds(path):
                return
            self._waiting += 1
            self._changed.notify_all()
            try:
                while self._holds(path) and not client_is_gone():
                    self._changed.wait(_DISCONNECT_POLL_SECONDS)
            finally:
                self._waiting -= 1
                self._changed.notify_all()

    def _holds(self, path: str) -> bool:
        return not self._stopped and self._pattern is not None and fnmatchcase(path, self._pattern)

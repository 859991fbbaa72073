"""What all flights of the node share: the rate limit, and upstream's wish to be left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

_LOOK_SECONDS = 0.25
"""How soon a thread that waits sees another rate."""


class RateLimiter:
    """Bytes a second over all mover threads; 0 is no limit. Thread-safe, changeable while running.

    What is taken is paid for afterwards, by whoever takes next, and nothing is saved up: one piece is the most
    that ever goes beyond the rate. What is owed is kept in bytes, so that it is paid at the rate in force
    now, not at the one in force when it was taken.
    """

    def __init__(self, bytes_per_second: int) -> None:
        self._lock = threading.Lock()
        self._rate = bytes_per_second
        self._taken = self._paid = 0.0
        self._paid_at = time.monotonic()

    @property
    def bytes_per_second(self) -> int:
        """May be set at any time."""
        return self._rate

    @bytes_per_second.setter
    def bytes_per_second(self, rate: int) -> None:
        with self._lock:
            self._pay()
            self._rate = rate

    def take(self, size_bytes: int, sleep: Callable[[float], object] = time.sleep) -> None:
        """Waits until what was taken before is paid for, or ``sleep`` says that the wait was ended."""
        with self._lock:
            self._pay()
            before = self._taken
            self._taken += size_bytes
        while (seconds := self._seconds_until(before)) > 0:
            if sleep(min(seconds, _LOOK_SECONDS)):
                return

    def _seconds_until(self, paid: float) -> float:
        with self._lock:
            self._pay()
            return (paid - self._paid) / self._rate if self._rate > 0 else 0.0

    def _pay(self) -> None:
        now = time.monotonic()
        if self._rate > 0:
            self._paid = min(self._taken, self._paid + (now - self._paid_at) * self._rate)
        else:
            self._paid = self._taken
        self._paid_at = now


class Cooldown:
    """One 429 slows everybody, once. The event loop's alone."""

    def __init__(self) -> None:
        self._until = 0.0

    def extend(self, delay: timedelta) -> None:
        """Nobody asks upstream before the delay is over."""
        self._until = max(self._until, time.monotonic() + delay.total_seconds())

    @property
    def seconds_left(self) -> float:
        """0 when upstream may be asked."""
        return max(0.0, self._until - time.monotonic())

"""What all flights of the node share: the rate limit, and upstream's wish to be left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta


class RateLimiter:
    """Bytes a second over all mover threads; 0 is no limit. Thread-safe, changeable while running."""

    def __init__(self, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0  # when what was taken so far will have been paid for

    def take(self, size_bytes: int, sleep: Callable[[float], object] = time.sleep) -> None:
        """Waits until the bytes may be received, or ``sleep`` was ended."""
        rate = self.bytes_per_second
        if rate <= 0:
            return
        with self._lock:
            now = time.monotonic()
            wait = self._free_at - now
            self._free_at = max(now, self._free_at) + size_bytes / rate
        if wait > 0:
            sleep(wait)


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

"""How fast space is given back that nobody waits for: the filesystem is others' too.

Unlinking 140 GB at once keeps a filesystem's journal, and an SSD that is told of it (discard), busy for half a
minute; whoever syncs something meanwhile waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator


class Pacer:
    """Pauses between the files of evictions in the background. The event loop's alone."""

    def __init__(self, bytes_per_second: Callable[[], int]) -> None:
        """``bytes_per_second``: what is in force; 0 is no limit."""
        self._bytes_per_second = bytes_per_second
        self._paid_at = 0.0
        self._waiters = 0
        self._urgent = False
        self._hurry = asyncio.Event()

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """Somebody waits for what is being removed: no pauses within it, and those under way end."""
        self._waiters += 1
        self._tell()
        try:
            yield
        finally:
            self._waiters -= 1
            self._tell()

    @property
    def hurries(self) -> bool:
        """Nothing pauses now."""
        return self._hurry.is_set()

    @property
    def step_bytes(self) -> int | None:
        """How much goes between two pauses, a file at the least: ten pauses a second. None where there is no limit."""
        rate = self._bytes_per_second()
        return rate // 10 if rate else None

    def set_urgent(self, urgent: bool) -> None:
        """Whether the filesystem itself is short of space."""
        self._urgent = urgent
        self._tell()

    def _tell(self) -> None:
        if self._waiters or self._urgent:
            self._hurry.set()
        else:
            self._hurry.clear()

    async def pause(self, freed_bytes: int) -> None:
        """After a step: until what all have freed is within the rate, or somebody waits."""
        rate, now = self._bytes_per_second(), time.monotonic()
        self._paid_at = max(self._paid_at, now) + (freed_bytes / rate if rate else 0.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._paid_at - now):
                await self._hurry.wait()
            self._paid_at = 0.0

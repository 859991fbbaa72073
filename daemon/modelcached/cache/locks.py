"""A lock for each thing that only one at a time may do something to, for as long as somebody wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0


class Locks(Generic[K]):
    """First come, first served for each key. The event loop's alone."""

    def __init__(self) -> None:
        self._entries: dict[K, _Entry] = {}

    def is_held(self, key: K) -> bool:
        """Somebody holds it now."""
        return key in self._entries and self._entries[key].lock.locked()

    @asynccontextmanager
    async def __call__(self, key: K) -> AsyncIterator[None]:
        """Waits until nobody else holds the key, and holds it."""
        entry = self._entries.setdefault(key, _Entry())
        entry.wanted += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.wanted -= 1
            if not entry.wanted:
                del self._entries[key]

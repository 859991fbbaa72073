"""Reading cached models ahead into the page cache, so that the load that follows a hit does not wait for the disk.

In the background, one model at a time, at ``cache.prewarm_rate`` at most, and only if memory allows: what would
push other pages out, or what the daemon's own memory limit has no room for, is not begun.

It protects nothing: no hold, no lease, no open file between two steps. What is evicted meanwhile is not read on.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterable

import structlog

from modelcached.config import CacheSection
from modelcached.model import SnapshotId
from modelcached.pools import Pools
from modelcached.store import pagecache

log = structlog.get_logger()

STEP_BYTES = 8 << 20
"""Between two of these it looks at the memory and at the rate, and can be ended."""
_BUFFER_BYTES = 1 << 20
_MOST_SHARE = 0.9
"""Of the memory that is available: a model that takes all of it is followed by a program that wants some, too."""


class Prewarmer:
    """The event loop's alone."""

    def __init__(self, pools: Pools, settings: Callable[[], CacheSection], available_bytes: Callable[[], int]) -> None:
        """``settings`` are those in force at the moment; ``available_bytes`` is called in a disk thread."""
        self._pools = pools
        self._settings = settings
        self._available_bytes = available_bytes
        self._line: dict[SnapshotId, dict[str, None]] = {}
        """The files that wait, in order; no longer than what is cached, whatever is asked for how often."""
        self._reading: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    def ask(self, snapshot: SnapshotId, paths: Iterable[str]) -> None:
        """The files, in the order in which they are wanted. Returns at once; what is asked for twice is read once.

        Nothing is begun any more when the daemon stops.
        """
        wanted = dict.fromkeys(paths)
        if self._pools.stopping.is_set() or wanted.keys() <= self._reading.keys():
            return
        self._line.setdefault(snapshot, {}).update(wanted)
        if self._task is None:  # it works for all who ask: no single request's id belongs in its log lines
            self._task = asyncio.create_task(self._work(), name="prewarm", context=contextvars.Context())

    async def stop(self) -> None:
        """Ends it; what has been read stays where it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._line:
                snapshot = next(iter(self._line))
                self._reading = self._line.pop(snapshot)
                try:
                    await self._warm(snapshot)
                except OSError as error:  # evicted meanwhile, or a disk that fails: the load will tell
                    log.info("prewarming ended early", model=str(snapshot), why=str(error))
        finally:
            self._reading, self._task = {}, None

    async def _warm(self, snapshot: SnapshotId) -> None:
        began, read, why = time.monotonic(), 0, ""
        looked = {path: await self._pools.on_disk(pagecache.size_and_cold_bytes, path) for path in self._reading}
        total, wanted = (sum(sizes) for sizes in zip(*looked.values(), strict=True))
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        steps = (
            (path, start, min(start + STEP_BYTES, size))
            for path, (size, cold) in looked.items()
            for start in range(0, size if cold else 0, STEP_BYTES)
        )
        for path, start, end in steps:
            if why := await self._pools.on_disk(self._refusal, wanted - read):
                break
            read += await self._step(path, start, end, buffer)
        log.log(
            logging.INFO if wanted else logging.DEBUG,
            "prewarmed" if not why else "not prewarmed",
            model=str(snapshot),
            read_bytes=read,
            resident_bytes=total - wanted,
            total_bytes=total,
            seconds=round(time.monotonic() - began, 3),
            **({"why": why} if why else {}),
        )

    async def _step(self, path: str, start: int, end: int, buffer: memoryview) -> int:
        began = time.monotonic()
        read = await self._pools.on_disk(pagecache.warm, path, start, end, buffer)
        rate = self._settings().prewarm_rate
        if read and rate:
            await asyncio.sleep(read / rate - (time.monotonic() - began))
        return read

    def _refusal(self, wanted_bytes: int) -> str:
        """Why no more may be read; empty when it may."""
        available = self._available_bytes()
        if wanted_bytes <= available * _MOST_SHARE:
            return ""
        return f"{wanted_bytes} bytes are not in the page cache, and {available} bytes of memory are available"

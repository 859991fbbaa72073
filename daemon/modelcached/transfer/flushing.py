"""Taking what is written to the disk while more of it comes."""

from __future__ import annotations

import asyncio
import time

import structlog

from modelcached.pools import Pools
from modelcached.store.disk import means_full
from modelcached.store.partials import Partial
from modelcached.transfer.flight import Flight

log = structlog.get_logger()

HASH_AHEAD_BYTES = 8 << 20
_CHECKPOINT_BYTES = 256 << 20
_CHECKPOINT_SECONDS = 10.0


class Flushing:
    """Takes a flight's data to the disk while it comes, so that the last fsync finds little to do.

    Beside hashing and never two at once: what was hashed is given to the disk, and now and then a checkpoint waits
    for it, so that a power loss costs that much at most.
    """

    def __init__(self, pools: Pools, partial: Partial, reached_bytes: int) -> None:
        self._pools = pools
        self._partial = partial
        self._begun = 0
        self._checkpointed = reached_bytes
        self._checkpointed_at = time.monotonic()
        self._running: asyncio.Task[None] | None = None

    def go_on(self, flight: Flight) -> None:
        """Whenever something has moved. Raises OSError when the last flush failed."""
        if self._running is not None:
            if not self._running.done():
                return
            try:
                self._running.result()
            except OSError as error:
                if not means_full(error):
                    raise
                log.info("no room for a checkpoint, going on without", digest=flight.digest.hex)
            self._running = None
        fresh = flight.ranges.total - self._checkpointed
        late = time.monotonic() - self._checkpointed_at > _CHECKPOINT_SECONDS
        if fresh >= _CHECKPOINT_BYTES or (fresh and late):
            self._checkpointed, self._checkpointed_at = flight.ranges.total, time.monotonic()
            self._running = asyncio.create_task(self._pools.on_flush(self._partial.sync))
        elif flight.hashed - self._begun >= HASH_AHEAD_BYTES:
            start, self._begun = self._begun, flight.hashed
            self._running = asyncio.create_task(self._pools.on_flush(self._partial.begin_flush, start, self._begun))

    async def ended(self) -> None:
        """Nothing runs any more. A failed fsync condemns the file: it must not be published."""
        if self._running is not None:
            try:
                await self._running
            except OSError as error:
                if not means_full(error):
                    raise

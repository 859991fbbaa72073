"""What a flight does to the cache's beliefs and its account of space, each in the step in which it happens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from modelcached.cache.core import Core
from modelcached.cache.eviction import remove_if_bare
from modelcached.cache.sizes import blob_bytes
from modelcached.events import BytesFetched
from modelcached.ledger.victims import Name
from modelcached.model import repo_folder
from modelcached.store.index import Blob
from modelcached.transfer.flight import Flight


class FlightAccount:
    """The three moments that ``Flights`` tells of. The event loop's alone."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @contextlib.asynccontextmanager
    async def allocating(self, flight: Flight) -> AsyncIterator[None]:
        """A partial gets its blocks: from one step to the next they are used and promised no longer."""
        core = self._core
        async with core.measuring("partial"):
            yield
            held = flight.taken or flight.partial
            if held is None or flight.reservation is None:
                return
            if not held.hard_allocated:
                core.degraded["allocation"] = (
                    "the filesystem below cache.dir cannot allocate ahead: reservations are soft, "
                    "and a transfer may still meet a full disk"
                )
            sizes = await core.pools.on_disk(held.allocated)
            for inode, size in sizes.items() if flight.partial is not None else ():
                core.space.add("partial", inode, size)
            # Counted until the flight has ended, wherever a look at the directories finds them meanwhile.
            core.space.set_area(_area(flight), sizes)
            grows = max(0, blob_bytes(flight.size_bytes) - sum(sizes.values()))  # the journal does
            flight.reservation.spend(flight.reservation.remaining_bytes - grows)
            flight.reservation.spend_inodes()

    def published(self, flight: Flight, status: os.stat_result) -> None:
        """A blob is in its repository: belief, account and counters follow in the same step."""
        core = self._core
        blob = Blob.verified_now(status)
        core.index.add_link(flight.repo_id, flight.digest, blob)
        core.space.add(repo_folder(flight.repo_id), blob.stamp.inode, blob.allocated_bytes)
        if flight.reservation is not None:
            flight.reservation.spend(flight.reservation.remaining_bytes)
        for label, size_bytes in flight.fetched.items():
            core.observe(BytesFetched(label, size_bytes))

    def ended(self, flight: Flight) -> None:
        """Its blocks are where the next look finds them; what it did not need is free again."""
        if flight.reservation is not None:
            flight.reservation.release()
        self._core.space.set_area(_area(flight), {})
        name = Name(flight.repo_id, flight.digest)
        self._core.landing[name] -= 1
        if not self._core.landing[name]:
            del self._core.landing[name]
        if flight.interest <= 0:  # all who asked for it have gone, and their look at what it leaves came too early
            self._core.tidy_up(self._look_behind(flight), f"look behind {flight.digest.hex[:12]}")

    async def _look_behind(self, flight: Flight) -> None:
        await self._core.measure("partial", repo_folder(flight.repo_id))
        await remove_if_bare(self._core, flight.repo_id)


def _area(flight: Flight) -> str:
    return f"flight {flight.digest.hex}"

"""Promising bytes before the first one is fetched (invariant 4): first come, first served, evicting what may go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from modelcached.cache import background, eviction
from modelcached.cache.core import Core
from modelcached.cache.leftovers import drop_leftovers, droppable
from modelcached.cache.shortage import check_ever_fits, modest_refusal, refusal
from modelcached.errors import CacheError
from modelcached.ledger.space import NOTHING, Amount, Reservation

log = structlog.get_logger()


async def admit(
    core: Core,
    whole_bytes: int,
    look: Callable[[], Awaitable[None]],
    need: Callable[[], Amount],
    holder: str,
    modest: Callable[[], bool] = lambda: False,
) -> Reservation:
    """Reserves ``need()``, evicting for it. The caller goes on in the same step of the event loop.

    ``whole_bytes`` is the request's size from nothing: what exceeds the budget by itself is told so at once. ``look``
    may read the disk, ``need`` reckons, in the step in which ``look`` ends; both are asked again after every wait, for
    others may have fetched some of it meanwhile. ``modest``: nobody waits for it now, so that it has no more than free
    room and what nobody needs (background.py).
    Raises CacheError OVER_BUDGET, or NoRoomError, naming need, free, pinned, leased and in flight.
    """
    failed: CacheError | None = None
    async with core.admission:
        while True:
            # Blocks that a flight takes meanwhile would be neither seen as free space nor promised any more.
            async with core.measuring("partial"):
                disk = await core.filesystem()
                await look()
                wanted = need()
                if wanted == NOTHING:
                    return core.space.reserve(wanted, holder)
                modestly = modest()
                room = background.room_on(core, disk) if modestly else core.room_on(disk)
                if room.covers(wanted):
                    return core.space.reserve(wanted, holder)
            shortfall = wanted - room
            check_ever_fits(core, whole_bytes, holder)
            if await drop_leftovers(core, shortfall, expired_only=True):
                continue
            if core.evictions:  # what is going anyway may be enough
                await core.until_evicted(core.evictions.values())
                continue
            victims, freed = eviction.plan(core, shortfall, background.evictable(core) if modestly else None)
            if not freed.covers(shortfall):
                if core.unremovable and failed is None:
                    core.unremovable.clear()  # the disk may take again what it refused to an earlier request
                    continue
                if modestly:
                    raise failed or modest_refusal(core, wanted, disk, freed, holder)
                # Others' progress goes only where that is enough: not for what cannot be had in any way.
                enough = (freed + await droppable(core)).covers(shortfall)
                if enough and await drop_leftovers(core, shortfall - freed, expired_only=False):
                    continue
                raise failed or refusal(core, wanted, disk, freed, holder)
            ends = await core.until_evicted(eviction.condemn(core, [victim.id for victim in victims], "space"))
            failures = [end for end in ends if isinstance(end, CacheError)]
            if failures and len(failures) == len(ends) and _is_the_disks(failures[0]):
                raise failures[0]  # every other victim would only fail as well
            # One that could not be removed is passed over from now on; others may be enough.
            failed = failures[0] if failures else failed


def _is_the_disks(failure: CacheError) -> bool:
    """The disk as a whole takes no changes, not that one model."""
    return failure.metadata.get("errno") in ("EROFS", "EIO", "ENOSPC", "EDQUOT")

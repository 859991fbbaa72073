"""Promising bytes before the first one is fetched (invariant 4): first come, first served, evicting what may go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from modelcached.cache import background, eviction
from modelcached.cache.core import Core
from modelcached.cache.leftovers import drop_leftovers, droppable
from modelcached.errors import CacheError, Reason
from modelcached.ledger.space import NOTHING, Amount, Reservation
from modelcached.model import Digest
from modelcached.store.measure import Filesystem
from modelcached.units import format_size

log = structlog.get_logger()


class NoRoomError(CacheError):
    """NO_SPACE_NOW, by what others use: it may pass."""

    modest = False
    """Said to what nobody waits for; a request might have been given the room."""


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
                    raise failed or _modest_refusal(core, wanted, disk, freed, holder)
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


def check_ever_fits(core: Core, whole_bytes: int, holder: str) -> None:
    """Refuses (OVER_BUDGET) what exceeds the budget by itself; ``whole_bytes`` is its size from nothing."""
    limits = core.space.limits
    most = limits.budget_bytes - limits.set_aside_bytes
    if whole_bytes > most:
        pinned, leased = pinned_and_leased(core)
        raise CacheError(
            Reason.OVER_BUDGET,
            f"{holder} needs {format_size(whole_bytes)}, cache.budget is {format_size(limits.budget_bytes)} "
            f"({format_size(pinned.size_bytes)} pinned, {format_size(leased.size_bytes)} leased)",
            metadata={
                "need_bytes": whole_bytes,
                "budget_bytes": limits.budget_bytes,
                "pinned_bytes": pinned.size_bytes,
                "leased_bytes": leased.size_bytes,
            },
        )


def refusal(core: Core, wanted: Amount, disk: Filesystem, evictable: Amount, holder: str) -> NoRoomError:
    """Why there is no room for it now, and by whom."""
    limits = core.space.limits
    pinned, leased = pinned_and_leased(core)
    in_flight = core.space.reserved_bytes + core.space.area_bytes("partial")
    text = (
        f"{holder} needs {format_size(wanted.size_bytes)} more; of the budget of {format_size(limits.budget_bytes)} "
        f"{format_size(core.space.used_bytes)} are used ({format_size(pinned.size_bytes)} pinned, "
        f"{format_size(leased.size_bytes)} leased, "
        f"{format_size(in_flight)} in flight, {format_size(evictable.size_bytes)} can be evicted); the filesystem has "
        f"{format_size(disk.free_bytes)} free, of which {format_size(limits.min_free_bytes)} are kept (cache.min_free)"
    )
    metadata = {
        "need_bytes": wanted.size_bytes,
        "budget_bytes": limits.budget_bytes,
        "used_bytes": core.space.used_bytes,
        "pinned_bytes": pinned.size_bytes,
        "leased_bytes": leased.size_bytes,
        "in_flight_bytes": in_flight,
        "evictable_bytes": evictable.size_bytes,
        "filesystem_free_bytes": disk.free_bytes,
        "min_free_bytes": limits.min_free_bytes,
    }
    room_inodes = core.space.room_inodes(disk.free_inodes)
    if disk.free_inodes is not None and room_inodes + evictable.inodes < wanted.inodes:
        text += (
            f"; it needs {wanted.inodes} inodes more, and of {disk.inodes} the filesystem has {disk.free_inodes} free, "
            f"of which {limits.min_free_inodes} are kept and {core.space.reserved_inodes} promised; "
            f"{evictable.inodes} can be evicted"
        )
        metadata |= {
            "need_inodes": wanted.inodes,
            "filesystem_free_inodes": disk.free_inodes,
            "min_free_inodes": limits.min_free_inodes,
            "evictable_inodes": evictable.inodes,
        }
    if min_age := core.config.cache.min_age.total_seconds():
        text += f"; what was asked for within the last {min_age:g} s stays (cache.min_age)"
    return NoRoomError(Reason.NO_SPACE_NOW, text, metadata=metadata)


def _modest_refusal(core: Core, wanted: Amount, disk: Filesystem, evictable: Amount, holder: str) -> NoRoomError:
    told = refusal(core, wanted, disk, evictable, holder)
    mend = "raise cache.budget, or list less; what pods have asked for is not evicted for the model list"
    made = NoRoomError(told.reason, told.message, metadata=told.metadata, mend=mend)
    made.modest = True
    return made


@dataclass(frozen=True, slots=True)
class Kept:
    """What is under pins, or under leases."""

    models: int
    size_bytes: int
    """Allocated; each inode once."""


def pinned_and_leased(core: Core) -> tuple[Kept, Kept]:
    """What is under both counts in both."""
    refs, kept = core.refs(), []
    used = [repo for repo_id in core.use.used_repos() if (repo := core.index.repos.get(repo_id)) is not None]
    for covered in (core.use.pins_on, core.use.leased):
        models, inodes = 0, dict[int, int]()
        for repo in used:
            needed = [snapshot.digests for snapshot in repo.snapshots.values() if covered(snapshot.id, refs)]
            blobs = [repo.blobs[digest] for digest in frozenset[Digest]().union(*needed) if digest in repo.blobs]
            inodes |= {blob.stamp.inode: blob.allocated_bytes for blob in blobs}
            models += len(needed)
        kept.append(Kept(models, sum(inodes.values())))
    return kept[0], kept[1]

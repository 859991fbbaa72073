"""Why there is no room, in words: what is wanted, whose limit that meets, and who holds what."""

from __future__ import annotations

from dataclasses import dataclass

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.errors import CacheError, Reason
from modelcached.ledger.space import Amount
from modelcached.model import Digest
from modelcached.store.measure import Filesystem
from modelcached.units import format_size

_NAMED = 3
"""So many of those who hold space are named, the largest first: cachectl shows all."""


class NoRoomError(CacheError):
    """NO_SPACE_NOW, by what others use: it may pass."""

    modest = False
    """Said to what nobody waits for; a request might have been given the room."""


def check_ever_fits(core: Core, whole_bytes: int, holder: str) -> None:
    """Refuses (OVER_BUDGET) what exceeds the budget by itself; ``whole_bytes`` is its size from nothing."""
    limits = core.space.limits
    most = limits.budget_bytes - limits.set_aside_bytes
    if whole_bytes > most:
        pinned, leased = pinned_and_leased(core)
        configured = core.config.cache.budget
        of_disk = "" if configured.share is None else f", {configured} of the filesystem"
        raise CacheError(
            Reason.OVER_BUDGET,
            f"{holder} needs {format_size(whole_bytes)}, cache.budget is {format_size(limits.budget_bytes)}{of_disk} "
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
    of_budget = limits.budget_bytes - limits.set_aside_bytes - core.space.used_bytes - core.space.reserved_bytes
    of_disk = disk.free_bytes - limits.min_free_bytes - core.space.reserved_bytes
    lacking = wanted.size_bytes - evictable.size_bytes
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
    mends = []
    if lacking > of_budget:
        mends.append("stop, release or unpin what is named, wait for it, or raise cache.budget")
    if lacking > of_disk:
        mends.append("the limit is the filesystem: remove what others keep there, or lower cache.min_free")
    if holders := _largest_holders(core):
        text += f"; in use: {holders}"
    if min_age := core.config.cache.min_age.total_seconds():
        text += f"; what was asked for within the last {min_age:g} s stays (cache.min_age)"
    return NoRoomError(Reason.NO_SPACE_NOW, text, metadata=metadata, mend="; ".join(mends))


def _largest_holders(core: Core) -> str:
    """``org/name@commit (16.8 MB, leased by ...), and 4 more``; empty where nothing is held."""
    held = [
        (sum(repo.blobs[digest].allocated_bytes for digest in snapshot.digests if digest in repo.blobs), snapshot, who)
        for repo_id in core.use.used_repos()
        if (repo := core.index.repos.get(repo_id)) is not None
        for snapshot in repo.snapshots.values()
        if (who := [p for p in eviction.protections(core, snapshot) if p.kind != "held"])  # which may be by who asks
    ]
    held.sort(key=lambda item: (-item[0], item[1].id))
    named = [f"{snapshot.id} ({format_size(size)}, {who[0]})" for size, snapshot, who in held[:_NAMED]]
    return ", ".join(named) + (f", and {len(held) - _NAMED} more" if len(held) > _NAMED else "")


def modest_refusal(core: Core, wanted: Amount, disk: Filesystem, evictable: Amount, holder: str) -> NoRoomError:
    """The same for what nobody waits for: it may have less than a request."""
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

"""Promising bytes before the first one is fetched (invariant 4): first come, first served, evicting what may go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from modelcached.cache import background, eviction
from modelcached.cache.core import Core
from modelcached.errors import CacheError, Reason
from modelcached.ledger.space import NOTHING, Amount, Reservation
from modelcached.ledger.victims import Name
from modelcached.model import Digest, FileEntry, RepoId
from modelcached.store.measure import Filesystem
from modelcached.units import format_size

log = structlog.get_logger()

_BLOCK = 4096
_JOURNAL_BYTES_PER_STEP = 64  # a line for each 2 MiB step, and checkpoints
_STEP = 2 << 20
_OWN_FILES = 16
"""The repository's own directories, its refs and listing, the record, and each of those that is being replaced."""
INODES_OF_FLIGHT = 2
"""The blob and its journal."""
QUARANTINE_SECONDS = 7 * 86400
"""How long a bad blob is kept for whoever wants to look; less when its space is wanted."""
_ABANDONED_SECONDS = 3600.0
"""Nothing is being built or removed for so long: the disk once refused to let it go."""


def blob_bytes(size_bytes: int) -> int:
    """What a blob takes on disk while it is fetched: whole blocks, and its journal's."""
    journal = _BLOCK + size_bytes // _STEP * _JOURNAL_BYTES_PER_STEP
    return -(-size_bytes // _BLOCK) * _BLOCK + -(-journal // _BLOCK) * _BLOCK


def overhead(files: int, folders: int) -> Amount:
    """Links, directories, the record: a block and an inode each, and some for their directories' growth."""
    return Amount((files + folders) * _BLOCK + files * 1024 + _OWN_FILES * _BLOCK, files + folders + _OWN_FILES)


def selection_bytes(entries: list[FileEntry]) -> int:
    """What a selection takes on disk from nothing."""
    folders = {entry.path.rpartition("/")[0] for entry in entries}
    unique = {entry.digest: entry.size_bytes for entry in entries}
    return sum(map(blob_bytes, unique.values())) + overhead(len(entries), len(folders)).size_bytes


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
                enough = (freed + await leftovers(core)).covers(shortfall)
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


def orphans(core: Core) -> list[tuple[RepoId, Digest]]:
    """Finished blobs that no snapshot links to and no request holds: left by one that did not come to its end."""
    found = []
    for repo_id, repo in core.index.repos.items():
        linked = frozenset[Digest]().union(*(snapshot.digests for snapshot in repo.snapshots.values()))
        if repo.blobs.keys() <= linked:
            continue
        found += [(repo_id, d) for d in repo.blobs if d not in linked and not core.use.holds(Name(repo_id, d))]
    return found


async def leftovers(core: Core) -> Amount:
    """At most what ``drop_leftovers`` of everything would free."""
    partials = await core.pools.on_disk(core.partials.listed)
    idle = [digest for digest in partials if not core.use.held(digest)]
    allocated = await core.pools.on_disk(core.partials.allocated_bytes, idle)
    await core.measure("quarantine")
    blobs = [core.index.repo(repo_id).blobs[digest] for repo_id, digest in orphans(core)]
    inodes = {blob.stamp.inode: blob.allocated_bytes for blob in blobs}
    return Amount(
        sum(allocated.values()) + sum(inodes.values()) + core.space.area_bytes("quarantine"),
        INODES_OF_FLIGHT * len(idle) + len(inodes),
    )


async def drop_leftovers(core: Core, wanted: Amount | None, *, expired_only: bool) -> bool:
    """Removes unfinished and orphaned blobs that nobody fetches or holds, oldest first; whether any went.

    ``wanted`` None means all. ``expired_only``: only what nobody asked for within ``partial_ttl``.
    Who is cancelled meanwhile ends behind it, not within it: what is gone must be gone from the account.
    """
    work = asyncio.create_task(_drop_leftovers(core, wanted, expired_only=expired_only))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


async def _drop_leftovers(core: Core, wanted: Amount | None, *, expired_only: bool) -> bool:
    horizon = time.time() - core.config.cache.partial_ttl.total_seconds() if expired_only else float("inf")
    given_up = time.time() - _ABANDONED_SECONDS
    for name, path in (("trash", core.layout.trash), ("staging", core.layout.staging)):
        if removed := await core.pools.on_disk(core.snapshots.empty, path, given_up):
            await core.measure(name)
            log.warning("removed what an earlier failure had left", directory=path, names=removed)
    kept_for = time.time() - QUARANTINE_SECONDS if expired_only else float("inf")
    if removed := await core.pools.on_disk(core.snapshots.empty, core.layout.quarantine, kept_for):
        await core.measure("quarantine")
        log.info("emptied quarantine", names=removed)
        if not expired_only:
            return True
    partials = await core.pools.on_disk(core.partials.listed)
    idle = sorted((at, digest) for digest, at in partials.items() if at < horizon)
    dropped = 0
    before = core.space.used_bytes

    def enough() -> bool:
        freed = before - core.space.used_bytes
        return wanted is not None and Amount(freed, INODES_OF_FLIGHT * dropped).covers(wanted)

    for _, digest in idle:
        if enough():
            break
        if core.use.held(digest):  # asked again: a request has come since the list was made
            continue
        await core.pools.on_disk(core.partials.remove, digest)
        await core.measure("partial")
        dropped += 1
        log.info("removed unfinished blob", digest=digest.hex)
    for repo_id, digest in orphans(core):
        if enough():
            break
        if not await drop_orphan(core, repo_id, digest, horizon):
            continue
        dropped += 1
        await eviction.remove_if_bare(core, repo_id)
        log.info("removed blob that no snapshot links to", repo_id=repo_id, digest=digest.hex)
    return dropped > 0


async def drop_orphan(core: Core, repo_id: RepoId, digest: Digest, horizon: float) -> bool:
    """Whether it went. Whoever asks for it from now on waits until it has, or finds it."""
    async with core.taking_from(repo_id):
        blob = core.index.blob(repo_id, digest)
        if blob is None or blob.stamp.mtime_ns / 1e9 >= horizon or (repo_id, digest) not in orphans(core):
            return False
        core.index.drop_link(repo_id, digest)
        try:
            await core.pools.on_disk(core.snapshots.remove_blob, repo_id, digest)
        except (OSError, CacheError) as error:
            core.index.add_link(repo_id, digest, blob)
            log.warning("cannot remove a blob that no snapshot links to", digest=digest.hex, why=str(error))
            return False
        finally:
            await core.measure_after(repo_id)
    return True

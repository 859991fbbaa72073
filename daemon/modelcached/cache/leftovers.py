"""What requests that did not come to their end have left: unfinished blobs, finished ones that no snapshot links to."""

from __future__ import annotations

import time
from collections.abc import Iterable

import structlog

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.cache.sizes import INODES_OF_FLIGHT
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.errors import CacheError
from modelcached.ledger.space import Amount
from modelcached.ledger.victims import Name
from modelcached.model import Digest, RepoId

log = structlog.get_logger()

QUARANTINE_SECONDS = 7 * 86400
"""How long a bad blob is kept for whoever wants to look; less when its space is wanted."""
_ABANDONED_SECONDS = 3600.0
"""Nothing is being built or removed for so long: the disk once refused to let it go."""


def orphans(core: Core) -> list[tuple[RepoId, Digest]]:
    """Finished blobs that no snapshot links to and no request holds: left by one that did not come to its end."""
    return [(repo_id, digest) for repo_id in core.index.repos for digest in _orphans_in(core, repo_id)]


def _orphans_in(core: Core, repo_id: RepoId) -> list[Digest]:
    repo = core.index.repos.get(repo_id)
    if repo is None:
        return []
    linked = frozenset[Digest]().union(*(snapshot.digests for snapshot in repo.snapshots.values()))
    if repo.blobs.keys() <= linked:
        return []
    return [d for d in repo.blobs if d not in linked and not core.use.holds(Name(repo_id, d))]


async def droppable(core: Core) -> Amount:
    """At most what ``drop_leftovers`` of everything would free."""
    partials = await core.pools.on_disk(core.partials.listed)
    idle = [digest for digest in partials if not core.needs_unfinished(digest)]
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
    """
    return await uninterrupted(_drop_leftovers(core, wanted, expired_only=expired_only))


async def _drop_leftovers(core: Core, wanted: Amount | None, *, expired_only: bool) -> bool:
    horizon = time.time() - core.config.cache.partial_ttl.total_seconds() if expired_only else float("inf")
    given_up = time.time() - _ABANDONED_SECONDS
    for name, path in (("trash", core.layout.trash), ("staging", core.layout.staging)):
        if name == "staging" and core.landing:  # a file that is taken over waits there, for hours if need be
            continue
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
    dropped, inodes = False, 0
    before = core.space.used_bytes

    def enough() -> bool:
        freed = before - core.space.used_bytes
        return wanted is not None and Amount(freed, inodes).covers(wanted)

    for _, digest in idle:
        if enough():
            break
        if core.needs_unfinished(digest):  # asked again: a request has come since the list was made
            continue
        await core.pools.on_disk(core.partials.remove, digest)
        await core.measure("partial")
        dropped, inodes = True, inodes + INODES_OF_FLIGHT
        log.info("removed unfinished blob", digest=digest.hex)
    for repo_id, digest in orphans(core):
        if enough():
            break
        if not await drop_orphan(core, repo_id, digest, horizon):
            continue
        dropped, inodes = True, inodes + 1
        await eviction.remove_if_bare(core, repo_id)
        log.info("removed blob that no snapshot links to", repo_id=repo_id, digest=digest.hex)
    return dropped


def drop_in_vain(core: Core, names: Iterable[Name]) -> None:
    """After a request that came to nothing: links to what other repositories have, and directories that are bare.

    Made anew they cost nothing, and meanwhile they would keep their bytes when the other is evicted. What it has
    fetched itself stays, for it may be asked for again. The caller's answer does not wait for it.
    """
    if asked := frozenset(names):
        core.tidy_up(_drop_in_vain(core, asked), "drop what was made in vain")


async def _drop_in_vain(core: Core, asked: frozenset[Name]) -> None:
    for repo_id in {name.repo_id for name in asked}:
        for digest in _orphans_in(core, repo_id):
            if Name(repo_id, digest) in asked and _is_elsewhere(core, repo_id, digest):
                await drop_orphan(core, repo_id, digest, float("inf"))
        await eviction.remove_if_bare(core, repo_id)


def _is_elsewhere(core: Core, repo_id: RepoId, digest: Digest) -> bool:
    blob = core.index.blob(repo_id, digest)
    others = (core.index.blob(donor, digest) for donor in core.index.donors(digest) if donor != repo_id)
    return blob is not None and any(o is not None and o.stamp.inode == blob.stamp.inode for o in others)


async def drop_orphan(core: Core, repo_id: RepoId, digest: Digest, horizon: float) -> bool:
    """Whether it went. Whoever asks for it from now on waits until it has, or finds it."""
    async with core.taking_from(repo_id):
        blob = core.index.blob(repo_id, digest)
        if blob is None or blob.stamp.mtime_ns / 1e9 >= horizon or digest not in _orphans_in(core, repo_id):
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

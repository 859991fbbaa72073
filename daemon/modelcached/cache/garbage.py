"""What lies in the cache beside models: how much of it there is, and taking it away when an operator says so."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

import structlog

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.cache.leftovers import drop_orphan, orphans
from modelcached.cache.requests import Garbage, GarbageKind
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.model import Digest, RepoId
from modelcached.store.measure import bytes_of_name, measure

log = structlog.get_logger()

_PASSING_SECONDS = 60.0


async def found(core: Core, kinds: Collection[GarbageKind]) -> list[Garbage]:
    """What there is of those kinds. Changes nothing."""
    items: list[Garbage] = []
    if GarbageKind.PARTIAL in kinds:
        listed = await core.pools.on_disk(core.partials.listed)
        sizes = await core.pools.on_disk(core.partials.allocated_bytes, listed)
        items += [
            Garbage(GarbageKind.PARTIAL, digest.hex, None, sizes.get(digest, 0), at, core.needs_unfinished(digest))
            for digest, at in sorted(listed.items())
        ]
    if GarbageKind.ORPHAN in kinds:
        items += [_orphan(core, repo_id, digest) for repo_id, digest in sorted(orphans(core))]
    for kind, directory in ((GarbageKind.QUARANTINE, core.layout.quarantine), (GarbageKind.TRASH, core.layout.trash)):
        if kind in kinds:
            items += await core.pools.on_disk(_below, kind, directory)
    return items


def _orphan(core: Core, repo_id: RepoId, digest: Digest) -> Garbage:
    blob = core.index.repo(repo_id).blobs[digest]
    alone = blob.link_count <= 1
    size = blob.allocated_bytes if alone else 0
    return Garbage(GarbageKind.ORPHAN, digest.hex, repo_id, size, blob.stamp.mtime_ns / 1e9, in_use=False)


def _below(kind: GarbageKind, directory: str) -> list[Garbage]:
    items = []
    for name in sorted(os.listdir(directory)):
        path = f"{directory}/{name}"
        try:
            changed_at = os.lstat(path).st_ctime  # when it came there: mtime is still that of the download
        except FileNotFoundError:
            continue
        size = sum(measure(path)[0].values()) if os.path.isdir(path) else bytes_of_name(path)
        # What is put there may come back within the same step of somebody's work.
        in_use = kind is GarbageKind.TRASH and time.time() - changed_at < _PASSING_SECONDS
        items.append(Garbage(kind, name, None, size, changed_at, in_use))
    return items


async def collect(core: Core, kinds: Collection[GarbageKind]) -> tuple[list[Garbage], int]:
    """Takes away what of those kinds nobody is using; what went, and what du lost. Raises OSError, CacheError."""
    core.check_hub()
    async with core.admission:  # who is in line has looked at what is there, and reckons with it
        if core.evictions:
            await core.until_evicted(core.evictions.values())  # what is on its way out is in trash/ until then
        gone, freed = [], 0
        try:
            for item in await found(core, kinds):
                if not item.in_use and await uninterrupted(_remove(core, item)):
                    gone.append(item)
                    freed += item.size_bytes  # others may write meanwhile: the account tells of them too
        finally:  # an operator's ^C too ends between two of them
            if gone:
                log.info("collected garbage", items=len(gone), freed_bytes=freed)
            await uninterrupted(core.measure("partial", "quarantine", "trash"))
    return gone, freed


async def _remove(core: Core, item: Garbage) -> bool:
    match item.kind:
        case GarbageKind.PARTIAL:
            digest = Digest.parse(item.name)
            if digest is None or core.needs_unfinished(digest):  # asked again: a request may have come since
                return False
            await core.pools.on_disk(core.partials.remove, digest)
            return True
        case GarbageKind.ORPHAN:
            digest = Digest.parse(item.name)
            if digest is None or item.repo_id is None:
                return False
            if not await drop_orphan(core, item.repo_id, digest, float("inf")):
                return False
            await eviction.remove_if_bare(core, item.repo_id)
            return True
        case _:
            directory = core.layout.quarantine if item.kind is GarbageKind.QUARANTINE else core.layout.trash
            await core.pools.on_disk(core.snapshots.remove_name, directory, item.name)
            return True

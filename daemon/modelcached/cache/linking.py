"""Taking what another repository of the cache has, as the same inode: no byte is fetched or stored twice."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from modelcached.cache.core import Core
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.cache.want import Want, missing
from modelcached.errors import CacheError
from modelcached.ledger.victims import Name
from modelcached.model import Digest, FileEntry, RepoId, repo_folder
from modelcached.store.index import Blob
from modelcached.store.manifests import BlobStamp
from modelcached.store.scan import regular_status

log = structlog.get_logger()


async def link(core: Core, want: Want, linked: Callable[[Digest, FileEntry], None]) -> bool:
    """Whether there was anything to try. ``linked`` is told of each blob that was."""
    tried = False
    for digest, entry in missing(core, want).items():
        for donor in core.index.donors(digest):
            if donor == want.snapshot.repo_id:
                continue
            done = await _link_from(core, donor, digest, want.snapshot.repo_id)
            tried = tried or done is not None
            if done:
                linked(digest, entry)
                break
    return tried


async def _link_from(core: Core, donor: RepoId, digest: Digest, target: RepoId) -> bool | None:
    """False where the donor turns out to be none; None where it cannot be linked, however often it is tried."""
    expected = core.index.blob(donor, digest)
    there = await core.pools.on_disk(regular_status, core.layout.blob(donor, digest))
    if expected is None:
        return False
    if there is None or BlobStamp.of(there) != expected.stamp:
        expected.verified = False  # not what was verified: it is healed when it is asked for
        return False
    givers = [s.id for s in core.index.repo(donor).snapshots.values() if digest in s.digests]
    try:
        with core.use.hold(givers, frozenset({Name(donor, digest)})):
            now = core.index.blob(donor, digest)
            if now is None or not now.verified or now.stamp != expected.stamp:
                return False  # condemned while we looked
            return await uninterrupted(_make_link(core, donor, digest, target, expected))
    except (OSError, CacheError) as error:
        # Too many links, a filesystem without, a donor whose directory is none: a second copy is only larger.
        log.info("cannot link, fetching instead", digest=digest.hex, why=str(error))
        return None


async def _make_link(core: Core, donor: RepoId, digest: Digest, target: RepoId, expected: Blob) -> bool:
    status = await core.pools.on_disk(core.snapshots.link_blob, digest, donor, target)
    blob, giver = Blob.verified_now(status), core.index.blob(donor, digest)
    if giver is not None and giver.inode == blob.inode and not giver.verified:
        blob.verified = False  # found bad meanwhile
    elif blob.stamp != expected.stamp:
        blob.verified = False  # another file than was looked at
    core.index.add_link(target, digest, blob)
    core.space.add(repo_folder(target), blob.stamp.inode, blob.allocated_bytes)
    return blob.verified

"""Believing what is on the disk: no blob that was not hashed, or that no longer looks as it did when it was."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Mapping

import structlog

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.cache.want import Want
from modelcached.events import BlobCondemned
from modelcached.ledger.victims import Name
from modelcached.model import Digest, RepoId, Selection
from modelcached.store.index import Blob
from modelcached.store.manifests import BlobStamp
from modelcached.store.measure import BLOCK
from modelcached.store.scan import FoundBlob, regular_status
from modelcached.transfer.hashing import hash_file

log = structlog.get_logger()

ADOPTED = "adopted"
"""The selection of what was found right in a snapshot that this daemon did not write."""

Tell = Callable[[str], None]
"""What is being hashed, for those who wait."""


async def verify_found(core: Core, want: Want, tell: Tell) -> Selection | None:
    """Hashes what the request needs and has not been proven, and what else its snapshot holds.

    For that is shown again with it, and others may be reading it: not a file of it may go because nobody has looked
    at it since a start that found it changed. Of a snapshot that somebody else wrote, what proves right is returned,
    as a selection of its own.
    """
    snapshot, files = core.index.snapshot(want.snapshot), want.record.manifest.files
    await _verify(core, want.snapshot.repo_id, {e.digest: e.size_bytes for e in want.entries.values()}, tell)
    if snapshot is None:
        return None
    more = {p: files[p] for p, digest in snapshot.links.items() if p in files and files[p].digest == digest}
    unread = {e.digest: e.size_bytes for e in more.values() if e.digest not in want.digests}
    await _verify(core, want.snapshot.repo_id, unread, tell)
    if snapshot.record is not None:
        return None
    blobs = core.index.repo(want.snapshot.repo_id).blobs
    right = [path for path, e in more.items() if (blob := blobs.get(e.digest)) is not None and blob.verified]
    return None if set(right) <= want.selection.paths else Selection(ADOPTED, "any", frozenset(right))


async def _verify(core: Core, repo_id: RepoId, sizes: Mapping[Digest, int], tell: Tell) -> None:
    for digest, size in sizes.items():
        async with core.verifying(Name(repo_id, digest)):  # two would condemn what one of them has healed
            await _verify_one(core, repo_id, digest, size, tell)


async def _verify_one(core: Core, repo_id: RepoId, digest: Digest, size: int, tell: Tell) -> None:
    path, looks = core.layout.blob(repo_id, digest), True
    while looks:  # one that lands between the look and its answer must not be taken for missing
        blob = core.index.blob(repo_id, digest)
        status = await core.pools.on_disk(regular_status, path)
        looks = core.index.blob(repo_id, digest) is not blob
    if blob is not None and blob.foreign:
        return  # copied and verified by a flight
    if status is None:
        core.index.drop_link(repo_id, digest)
        return
    if blob is not None and blob.verified and BlobStamp.of(status) == blob.stamp:
        return
    tell(f"hashing {digest.hex[:12]}")
    try:
        right = status.st_size == size and await hash_unless_cancelled(core, path, digest)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        log.warning("blob cannot be read", repo_id=repo_id, digest=digest.hex, why=str(error))
        right = False  # what the disk has lost is fetched anew
    if right:
        sealed = await core.pools.on_disk(core.snapshots.seal_blob, repo_id, digest)
        if core.index.blob(repo_id, digest) is not blob:
            pass  # another request has linked or fetched it meanwhile
        elif BlobStamp.of(sealed) == BlobStamp.of(status):
            core.index.add_link(repo_id, digest, Blob.verified_now(sealed))
        else:
            log.warning("blob changed while it was hashed, fetching it", repo_id=repo_id, digest=digest.hex)
            core.index.drop_link(repo_id, digest)
        return
    now = await core.pools.on_disk(regular_status, path)
    replaced = now is None or BlobStamp.of(now) != BlobStamp.of(status)
    if now is None or replaced or core.index.blob(repo_id, digest) is not blob:
        return  # somebody else has replaced what was hashed: not ours to judge
    if blob is None:
        found = FoundBlob.of(now, os.geteuid(), now.st_blocks * BLOCK)
        core.index.add_link(repo_id, digest, Blob.found(found, None, None))
        blob = core.index.repo(repo_id).blobs[digest]
    await condemn(core, repo_id, digest, blob)


async def hash_unless_cancelled(
    core: Core, path: str, digest: Digest, count: Callable[[int], None] = lambda _bytes: None
) -> bool:
    """Whether the blob is what its name says; its thread ends with who waits for it, within a block.

    Raises OSError, CacheError(SHUTTING_DOWN).
    """
    ended = _Ended(core.pools.stopping)
    work = asyncio.ensure_future(core.pools.on_hash(hash_file, path, digest, ended, count))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        ended.set()
        work.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise


class _Ended(threading.Event):
    """Set, or the daemon is stopping."""

    def __init__(self, stopping: threading.Event) -> None:
        super().__init__()
        self._stopping = stopping

    def is_set(self) -> bool:
        return super().is_set() or self._stopping.is_set()


async def condemn(core: Core, repo_id: RepoId, digest: Digest, blob: Blob) -> None:
    """A blob was read and is bad: nobody is served from it, a copy of it is kept for whoever wants to look.

    What nobody uses is taken out of sight, and the blob with it. What is leased or pinned, or what a request is making
    whole, stays as it is: its readers would gain nothing from a link that leads nowhere, and the blob that is fetched
    anew takes the bad one's place in one step, for all snapshots of the repository. Raises OSError.
    """
    await uninterrupted(_condemn(core, repo_id, digest, blob))


async def _condemn(core: Core, repo_id: RepoId, digest: Digest, blob: Blob) -> None:
    repo = core.index.repo(repo_id)
    if repo.blobs.get(digest) is not blob:
        return  # another has come in its place, or it is on its way out
    core.index.doubt(digest, blob.stamp.inode)  # other repositories may have it as theirs: as bad there
    size = blob.stamp.size_bytes
    log.warning("blob is not what its name says", repo_id=repo_id, digest=digest.hex, size_bytes=size)
    core.observe(BlobCondemned(repo_id, digest.hex))
    await core.pools.on_disk(core.snapshots.keep_bad_blob, repo_id, digest)
    await core.measure("quarantine")
    if not _is_still(blob, repo.blobs.get(digest)):
        return  # another request has linked or fetched it meanwhile
    # One step from here to the withdrawal: who is leased meanwhile is not taken away.
    refs, comes = core.refs(), core.use.holds(Name(repo_id, digest))  # a request is about to fetch it
    needing = [snapshot for snapshot in repo.snapshots.values() if digest in snapshot.digests]
    free = [s for s in needing if s.id not in core.evictions and not core.use.protected(s.id, refs)]
    unused = [] if comes else free
    kept = [str(s.id) for s in needing if core.use.leased(s.id, refs) or core.use.pins_on(s.id, refs)]
    if kept:
        core.tell_bad(
            repo_id,
            digest,
            f"{', '.join(kept)} is in use and its blob {digest.hex[:12]} went bad on the disk: "
            "it is being fetched again; restart its readers when this has gone",
        )
    for end in await core.until_evicted([eviction.withdraw(core, snapshot) for snapshot in unused]):
        if isinstance(end, BaseException):
            log.error("snapshot with a bad blob could not be withdrawn", why=str(end))
    async with core.taking_from(repo_id):
        needed = any(digest in snapshot.digests for snapshot in repo.snapshots.values())
        same = _is_still(blob, repo.blobs.get(digest))
        if same and not needed and not core.use.holds(Name(repo_id, digest)):
            core.index.drop_link(repo_id, digest)
            await core.pools.on_disk(core.snapshots.remove_blob, repo_id, digest)
    await core.measure_after(repo_id)


def _is_still(bad: Blob, now: Blob | None) -> bool:
    """Also where a look at the repository has made its entry anew."""
    return now is not None and now.inode == bad.inode and not now.verified

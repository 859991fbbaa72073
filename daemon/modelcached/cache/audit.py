"""An operator's reading of what is cached: each file against its digest, at once and at full speed.

What is found bad is served to nobody new: it is doubted, so that the next request for it hashes and heals it. Only
with ``repair`` is anything moved or fetched, as the scrub would.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

import structlog

from modelcached.cache.assemblies import Assemblies, Watch
from modelcached.cache.core import Core
from modelcached.cache.requests import BadFile, Reading, Verdict
from modelcached.cache.verification import hash_unless_cancelled
from modelcached.cache.want import Want, names_of
from modelcached.errors import CacheError
from modelcached.events import BlobScrubbed
from modelcached.ledger.checks import Checks
from modelcached.ledger.victims import Name
from modelcached.model import Digest, RepoId, Revision, SnapshotId
from modelcached.store.index import Snapshot, SnapshotState
from modelcached.store.manifests import BlobStamp
from modelcached.store.scan import regular_status

log = structlog.get_logger()


class Audit:
    """The event loop's alone."""

    def __init__(self, core: Core, assemblies: Assemblies, checks: Checks) -> None:
        self._core = core
        self._assemblies = assemblies
        self._checks = checks

    async def read(self, ids: Iterable[SnapshotId], reading: Reading, *, repair: bool) -> None:
        """Reads every file of those snapshots, each inode once; ``reading`` says at any moment how far it is.

        Cancelling ends it within a block. Raises OSError, CacheError(SHUTTING_DOWN).
        """
        snapshots = [s for i in ids if (s := self._core.index.snapshot(i)) is not None]
        snapshots = [s for s in snapshots if s.state is not SnapshotState.CONDEMNED]
        for snapshot in snapshots:
            blobs = self._core.index.repo(snapshot.id.repo_id).blobs
            known = [blobs[digest].stamp for digest in snapshot.digests if digest in blobs]
            reading.bytes_total += sum(stamp.size_bytes for stamp in known)
            reading.files_total += len(snapshot.digests)
        verdicts: dict[int, Verdict | None] = {}
        for snapshot in snapshots:
            await self._read_one(snapshot, reading, verdicts)
            reading.models += 1
        reading.now = ""
        if repair and reading.bad:
            await self._repair(reading)

    async def _read_one(self, snapshot: Snapshot, reading: Reading, verdicts: dict[int, Verdict | None]) -> None:
        paths: dict[Digest, list[str]] = {}
        for path, digest in sorted(snapshot.links.items()):
            paths.setdefault(digest, []).append(path)
        for digest, names in paths.items():
            reading.now = f"{snapshot.id} {names[0]}"
            done = reading.bytes_done
            blob = self._core.index.blob(snapshot.id.repo_id, digest)
            size = blob.stamp.size_bytes if blob is not None else 0
            verdict = await self._judge(snapshot.id.repo_id, digest, reading, verdicts)
            reading.bytes_done = done + size  # also what was not read again
            reading.files_done += 1
            if self._core.index.snapshot(snapshot.id) is not snapshot:
                return  # evicted, or grown, meanwhile
            if verdict is not None:
                reading.bad += [BadFile(snapshot.id, path, digest, verdict) for path in names]

    async def _judge(
        self, repo_id: RepoId, digest: Digest, reading: Reading, verdicts: dict[int, Verdict | None]
    ) -> Verdict | None:
        """None where it is right."""
        core, path = self._core, self._core.layout.blob(repo_id, digest)
        async with core.verifying(Name(repo_id, digest)):
            blob = core.index.blob(repo_id, digest)
            status = await core.pools.on_disk(regular_status, path)
            if status is None and await core.pools.on_disk(os.path.isfile, path):
                # A link to somebody else's file: copied and verified when it is asked for, so that belief stays.
                return await self._hash(path, digest, reading)
            if status is None:
                if core.index.blob(repo_id, digest) is blob:
                    core.index.drop_link(repo_id, digest)
                return Verdict.MISSING
            if status.st_ino in verdicts:
                return verdicts[status.st_ino]
            verdict = await self._hash(path, digest, reading)
            after = await core.pools.on_disk(regular_status, path)
            if after is None or BlobStamp.of(after) != BlobStamp.of(status):
                return None  # replaced while it was read: what was read is not there any more
            verdicts[status.st_ino] = verdict
            if verdict is None:
                self._checks.done(digest, status.st_ino, core.clock.wall())
            else:
                core.index.doubt(digest, status.st_ino)
                log.warning("blob is not what its name says", repo_id=repo_id, digest=digest.hex, verdict=verdict.value)
            core.observe(BlobScrubbed(status.st_size, right=verdict is None))
            return verdict

    async def _hash(self, path: str, digest: Digest, reading: Reading) -> Verdict | None:
        def count(size_bytes: int) -> None:
            reading.bytes_done += size_bytes

        try:
            right = await hash_unless_cancelled(self._core, path, digest, count)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            log.warning("blob cannot be read", digest=digest.hex, why=str(error))
            return Verdict.UNREADABLE
        return None if right else Verdict.BAD

    async def _repair(self, reading: Reading) -> None:
        """Fetches what is bad again; its snapshots stay in sight, for their blobs are replaced in one step."""
        core = self._core
        token = core.own_token.secret()
        by_snapshot: dict[SnapshotId, list[BadFile]] = {}
        for bad in reading.bad:
            by_snapshot.setdefault(bad.snapshot, []).append(bad)
        for snapshot_id, files in by_snapshot.items():
            reading.now = f"{snapshot_id}: fetching {len(files)} again"
            why = await self._heal(snapshot_id, token)
            for bad in files:
                blob = core.index.blob(snapshot_id.repo_id, bad.digest)
                bad.repaired = blob is not None and blob.verified
                bad.detail = "" if bad.repaired else why or "no profile of this daemon's selected it"
        reading.now = ""

    async def _heal(self, snapshot_id: SnapshotId, token: str | None) -> str:
        """Why not; empty where it is whole. What is doubted is hashed once more there, and condemned by that."""
        core = self._core
        snapshot = core.index.snapshot(snapshot_id)
        if snapshot is None or snapshot.record is None:
            return "it was not fetched by this daemon: ensure it, or evict it"
        revision = next(iter(core.index.revisions(snapshot_id)), Revision(snapshot_id.commit))
        record = snapshot.record
        wants = tuple(Want(record, selection, revision, stale=False) for selection in record.selections.values())
        with core.use.hold([snapshot_id], names_of(wants)):
            try:
                for want in wants:
                    await self._assemblies.make_whole((want,), token, Watch())
            except CacheError as error:
                return error.text
        return ""

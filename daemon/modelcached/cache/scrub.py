"""Reading what is cached again, for disks rot: continuously, at a bounded rate, who was read longest ago first.

A blob that is not what its name says any more is judged as verification.py does; what was withdrawn or is still read
is fetched again in the background, and of it only that blob.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import time
from dataclasses import dataclass

import structlog

from modelcached.cache.assemblies import Assemblies
from modelcached.cache.core import Core
from modelcached.cache.verification import condemn
from modelcached.cache.want import Want
from modelcached.config import ScrubSection
from modelcached.events import BlobScrubbed
from modelcached.ledger.checks import Checks
from modelcached.model import Digest, RepoId, Revision
from modelcached.pools import Threads
from modelcached.store.index import Blob, Snapshot
from modelcached.store.manifests import BlobStamp
from modelcached.store.scan import regular_status
from modelcached.transfer.hashing import hash_file
from modelcached.transfer.pace import RateLimiter

log = structlog.get_logger()

_SURVEY_SECONDS = 600.0
"""How old the oldest check may be known to be; what comes new is due an interval later."""
_REPOS_A_STEP = 20


@dataclass(frozen=True, slots=True)
class _Due:
    repo_id: RepoId
    digest: Digest
    blob: Blob
    last: float


class Scrubber:
    """The event loop's alone. ``look`` is a turn of its loop, which may take hours."""

    def __init__(self, core: Core, assemblies: Assemblies, checks: Checks) -> None:
        self._core = core
        self._assemblies = assemblies
        self._checks = checks
        self._thread = Threads(1, "scrub", nice=19, in_bulk=True, idle_io=True)  # hours of reading, behind every answer
        self._pace = RateLimiter(core.config.scrub.rate)
        self._failed: dict[tuple[str, int], float] = {}
        self._section: ScrubSection | None = None
        self._wake_at = 0.0
        self.oldest: float | None = None
        """When the blob that was read longest ago was read; seconds since the epoch. None where there is none."""
        self.due_bytes = 0
        """What is to be read, as of the last survey and what was read since."""

    async def look(self) -> None:
        """Reads all that is due."""
        section = self._core.config.scrub
        if section != self._section or self._core.clock.wall() >= self._wake_at:
            self._section = section
            await self._work()
        self._core.forget_mended()

    def last_read(self, digest: Digest, blob: Blob) -> float:
        """When it was last read and found right, seconds since the epoch."""
        return self._checks.last(digest, blob.stamp.inode, blob.stamp.mtime_ns / 1e9)

    def stop(self) -> None:
        """What is being read is given up, for the pools' ``stopping`` is set."""
        self._thread.stop(wait=False)

    async def _work(self) -> None:
        section, now = self._core.config.scrub, self._core.clock.wall()
        horizon = now - section.interval.total_seconds()
        due, rest = await self._survey(horizon)
        self.oldest = due[0].last if due else rest
        due = [one for one in due if self._failed.get((one.digest.hex, one.blob.stamp.inode), 0.0) <= horizon]
        self.due_bytes = sum(one.blob.stamp.size_bytes for one in due) if section.rate else 0
        self._checks.keep_only(self._core.index.has_inode)
        self._wake_at = now + min(_SURVEY_SECONDS, section.interval.total_seconds())
        if not section.rate:
            return
        self._pace.bytes_per_second = section.rate
        for one, following in itertools.zip_longest(due, due[1:]):
            if self._core.config.scrub != section:
                return  # the next look begins anew
            await self._check(one)
            self.due_bytes -= one.blob.stamp.size_bytes
            self.oldest = following.last if following is not None else rest or now

    async def _survey(self, horizon: float) -> tuple[list[_Due], float | None]:
        """What was last read before the horizon, each inode once, who was read longest ago first; and when of the rest.

        In steps, and keeping only what is due: a large cache has a hundred thousand.
        """
        found: dict[int, _Due] = {}
        rest: float | None = None
        for number, (repo_id, repo) in enumerate(list(self._core.index.repos.items())):
            for digest, blob in repo.blobs.items():
                if not blob.verified or blob.foreign or blob.stamp.inode in found:
                    continue
                last = self._checks.last(digest, blob.stamp.inode, blob.stamp.mtime_ns / 1e9)
                if last <= horizon:
                    found[blob.stamp.inode] = _Due(repo_id, digest, blob, last)
                elif rest is None or last < rest:
                    rest = last
            if number % _REPOS_A_STEP == 0:
                await asyncio.sleep(0)
        return sorted(found.values(), key=lambda due: (due.last, due.digest)), rest

    async def _check(self, due: _Due) -> None:
        core, path = self._core, self._core.layout.blob(due.repo_id, due.digest)
        if not self._is_there(due):
            return
        key = (due.digest.hex, due.blob.stamp.inode)

        def pace(size_bytes: int) -> None:
            self._pace.take(size_bytes, core.pools.stopping.wait)

        began = time.monotonic()
        status = await core.pools.on_disk(regular_status, path)
        if status is None or BlobStamp.of(status) != due.blob.stamp:
            self._failed[key] = core.clock.wall()  # not what was believed: whoever asks for it will see
            return
        try:
            right = await self._thread.run(lambda: hash_file(path, due.digest, core.pools.stopping, pace))
            after = await core.pools.on_disk(regular_status, path)
        except OSError as error:
            if error.errno != errno.EIO:
                self._failed[key] = core.clock.wall()  # else it would be the next one again, and for ever
                raise
            log.warning("blob cannot be read", repo_id=due.repo_id, digest=due.digest.hex, why=str(error))
            right, after = False, status
        if not self._is_there(due) or after is None:
            return  # evicted or replaced meanwhile
        if BlobStamp.of(after) != due.blob.stamp:
            self._failed[key] = core.clock.wall()
            return
        core.observe(BlobScrubbed(status.st_size, right=right))
        if right:
            self._checks.done(due.digest, due.blob.stamp.inode, core.clock.wall())
            log.debug("read again", digest=due.digest.hex, bytes=status.st_size, seconds=time.monotonic() - began)
            return
        await self._mend(due)

    def _is_there(self, due: _Due) -> bool:
        return self._core.index.blob(due.repo_id, due.digest) is due.blob and due.blob.verified

    async def _mend(self, due: _Due) -> None:
        """Under each of its names; whoever needs it gets it anew, if upstream still has it."""
        core, inode = self._core, due.blob.stamp.inode
        for repo_id in list(core.index.repos):
            blob = core.index.blob(repo_id, due.digest)
            if blob is None or blob.stamp.inode != inode:  # or not any more, after what was done about another
                continue
            needing = [
                (snapshot, core.index.revisions(snapshot.id))
                for snapshot in core.index.repo(repo_id).snapshots.values()
                if due.digest in snapshot.digests
            ]
            await condemn(core, repo_id, due.digest, blob)
            for snapshot, revisions in needing:
                self._fetch(snapshot, revisions)

    def _fetch(self, snapshot: Snapshot, revisions: list[Revision]) -> None:
        if snapshot.record is None:
            return
        token = self._core.own_token.secret()
        for selection in snapshot.record.selections.values():
            for revision in revisions or [Revision(snapshot.id.commit)]:
                self._assemblies.begin((Want(snapshot.record, selection, revision, stale=False),), token)

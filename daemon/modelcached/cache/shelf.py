"""Looking: what is cached, under whose protection, and what the disk holds. Changes nothing."""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from modelcached.cache import eviction
from modelcached.cache.assemblies import Assemblies
from modelcached.cache.core import PODS_DIRECTORY, Core
from modelcached.cache.looking import Looking
from modelcached.cache.requests import CachedFile, CachedModel, EvictionRule, ModelDetail, ModelRequest, Status
from modelcached.cache.scrub import Scrubber
from modelcached.cache.shortage import pinned_and_leased
from modelcached.cache.want import Want
from modelcached.errors import CacheError, Reason
from modelcached.ledger.space import Amount
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, as_commit
from modelcached.store.index import Snapshot, SnapshotState

_MODELS_A_STEP = 100
"""Described while the event loop does nothing else: some milliseconds."""
_LOOK = "cachectl ls shows what is"
"""To bring what is not there would be no help to who only wants to look at it, or to have it gone."""


class Shelf:
    """The event loop's alone."""

    def __init__(self, core: Core, assemblies: Assemblies, looking: Looking, scrubber: Scrubber) -> None:
        self._core = core
        self._scrubber = scrubber
        self._assemblies = assemblies
        self._looking = looking

    def find(self, repo_id: RepoId, revision: Revision, mend: str = "") -> Snapshot:
        """A cached snapshot by branch, tag or commit. Raises CacheError(MODEL_NOT_CACHED), with ``mend`` if given."""
        repo = self._core.index.repos.get(repo_id)
        commit: Commit | None = as_commit(revision) or (repo.refs.get(revision) if repo else None)
        snapshot = repo.snapshots.get(commit) if repo and commit else None
        if snapshot is None or snapshot.state is SnapshotState.CONDEMNED:
            raise CacheError(Reason.MODEL_NOT_CACHED, f"{repo_id}@{revision} is not in the cache", mend=mend)
        return snapshot

    async def get(self, model: ModelRequest) -> CachedModel:
        """From the cache alone. Raises CacheError(MODEL_NOT_CACHED) unless the profile is complete and on disk."""
        self._core.check_hub()
        snapshot = self.find(model.repo_id, model.revision)
        selection = snapshot.record.selections.get(model.profile.canonical) if snapshot.record else None
        if selection is None or snapshot.record is None:
            raise CacheError(
                Reason.MODEL_NOT_CACHED,
                f"{model.repo_id}@{model.revision} is in the cache, but not whole for {model.profile.canonical}",
            )
        sight = await self._looking.look(Want(snapshot.record, selection, model.revision, stale=False))
        if not sight.whole:
            raise CacheError(Reason.MODEL_NOT_CACHED, f"{snapshot.id} lost files on disk", mend="ensure it to heal it")
        return self.describe([snapshot])[0]

    def describe(self, snapshots: Sequence[Snapshot]) -> list[CachedModel]:
        """As they are listed."""
        core, refs, books = self._core, self._core.refs(), eviction.shares(self._core)
        listed = []
        for snapshot in snapshots:
            size, alone = books.sizes(eviction.candidate(snapshot))
            usage = core.use.usage.get(snapshot.id)
            listed.append(
                CachedModel(
                    snapshot.id,
                    core.layout.snapshot_path(snapshot.id),
                    tuple(core.index.revisions(snapshot.id)),
                    tuple(sorted(snapshot.record.selections)) if snapshot.record else (),
                    size,
                    alone,
                    usage.used_at if usage else None,
                    bool(core.use.pins_on(snapshot.id, refs)),
                    tuple(lease.id for lease in core.use.leases_on(snapshot.id, refs)),
                    snapshot.state,
                )
            )
        return listed

    def detail(self, repo_id: RepoId, revision: Revision) -> ModelDetail:
        """One snapshot down to its files. Raises CacheError(MODEL_NOT_CACHED)."""
        core, snapshot = self._core, self.find(repo_id, revision, _LOOK)
        repo, refs, record = core.index.repo(repo_id), core.refs(), snapshot.record
        wanted = {path: entry.digest for path, entry in record.manifest.files.items()} if record else {}
        selected = frozenset[str]().union(*(s.paths for s in record.selections.values())) if record else frozenset()
        digests = {path: wanted[path] for path in selected if path in wanted} | snapshot.links
        shared = self._shared(snapshot)
        files = []
        for path, digest in sorted(digests.items()):
            blob = repo.blobs.get(digest) if snapshot.links.get(path) == digest else None
            entry = record.manifest.files.get(path) if record else None
            size = blob.stamp.size_bytes if blob is not None else entry.size_bytes if entry is not None else 0
            read_at = self._scrubber.last_read(digest, blob) if blob is not None and blob.verified else None
            verified = blob is not None and blob.verified
            files.append(CachedFile(path, size, digest, blob is not None, verified, read_at, shared.get(digest, ())))
        return ModelDetail(
            self.describe([snapshot])[0],
            tuple(files),
            tuple(sorted(record.selections.values(), key=lambda s: s.profile)) if record else (),
            tuple(core.use.leases_on(snapshot.id, refs)),
            tuple(sorted(core.use.pins_on(snapshot.id, refs), key=str)),
            tuple(map(str, eviction.protections(core, snapshot))),
        )

    def _shared(self, snapshot: Snapshot) -> dict[Digest, tuple[SnapshotId, ...]]:
        """Which other snapshots need each of its blobs, by whatever name."""
        index, shared = self._core.index, dict[Digest, tuple[SnapshotId, ...]]()
        for other in sorted(index.snapshots(), key=lambda each: each.id):
            if other.id == snapshot.id:
                continue
            for digest in other.digests & snapshot.digests:
                mine, theirs = index.blob(snapshot.id.repo_id, digest), index.blob(other.id.repo_id, digest)
                if mine is not None and theirs is not None and mine.stamp.inode == theirs.stamp.inode:
                    shared[digest] = (*shared.get(digest, ()), other.id)
        return shared

    async def by_rule(self, rule: EvictionRule) -> tuple[list[SnapshotId], int]:
        """What an operator's rule means: of what nothing keeps, in the order in which it would go by itself.

        And how many bytes would still lack of what shall be free.
        """
        core, now = self._core, self._core.clock.wall()
        disk = await core.filesystem()  # first: who is leased while it is looked at is not meant
        meant = list(eviction.evictable(core))
        if rule.older_than is not None:
            horizon = now - rule.older_than.total_seconds()
            meant = [s for s in meant if (used := core.use.usage.get(s.id)) is None or used.used_at <= horizon]
        if rule.until_free_bytes is None:
            return [snapshot.id for snapshot in meant], 0
        lacking = rule.until_free_bytes - disk.free_bytes
        if lacking <= 0:
            return [], 0
        victims, freed = eviction.plan(core, Amount(lacking), meant)
        return [victim.id for victim in victims], max(0, lacking - freed.size_bytes)

    async def all(self) -> list[CachedModel]:
        """Every snapshot, as it is listed; in steps, for there may be thousands."""
        listed: list[CachedModel] = []
        after: SnapshotId | None = None
        while True:
            models, after = self.page(after, _MODELS_A_STEP)
            listed += models
            if after is None:
                return listed
            await asyncio.sleep(0)

    def page(self, after: SnapshotId | None, size: int) -> tuple[list[CachedModel], SnapshotId | None]:
        """The next snapshots in order of repository and commit, and where the page after begins."""
        rest = self._in_order(after)
        chosen = list(islice(rest, size))
        return self.describe(chosen), chosen[-1].id if next(rest, None) is not None else None

    def _in_order(self, after: SnapshotId | None) -> Iterator[Snapshot]:
        """Those behind ``after``; no more of them are sorted than are asked for."""
        repos = self._core.index.repos
        names = sorted(repos)
        for repo_id in islice(names, bisect_left(names, after.repo_id) if after else 0, None):
            for snapshot in sorted(repos[repo_id].snapshots.values(), key=lambda snapshot: snapshot.id):
                if after is None or snapshot.id > after:
                    yield snapshot

    def named(self, repo_id: RepoId, revision: Revision | None) -> list[SnapshotId]:
        """What an operator wants to go: one snapshot, or every cached commit. Raises CacheError(MODEL_NOT_CACHED)."""
        if revision is not None:
            return [self.find(repo_id, revision, _LOOK).id]
        repo = self._core.index.repos.get(repo_id)
        found = sorted(s.id for s in repo.snapshots.values()) if repo else []
        if not found:
            raise CacheError(Reason.MODEL_NOT_CACHED, f"{repo_id} is not in the cache", mend=_LOOK)
        return found

    def _latest(self, most: int) -> list[CachedModel]:
        if not most:
            return []
        usage = self._core.use.usage
        used = heapq.nlargest(most, usage, key=lambda snapshot: usage[snapshot].tick)
        found = (self._core.index.snapshot(snapshot) for snapshot in used)
        return self.describe([snapshot for snapshot in found if snapshot is not None])

    async def status(self) -> Status:
        """The disk's truth at this moment."""
        core = self._core
        await core.measure("private", "root")  # what grows by itself: records do not, and there are thousands
        disk = await core.filesystem()
        pinned, leased = pinned_and_leased(core)
        next_to_go = next(eviction.evictable(core), None)
        usage = core.use.usage.get(next_to_go.id) if next_to_go is not None else None
        space = core.space
        return Status(
            budget_bytes=space.limits.budget_bytes,
            used_bytes=space.used_bytes,
            reserved_bytes=space.reserved_bytes,
            partial_bytes=space.area_bytes("partial"),
            trash_bytes=space.area_bytes("trash"),
            quarantine_bytes=space.area_bytes("quarantine"),
            pinned_bytes=pinned.size_bytes,
            leased_bytes=leased.size_bytes,
            filesystem_free_bytes=disk.free_bytes,
            filesystem_total_bytes=disk.size_bytes,
            min_free_bytes=space.limits.min_free_bytes,
            models=sum(1 for _ in core.index.snapshots()),
            pinned_models=pinned.models,
            leased_models=leased.models,
            leases=len(core.use.leases),
            filesystem_inodes=disk.inodes,
            filesystem_free_inodes=disk.free_inodes,
            reserved_inodes=space.reserved_inodes,
            min_free_inodes=space.limits.min_free_inodes,
            room_bytes=core.room_on(disk).size_bytes,
            transfers=self._assemblies.transfers(),
            hub_dir=core.layout.hub,
            degraded=tuple(core.degraded.values()),
            oldest_check=self._scrubber.oldest,
            listed=core.listed(),
            pins=len(core.use.pins),
            leases_by_kind=Counter(lease.kind for lease in core.use.leases.values()),
            witness_healthy=PODS_DIRECTORY not in core.degraded,
            may_evict=next_to_go is not None,
            oldest_idle_at=usage.used_at if usage is not None else None,
            flights=self._assemblies.flying,
            scrub_due_bytes=self._scrubber.due_bytes,
            latest=tuple(self._latest(core.config.metrics.models)),
        )

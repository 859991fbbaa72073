"""What somebody else did to hub/: belief is brought to what is on the disk, one repository at a time, by merging.

The daemon's own doings must never count as anybody's, so nothing is guessed from events: belief is compared
with the disk while the daemon does nothing there, and what differs counts only when a second look finds the same.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from modelcached.cache.core import Core
from modelcached.events import DriftFound
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, repo_folder
from modelcached.store.index import Blob, Repo, Snapshot, SnapshotState, state_of
from modelcached.store.manifests import BlobStamp, Record
from modelcached.store.scan import FoundRepo, scan_repo

log = structlog.get_logger()

_NAMED = 20
"""So many names go into a line of the log; the number says how many there were."""


class DriftKind(enum.StrEnum):
    """In what way belief and disk differed."""

    BLOB_FOUND = "blob_found"
    BLOB_CHANGED = "blob_changed"
    BLOB_GONE = "blob_gone"
    SNAPSHOT_FOUND = "snapshot_found"
    SNAPSHOT_CHANGED = "snapshot_changed"
    SNAPSHOT_GONE = "snapshot_gone"
    REF_FOUND = "ref_found"
    REF_MOVED = "ref_moved"
    REF_GONE = "ref_gone"


@dataclass(frozen=True, slots=True, order=True)
class Drift:
    """One thing that somebody else did."""

    kind: DriftKind
    what: str
    """The blob's digest, the snapshot's commit, the branch or tag."""


@dataclass(frozen=True, slots=True)
class Look:
    """What came of looking at a repository."""

    again: bool
    """It was busy, changed meanwhile, or what differs must be found once more."""
    drifts: tuple[Drift, ...] = ()
    """What belief was corrected by, in order."""


@dataclass(slots=True)
class Difference:
    """All in which a repository on the disk is not as believed."""

    blobs: dict[Drift, tuple[Digest, Blob | None]] = field(default_factory=dict)
    snapshots: dict[Drift, tuple[Commit, dict[str, Digest] | None]] = field(default_factory=dict)
    refs: dict[Drift, tuple[Revision, Commit | None]] = field(default_factory=dict)
    unbelieved: dict[Digest, Blob] = field(default_factory=dict)
    """Blobs that nobody believed and that look otherwise now: nothing is lost with that."""
    same: dict[Digest, Blob] = field(default_factory=dict)
    """Blobs that are what they were; how many names they have is others' business too."""

    @property
    def drifts(self) -> set[Drift]:
        """Those that count."""
        return {*self.blobs, *self.snapshots, *self.refs}


def differ(repo: Repo, found: FoundRepo, stamps: Mapping[Digest, BlobStamp], path: str) -> Difference:
    """What of ``found`` is not as believed. ``stamps``: how blobs looked when they were verified."""
    result = Difference()
    for digest, item in found.blobs.items():
        blob = Blob.found(item, stamps.get(digest), found.foreign_path(digest, path))
        known = repo.blobs.get(digest)
        if known is None:
            result.blobs[Drift(DriftKind.BLOB_FOUND, digest.hex)] = (digest, blob)
        elif (known.stamp, known.foreign, known.path) == (blob.stamp, blob.foreign, blob.path):
            result.same[digest] = blob
        elif known.verified:
            result.blobs[Drift(DriftKind.BLOB_CHANGED, digest.hex)] = (digest, blob)
        else:
            result.unbelieved[digest] = replace(blob, verified=False)
    for digest in repo.blobs.keys() - found.blobs.keys():
        result.blobs[Drift(DriftKind.BLOB_GONE, digest.hex)] = (digest, None)
    for commit, links in found.snapshots.items():
        before = repo.snapshots.get(commit)
        if before is None:
            result.snapshots[Drift(DriftKind.SNAPSHOT_FOUND, commit)] = (commit, links)
        elif before.state is not SnapshotState.CONDEMNED and before.links != links:
            result.snapshots[Drift(DriftKind.SNAPSHOT_CHANGED, commit)] = (commit, links)
    for commit, snapshot in repo.snapshots.items():
        if commit not in found.snapshots and snapshot.state is not SnapshotState.CONDEMNED:
            result.snapshots[Drift(DriftKind.SNAPSHOT_GONE, commit)] = (commit, None)
    for revision, commit in found.refs.items():
        if (old := repo.refs.get(revision)) != commit:
            kind = DriftKind.REF_FOUND if old is None else DriftKind.REF_MOVED
            result.refs[Drift(kind, revision)] = (revision, commit)
    for revision in repo.refs.keys() - found.refs.keys():
        result.refs[Drift(DriftKind.REF_GONE, revision)] = (revision, None)
    return result


@dataclass(frozen=True, slots=True)
class _Seen:
    found: FoundRepo
    records: dict[Commit, Record]
    """Ours, where something is there that nobody knew of: how it looked when it was verified."""


class Rescan:
    """Looks at repositories and merges. The event loop's alone."""

    def __init__(self, core: Core, in_flight: Callable[[Digest], bool]) -> None:
        """``in_flight``: a transfer may publish the blob at any moment, also one that nobody waits for."""
        self._core = core
        self._in_flight = in_flight
        self._suspected: dict[RepoId, set[Drift]] = {}

    async def look(self, repo_id: RepoId) -> Look:
        """Once. Raises OSError where the disk does not answer: then nothing is known, and belief stays."""
        core = self._core
        suspected = self._suspected.pop(repo_id, set())
        if self._busy(repo_id):
            return Look(again=True)
        async with core.taking_from(repo_id):
            before = _Belief.of(core.index.repos.get(repo_id, Repo()))
            try:
                seen = await core.pools.on_disk(_see, core, repo_id, before)
            except FileNotFoundError:  # somebody removes it at this moment
                return Look(again=True)
            if self._busy(repo_id) or not before.holds(core.index.repos.get(repo_id, Repo())):
                return Look(again=True)
            drifts, again = self._merge(repo_id, seen, suspected)
            await self._forget_records(repo_id, drifts)  # in here: nobody publishes one anew before we are out
        if drifts:
            await core.measure_after(repo_id)
        else:
            await core.measure(repo_folder(repo_id))
        return Look(again, drifts)

    def _busy(self, repo_id: RepoId) -> bool:
        """Somebody is about to change it: what is on the disk is not what is believed, and rightly so."""
        core = self._core
        return core.use.holds_in(repo_id) or any(snapshot.repo_id == repo_id for snapshot in core.evictions)

    def _merge(self, repo_id: RepoId, seen: _Seen, suspected: set[Drift]) -> tuple[tuple[Drift, ...], bool]:
        """One step of the event loop: what was found twice is believed from now on; and whether to look again."""
        core, found = self._core, seen.found
        repo = core.index.repo(repo_id)
        stamps = {d: stamp for record in seen.records.values() for d, stamp in record.stamps.items()}
        difference = differ(repo, found, stamps, core.layout.repo(repo_id))
        for drift, (digest, _) in list(difference.blobs.items()):
            if self._in_flight(digest):
                del difference.blobs[drift]
        confirmed = difference.drifts & suspected
        self._believe_blobs(repo_id, difference, confirmed)
        for commit, links in (difference.snapshots[d] for d in confirmed & difference.snapshots.keys()):
            before, snapshot_id = repo.snapshots.pop(commit, None), SnapshotId(repo_id, commit)
            if links is not None:
                record = before.record if before is not None else seen.records.get(commit)
                repo.snapshots[commit] = Snapshot(snapshot_id, links, record, SnapshotState.UNVERIFIED)
            else:
                core.use.forget(snapshot_id)
                core.unremovable.pop(snapshot_id, None)
        for revision, now in (difference.refs[d] for d in confirmed & difference.refs.keys()):
            if now is None:
                repo.refs.pop(revision, None)
            else:
                repo.refs[revision] = now
                core.use.named(repo_id, revision, now)
        for snapshot in repo.snapshots.values():
            if snapshot.state is not SnapshotState.CONDEMNED:
                snapshot.state = state_of(snapshot.record, snapshot.links, repo.blobs)
        if not (repo.blobs or repo.snapshots or repo.refs):
            core.index.repos.pop(repo_id, None)
        left = difference.drifts - confirmed
        if left:
            self._suspected[repo_id] = left
        self._tell(repo_id, confirmed)
        return tuple(sorted(confirmed)), bool(left)

    def _believe_blobs(self, repo_id: RepoId, difference: Difference, confirmed: set[Drift]) -> None:
        index = self._core.index
        blobs = index.repo(repo_id).blobs
        for digest, blob in difference.same.items():
            blobs[digest].link_count, blobs[digest].allocated_bytes = blob.link_count, blob.allocated_bytes
        blobs |= difference.unbelieved
        for digest, found in (difference.blobs[drift] for drift in confirmed & difference.blobs.keys()):
            index.drop_link(repo_id, digest)
            if found is not None:
                index.add_link(repo_id, digest, found)

    async def _forget_records(self, repo_id: RepoId, drifts: tuple[Drift, ...]) -> None:
        for drift in drifts:
            if drift.kind is not DriftKind.SNAPSHOT_GONE:
                continue
            try:
                await self._core.pools.on_disk(self._core.manifests.remove, SnapshotId(repo_id, Commit(drift.what)))
            except OSError as error:  # it goes with the next start
                log.warning("record cannot be removed", repo_id=repo_id, commit=drift.what, why=str(error))

    def _tell(self, repo_id: RepoId, confirmed: set[Drift]) -> None:
        kinds: defaultdict[DriftKind, list[str]] = defaultdict(list)
        for drift in sorted(confirmed):
            kinds[drift.kind].append(drift.what)
        for kind, names in kinds.items():
            log.warning("drift", repo_id=repo_id, kind=kind.value, what=names[:_NAMED], count=len(names))
            self._core.observe(DriftFound(kind.value, len(names)))


@dataclass(frozen=True, slots=True)
class _Belief:
    """What was believed of a repository, to see whether anybody has changed it meanwhile, if only back again."""

    blobs: dict[Digest, Blob]
    snapshots: dict[Commit, tuple[Snapshot, SnapshotState]]
    refs: dict[Revision, Commit]

    @classmethod
    def of(cls, repo: Repo) -> _Belief:
        return cls(dict(repo.blobs), {c: (s, s.state) for c, s in repo.snapshots.items()}, dict(repo.refs))

    def holds(self, repo: Repo) -> bool:
        """The very same objects: what is published anew may look as it did before."""
        return (
            (len(self.blobs), len(self.snapshots), self.refs) == (len(repo.blobs), len(repo.snapshots), repo.refs)
            and all(repo.blobs.get(digest) is blob for digest, blob in self.blobs.items())
            and all(repo.snapshots.get(c) is s and s.state is state for c, (s, state) in self.snapshots.items())
        )


def _see(core: Core, repo_id: RepoId, known: _Belief) -> _Seen:
    """Blocking. Raises FileNotFoundError where hub/ itself is not the one that we keep, or something goes meanwhile."""
    _check_hub(core)
    found = scan_repo(core.layout, repo_id) or FoundRepo(repo_id)
    _check_hub(core)  # all is gone where hub/ is: that is no drift of its repositories
    fresh = found.snapshots.keys() - known.snapshots.keys() or found.blobs.keys() - known.blobs.keys()
    return _Seen(found, core.manifests.of(repo_id) if fresh else {})


def _check_hub(core: Core) -> None:
    if not core.hub_is_ours():
        raise FileNotFoundError(core.layout.hub)

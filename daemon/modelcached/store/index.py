"""What is believed to be on the disk, in memory. Changed only on the event loop, from what disk threads report.

Belief is checked against the disk (stat) before it is answered from.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId
from modelcached.store.manifests import BlobStamp, Record
from modelcached.store.scan import BLOCK, FoundBlob, FoundRepo


class SnapshotState(enum.Enum):
    """Whether a snapshot can be answered from."""

    READY = "ready"
    UNVERIFIED = "unverified"
    CONDEMNED = "condemned"


@dataclass(slots=True)
class Blob:
    """One name of a finished blob."""

    stamp: BlobStamp
    allocated_bytes: int
    link_count: int
    """st_nlink: names of the inode anywhere on the filesystem, ours or not."""
    verified: bool
    foreign: bool = False
    """Somebody else could write it, or it is a link: copied and verified before it is used."""
    path: str | None = None
    """Where a foreign blob's bytes are."""

    @classmethod
    def verified_now(cls, status: os.stat_result) -> Blob:
        """A blob that this daemon has just published."""
        return cls(BlobStamp.of(status), status.st_blocks * BLOCK, status.st_nlink, verified=True)

    @classmethod
    def found(cls, blob: FoundBlob, stamp: BlobStamp | None, path: str, own_uid: int) -> Blob:
        """A blob that a scan found; verified if it still looks as it did when it was."""
        now = BlobStamp.of(blob.status)
        foreign = blob.shared_target is not None or blob.writable_by_others(own_uid)
        return cls(
            now,
            blob.status.st_blocks * BLOCK,
            blob.status.st_nlink,
            verified=now == stamp and not foreign,
            foreign=foreign,
            path=(blob.shared_target or path) if foreign else None,
        )


@dataclass(slots=True)
class Snapshot:
    """One cached commit."""

    id: SnapshotId
    links: dict[str, Digest]
    """Path -> blob, of what the directory holds."""
    record: Record | None
    """Ours; None for a snapshot that somebody else wrote."""
    state: SnapshotState
    digests: frozenset[Digest] = field(init=False)
    """The blobs it needs; kept, for evicting asks every snapshot about every blob."""

    def __post_init__(self) -> None:
        """``links`` never changes: a snapshot that grows is another one."""
        self.digests = frozenset(self.links.values())


def state_of(record: Record | None, links: Mapping[str, Digest], blobs: Mapping[Digest, Blob]) -> SnapshotState:
    """What may be believed of a snapshot that holds those links: all that its record says is complete is there."""
    whole = (
        record is not None
        and bool(record.selections)
        and all(
            links.get(path) == record.manifest.files[path].digest
            and (blob := blobs.get(record.manifest.files[path].digest)) is not None
            and blob.verified
            for path in record.paths
        )
    )
    return SnapshotState.READY if whole else SnapshotState.UNVERIFIED


@dataclass(slots=True)
class Repo:
    """One repository's part of the cache."""

    blobs: dict[Digest, Blob] = field(default_factory=dict)
    snapshots: dict[Commit, Snapshot] = field(default_factory=dict)
    refs: dict[Revision, Commit] = field(default_factory=dict)


class Index:
    """All repositories. Not thread-safe; the event loop's alone."""

    def __init__(self) -> None:
        self.repos: dict[RepoId, Repo] = {}

    def repo(self, repo_id: RepoId) -> Repo:
        """The repository's part, made when missing."""
        return self.repos.setdefault(repo_id, Repo())

    def snapshot(self, snapshot: SnapshotId) -> Snapshot | None:
        """The snapshot, whatever its state."""
        repo = self.repos.get(snapshot.repo_id)
        return repo.snapshots.get(snapshot.commit) if repo else None

    def snapshots(self) -> Iterator[Snapshot]:
        """All snapshots, whatever their state."""
        for repo in self.repos.values():
            yield from repo.snapshots.values()

    def blob(self, repo_id: RepoId, digest: Digest) -> Blob | None:
        """The repository's name of that digest."""
        repo = self.repos.get(repo_id)
        return repo.blobs.get(digest) if repo else None

    def add_link(self, repo_id: RepoId, digest: Digest, blob: Blob) -> None:
        """Believes in one more name of an inode; all its names now know how many there are."""
        before = self.repo(repo_id).blobs.get(digest)
        if before is not None and before.stamp.inode != blob.stamp.inode:
            self.drop_link(repo_id, digest)  # another took its place
        self.repo(repo_id).blobs[digest] = blob
        for other in self._names(digest, blob.stamp.inode):
            other.link_count = blob.link_count

    def drop_link(self, repo_id: RepoId, digest: Digest) -> Blob | None:
        """Believes in one name less, and returns it; those that are left know it."""
        blob = self.repo(repo_id).blobs.pop(digest, None)
        if blob is not None:
            for other in self._names(digest, blob.stamp.inode):
                other.link_count -= 1
        return blob

    def restore_link(self, repo_id: RepoId, digest: Digest, blob: Blob) -> None:
        """Takes back a ``drop_link``: the name is still there."""
        others = list(self._names(digest, blob.stamp.inode))
        if others:
            blob.link_count = others[0].link_count + 1
        self.add_link(repo_id, digest, blob)

    def _names(self, digest: Digest, inode: int) -> Iterator[Blob]:
        for repo in self.repos.values():
            blob = repo.blobs.get(digest)
            if blob is not None and blob.stamp.inode == inode:
                yield blob

    def doubt(self, digest: Digest, inode: int) -> None:
        """The inode was found bad: none of its names is believed any more until it is hashed."""
        for name in self._names(digest, inode):
            name.verified = False

    def donor(self, digest: Digest) -> RepoId | None:
        """A repository that has the digest, verified and safe to link to."""
        for repo_id, repo in self.repos.items():
            blob = repo.blobs.get(digest)
            if blob is not None and blob.verified and not blob.foreign:
                return repo_id
        return None

    def revisions(self, snapshot: SnapshotId) -> list[Revision]:
        """Branches and tags that point at it."""
        repo = self.repos.get(snapshot.repo_id)
        return sorted(r for r, commit in repo.refs.items() if commit == snapshot.commit) if repo else []

    def needed(self, repo_id: RepoId, digest: Digest, *, without: SnapshotId) -> bool:
        """Some other snapshot of the repository links to the blob."""
        return any(
            snapshot.id != without and snapshot.state is not SnapshotState.CONDEMNED and digest in snapshot.digests
            for snapshot in self.repo(repo_id).snapshots.values()
        )

    def load(self, found: FoundRepo, records: dict[Commit, Record], own_uid: int, repo_path: str) -> None:
        """Believes what a scan found of one repository."""
        repo = Repo(refs=dict(found.refs))
        stamps: dict[Digest, BlobStamp] = {}
        for known_record in records.values():
            stamps |= known_record.stamps
        for digest, item in found.blobs.items():
            repo.blobs[digest] = Blob.found(item, stamps.get(digest), f"{repo_path}/blobs/{digest.hex}", own_uid)
        for commit, links in found.snapshots.items():
            known = {path: digest for path, digest in links.items() if digest is not None}
            snapshot_id, record = SnapshotId(found.repo_id, commit), records.get(commit)
            state = state_of(record, known, repo.blobs)
            repo.snapshots[commit] = Snapshot(snapshot_id, known, record, state)
        if repo.blobs or repo.snapshots or repo.refs:
            self.repos[found.repo_id] = repo
        else:
            self.repos.pop(found.repo_id, None)

"""What is believed to be on the disk, in memory. Changed only on the event loop, from what disk threads report.

Belief is checked against the disk (stat) before it is answered from.
"""

from __future__ import annotations

import enum
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, made
from modelcached.store.manifests import BlobStamp, Record
from modelcached.store.measure import BLOCK
from modelcached.store.scan import FoundBlob, FoundRepo


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

    @property
    def inode(self) -> int:
        """Its number."""
        return self.stamp.inode

    @classmethod
    def verified_now(cls, status: os.stat_result) -> Blob:
        """A blob that this daemon has just published."""
        return cls(BlobStamp.of(status), status.st_blocks * BLOCK, status.st_nlink, verified=True)

    @classmethod
    def found(cls, found: FoundBlob, stamp: BlobStamp | None, foreign_path: str | None) -> Blob:
        """A blob that a scan found; verified if it still looks as it did when it was, and is our own."""
        now = made(BlobStamp, found[:3])
        if foreign_path is not None:
            return cls(now, found.allocated_bytes, found.link_count, verified=False, foreign=True, path=foreign_path)
        if now == stamp:  # the record's own, for there are many
            return cls(stamp, found.allocated_bytes, found.link_count, verified=True)
        return cls(now, found.allocated_bytes, found.link_count, verified=False)


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
    folders: int = field(init=False)
    """Directories that its links lie in."""

    def __post_init__(self) -> None:
        """``links`` never changes: a snapshot that grows is another one."""
        self.digests = frozenset(self.links.values())
        self.folders = len({path.rpartition("/")[0] for path in self.links})


@dataclass(slots=True)
class Repo:
    """One repository's part of the cache."""

    blobs: dict[Digest, Blob] = field(default_factory=dict)
    snapshots: dict[Commit, Snapshot] = field(default_factory=dict)
    refs: dict[Revision, Commit] = field(default_factory=dict)

    def shared(self) -> Counter[Digest]:
        """By how many snapshots that are not going, besides one, each blob is linked to; most by none."""
        shared = Counter[Digest]()
        if len(self.snapshots) < 2:  # as nearly all are, and a list asks each of thousands
            return shared
        seen = set[Digest]()
        for snapshot in self.snapshots.values():
            if snapshot.state is not SnapshotState.CONDEMNED:
                shared.update(snapshot.digests & seen)
                seen |= snapshot.digests
        return shared


def state_of(record: Record | None, links: Mapping[str, Digest], blobs: Mapping[Digest, Blob]) -> SnapshotState:
    """What may be believed of a snapshot that holds those links: all that its record says is complete is there."""
    if record is None or not record.selections:
        return SnapshotState.UNVERIFIED
    files = record.manifest.files
    for path in record.paths:
        digest = files[path].digest
        blob = blobs.get(digest)
        if links.get(path) != digest or blob is None or not blob.verified:
            return SnapshotState.UNVERIFIED
    return SnapshotState.READY


class Index:
    """All repositories. Not thread-safe; the event loop's alone."""

    def __init__(self) -> None:
        self.repos: dict[RepoId, Repo] = {}
        self._homes: dict[Digest, tuple[RepoId, ...]] = {}
        """Repositories that have, or once had, a blob: where to look for another name of it."""

    def repo(self, repo_id: RepoId) -> Repo:
        """The repository's part, made when missing."""
        found = self.repos.get(repo_id)
        if found is None:
            found = self.repos[repo_id] = Repo()
        return found

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
        """Believes in one more name of an inode; all its names now know how many there are.

        One more than was believed, not what stat said: that counts names, too, which are condemned and about to go.
        """
        before = self.blob(repo_id, digest)
        again = before is not None and before.stamp.inode == blob.stamp.inode
        if before is not None and not again:
            self.drop_link(repo_id, digest)  # another took its place
        known = next((other.link_count for other in self._names(digest, blob.stamp.inode)), None)
        if known is not None:
            blob.link_count = known if again else known + 1
        self.repo(repo_id).blobs[digest] = blob
        homes = self._homes.get(digest, ())
        if repo_id not in homes:
            self._homes[digest] = (*homes, repo_id)
        for other in self._names(digest, blob.stamp.inode):
            other.link_count = blob.link_count

    def drop_link(self, repo_id: RepoId, digest: Digest) -> Blob | None:
        """Believes in one name less, and returns it; those that are left know it."""
        blob = self.repo(repo_id).blobs.pop(digest, None)
        if blob is None:
            return None
        if homes := tuple(home for home in self._homes.pop(digest, ()) if home != repo_id):
            self._homes[digest] = homes
        for other in self._names(digest, blob.stamp.inode):
            other.link_count -= 1
        return blob

    def _names(self, digest: Digest, inode: int) -> Iterator[Blob]:
        for repo_id in self._homes.get(digest, ()):
            blob = self.blob(repo_id, digest)
            if blob is not None and blob.stamp.inode == inode:
                yield blob

    def has_inode(self, digest: Digest, inode: int) -> bool:
        """Whether the inode has any name here."""
        return next(self._names(digest, inode), None) is not None

    def doubt(self, digest: Digest, inode: int) -> None:
        """The inode was found bad: none of its names is believed any more until it is hashed."""
        for name in self._names(digest, inode):
            name.verified = False

    def donors(self, digest: Digest) -> list[RepoId]:
        """Repositories that have the digest, verified and safe to link to, as believed."""
        return [
            repo_id
            for repo_id in self._homes.get(digest, ())
            if (blob := self.blob(repo_id, digest)) is not None and blob.verified and not blob.foreign
        ]

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

    def load(self, found: FoundRepo, records: dict[Commit, Record], repo_path: str) -> None:
        """Believes what a scan found of one repository."""
        repo = Repo(refs=dict(found.refs))
        stamps: dict[Digest, BlobStamp] = {}
        for known_record in records.values():
            stamps |= known_record.stamps
        here = (found.repo_id,)
        for digest, seen in found.blobs.items():
            stamp = stamps.get(digest)
            if seen[:3] == stamp and not seen.writable_by_others and digest not in found.shared:  # as nearly all are
                blob = Blob(stamp, seen.allocated_bytes, seen.link_count, True)
            else:
                blob = Blob.found(seen, stamp, found.foreign_path(digest, repo_path))
            repo.blobs[digest] = blob
            homes = self._homes.setdefault(digest, here)
            if found.repo_id not in homes:
                self._homes[digest] = homes + here
        for commit, links in found.snapshots.items():
            record = records.get(commit)
            repo.snapshots[commit] = Snapshot(
                SnapshotId(found.repo_id, commit),
                links,
                # Blobs have the stamps from here on; publishing makes new ones of theirs.
                replace(record, stamps={}) if record is not None else None,
                state_of(record, links, repo.blobs),
            )
        if repo.blobs or repo.snapshots or repo.refs:
            self.repos[found.repo_id] = repo
        else:
            self.repos.pop(found.repo_id, None)

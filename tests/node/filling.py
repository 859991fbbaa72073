"""A cache directory as years of use leave it, in seconds: for tests and figures that need many models, not large ones.

The daemon's own stores write it, with nothing synced; only blobs, of which there are most, are written directly.
What they hold is what their names promise.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelcached.ledger import database as state
from modelcached.ledger.clock import Clock
from modelcached.ledger.leases import LeasedModel, LeaseKind
from modelcached.ledger.use import Pin, UseLedger
from modelcached.model import (
    Algorithm,
    Commit,
    Digest,
    FileEntry,
    Manifest,
    RepoId,
    Revision,
    Selection,
    SnapshotId,
)
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.manifests import BlobStamp, ManifestStore, Record
from modelcached.store.owner import prepare
from modelcached.store.snapshots import SnapshotStore

MAIN = Revision("main")


@dataclass(frozen=True)
class Filling:
    """How much of everything. Two commits a repository: an old one, and the one that ``main`` names."""

    repos: int = 1000
    files: int = 50
    """In each snapshot."""
    weights: int = 20
    """Of those, how many are LFS files; the others are small ones."""
    kept: int = 10
    """Of those, how many did not change from the old commit to the new one."""
    linked: int = 3
    """Of those, how many the repository before has too, as the same inode."""
    leased: int = 500
    """Snapshots that a workload uses."""
    pinned: int = 50
    """Repositories whose ``main`` an operator keeps."""

    @property
    def snapshots(self) -> int:
        return 2 * self.repos

    @property
    def links(self) -> int:
        """Files that readers see."""
        return self.snapshots * self.files


class _Unsynced(Disk):
    """A power loss may cost all of it."""

    def sync(self, descriptor: int, path: str) -> None:
        del descriptor, path

    def sync_directory(self, path: str) -> None:
        del path


@dataclass(frozen=True)
class _Content:
    """Of one file."""

    path: str
    data: bytes
    lfs: bool

    @property
    def entry(self) -> FileEntry:
        git = hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()
        if not self.lfs:
            return FileEntry(self.path, len(self.data), Digest(Algorithm.GIT_SHA1, git), git)
        digest = Digest(Algorithm.SHA256, hashlib.sha256(self.data).hexdigest())
        return FileEntry(self.path, len(self.data), digest, git, hashlib.sha256(digest.hex.encode()).hexdigest())


def repo_ids(filling: Filling) -> list[RepoId]:
    return [RepoId(f"org-{number % 40}/model-{number:04d}") for number in range(filling.repos)]


def snapshots(repo_id: RepoId) -> tuple[SnapshotId, SnapshotId]:
    """The old one, and that which ``main`` names."""
    old, new = (hashlib.sha1(f"{repo_id} {age}".encode()).hexdigest() for age in ("old", "new"))
    return SnapshotId(repo_id, Commit(old)), SnapshotId(repo_id, Commit(new))


def fill(cache_dir: Path, filling: Filling) -> Layout:
    """Fills an empty directory."""
    layout = Layout(str(cache_dir))
    disk = _Unsynced()
    prepare(disk, layout)
    manifests, published = ManifestStore(disk, layout), SnapshotStore(disk, layout)
    before: RepoId | None = None
    for repo_id in repo_ids(filling):
        os.makedirs(os.path.dirname(layout.blob(repo_id, Digest(Algorithm.GIT_SHA1, ""))))
        for snapshot in snapshots(repo_id):
            contents = list(_contents(filling, snapshot))
            entries = [content.entry for content in contents]
            stamps = {}
            for number, (content, entry) in enumerate(zip(contents, entries, strict=True)):
                donor = before if number < filling.linked else None
                stamps[entry.digest] = _write(layout, repo_id, entry.digest, content.data, donor)
            whole = snapshot == snapshots(repo_id)[1]
            record = _record(snapshot, entries, stamps, whole=whole)
            published.publish(snapshot, {entry.path: entry.digest for entry in entries}, may_gap=True)
            manifests.write(record)
            if whole:
                published.write_tree(record.manifest)
                published.write_ref(repo_id, MAIN, snapshot.commit)
        before = repo_id
    _state(layout, filling)
    return layout


def _contents(filling: Filling, snapshot: SnapshotId) -> Iterator[_Content]:
    """The first files are every repository's, the next those of both commits."""
    for number in range(filling.files):
        whose = "every" if number < filling.linked else snapshot.repo_id
        if number >= filling.kept:
            whose = str(snapshot)
        lfs = number >= filling.files - filling.weights
        shard = number - filling.files + filling.weights + 1
        name = f"model-{shard:05d}-of-{filling.weights:05d}.safetensors" if lfs else f"part-{number:03d}.json"
        folder = "" if lfs or number % 3 else "tokenizer/"
        yield _Content(f"{folder}{name}", f"{whose} {name}".encode(), lfs)


def _write(layout: Layout, repo_id: RepoId, digest: Digest, data: bytes, donor: RepoId | None) -> BlobStamp:
    path = layout.blob(repo_id, digest)
    try:
        if donor is not None:
            os.link(layout.blob(donor, digest), path)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            os.write(descriptor, data)
            os.close(descriptor)
    except FileExistsError:  # of the old commit
        pass
    return BlobStamp.of(os.lstat(path))


def _record(snapshot: SnapshotId, entries: list[FileEntry], stamps: dict[Digest, BlobStamp], *, whole: bool) -> Record:
    paths = frozenset(entry.path for entry in entries)
    selections = {"vllm": Selection("vllm", "safetensors", paths)}
    if whole:
        selections["full"] = Selection("full", "any", paths)
    else:  # the repository had one more, which nobody asked for
        entries = [*entries, _Content("README.md", str(snapshot).encode(), lfs=False).entry]
    return Record(Manifest.of(snapshot.repo_id, snapshot.commit, entries), selections, stamps)


def _state(layout: Layout, filling: Filling) -> None:
    """Used one after the other, each repository's old commit first."""
    connection = state.connect(layout.state_db)
    contents = state.contents(connection)
    database = state.Database(connection)
    use = UseLedger(database, contents, Clock.system(), reconnect_grace_seconds=60)
    pairs = [snapshots(repo_id) for repo_id in repo_ids(filling)]
    for snapshot in [snapshot for pair in pairs for snapshot in pair]:
        use.named(snapshot.repo_id, MAIN, snapshot.commit)
        database.write_later(use.touch(snapshot))
    for number in range(filling.leased):
        snapshot = pairs[-1 - number][1] if number < filling.repos else pairs[number - filling.repos][0]
        model = LeasedModel(snapshot, MAIN if number < filling.repos else "")
        lease, statements = use.lease(LeaseKind.TTL, f"host-{number}", (model,), ttl_seconds=86400)
        del lease
        database.write_later(*statements)
    for _, new in pairs[: filling.pinned]:
        database.write_later(use.pin(Pin(new.repo_id, MAIN)))
    database.write_later(state.COMPLETE)
    database.close()

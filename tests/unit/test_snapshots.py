"""I1 stopped at each change of the disk: a reader who looks just then sees the old set, the new one, or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from modelcached.cache import eviction
from modelcached.model import Algorithm, Commit, Digest, RepoId, Revision, SnapshotId
from modelcached.store.disk import Disk
from modelcached.store.index import Snapshot, SnapshotState
from modelcached.store.layout import Layout
from modelcached.store.owner import BALLAST_BYTES, Ballast, prepare
from modelcached.store.partials import PartialStore
from modelcached.store.scan import regular_status
from modelcached.store.snapshots import SnapshotStore
from modelcached.transfer.hashing import new_hasher

SNAPSHOT = SnapshotId(RepoId("org/name"), Commit("c" * 40))
FILES = {f"{folder}file-{n}": f"{folder}{n}".encode() for folder in ("", "one/", "one/two/") for n in range(3)}
SMALL = {path: content for path, content in FILES.items() if path.startswith("one/") or path.endswith("0")}


def digest_of(content: bytes) -> Digest:
    blank = Digest(Algorithm.SHA256, "0" * 64)
    hasher = new_hasher(blank, len(content))
    hasher.update(content)
    return Digest(Algorithm.SHA256, hasher.hexdigest())


class World:
    """A store whose disk shows, before each change, what a reader sees at that moment."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(str(root / "cache"))
        self.seen: list[Mapping[str, bytes] | None] = []
        prepare(Disk(), self.layout)
        self.disk = Disk(lambda _operation, _path: self.seen.append(self.look()))
        self.snapshots = SnapshotStore(self.disk, self.layout)
        partials = PartialStore(self.disk, self.layout, "this boot")
        for content in FILES.values():
            partials.publish_small(SNAPSHOT.repo_id, digest_of(content), content)
        self.seen.clear()

    def look(self) -> Mapping[str, bytes] | None:
        """By name, as every reader does; FileNotFoundError where a link leads nowhere."""
        top = Path(self.layout.snapshot(SNAPSHOT))
        if not os.path.lexists(top):
            return None
        return {
            os.path.relpath(os.path.join(where, name), top): Path(where, name).read_bytes()
            for where, _, names in os.walk(top)
            for name in names
        }

    def publish(self, files: Mapping[str, bytes]) -> None:
        links = {path: digest_of(content) for path, content in files.items()}
        self.snapshots.publish(SNAPSHOT, links, may_gap=False)

    def only_saw(self, *allowed: Mapping[str, bytes] | None) -> None:
        assert len(self.seen) > 5
        assert [one for one in self.seen if one not in allowed] == []
        self.seen.clear()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_first_publication_is_nothing_and_then_all(world: World) -> None:
    world.publish(SMALL)
    world.only_saw(None, SMALL)
    assert world.look() == SMALL


def test_growth_is_the_old_set_and_then_the_new_one(world: World) -> None:
    world.publish(SMALL)
    world.seen.clear()
    world.publish(FILES)
    world.only_saw(SMALL, FILES)
    assert world.look() == FILES


def test_an_eviction_is_all_and_then_nothing(world: World) -> None:
    world.publish(FILES)
    world.snapshots.write_ref(SNAPSHOT.repo_id, Revision("main"), SNAPSHOT.commit)
    world.seen.clear()
    links = {path: digest_of(content) for path, content in FILES.items()}
    core = SimpleNamespace(
        snapshots=world.snapshots,
        disk=world.disk,
        layout=world.layout,
        manifests=SimpleNamespace(remove=lambda *_: 0),
    )
    snapshot = Snapshot(SNAPSHOT, links, None, SnapshotState.CONDEMNED)
    trashed, _ = eviction._withdraw_from_disk(core, snapshot, {Revision("main"): None})
    eviction._clean_disk(core, SNAPSHOT, dict.fromkeys(links.values()), trashed, last=True)
    world.only_saw(FILES, None)
    assert world.look() is None
    assert not os.path.exists(world.layout.repo(SNAPSHOT.repo_id))


def test_a_filesystem_that_cannot_exchange_leaves_a_leased_snapshot_as_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(SMALL)
    monkeypatch.setattr(Disk, "exchange", lambda _self, _one, _other: False)
    world.seen.clear()
    with pytest.raises(Exception, match="cannot exchange directories"):
        world.publish(FILES)
    world.only_saw(SMALL)
    assert world.look() == SMALL
    assert os.listdir(world.layout.staging) == []


class Refuses:
    """Refuses one operation on paths that hold a text, from its nth time on."""

    def __init__(self, operation: str, part: str, first: int = 1) -> None:
        self._refused, self._left = (operation, part), first

    def __call__(self, operation: str, path: str) -> None:
        if operation == self._refused[0] and self._refused[1] in path:
            self._left -= 1
            if self._left <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)


@pytest.mark.parametrize("refuses", [Refuses("exchange", "snapshots/"), Refuses("fsync", "staging/")])
def test_growth_that_fails_before_its_last_step_leaves_the_old_set_and_no_staging(
    world: World, refuses: Refuses
) -> None:
    world.publish(SMALL)
    world.snapshots = SnapshotStore(Disk(refuses), world.layout)
    with pytest.raises(OSError, match="Input/output error"):
        world.publish(FILES)
    assert world.look() == SMALL
    assert os.listdir(world.layout.staging) == os.listdir(world.layout.trash) == []


def test_growth_whose_old_set_cannot_be_moved_away_has_happened(world: World) -> None:
    world.publish(SMALL)
    links = {path: digest_of(content) for path, content in FILES.items()}
    store = SnapshotStore(Disk(Refuses("rename", "trash/")), world.layout)
    left = store.publish(SNAPSHOT, links, may_gap=False)
    assert world.look() == FILES
    assert left is not None
    assert os.path.dirname(left) == world.layout.staging, "the caller removes it from there as well"


def test_a_gap_that_cannot_be_closed_is_undone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(SMALL)
    monkeypatch.setattr(Disk, "exchange", lambda _self, _one, _other: False)
    links = {path: digest_of(content) for path, content in FILES.items()}
    refuses = Refuses("rename", "snapshots/")

    def once(operation: str, path: str) -> None:
        try:
            refuses(operation, path)
        except OSError:
            monkeypatch.setattr(refuses, "_refused", ("none", ""))
            raise

    with pytest.raises(OSError, match="Input/output error"):
        SnapshotStore(Disk(once), world.layout).publish(SNAPSHOT, links, may_gap=True)
    assert world.look() == SMALL
    assert os.listdir(world.layout.staging) == os.listdir(world.layout.trash) == []


def test_a_withdrawal_that_might_not_last_is_undone(world: World) -> None:
    """A power loss could show the snapshot again, with its blobs gone."""
    world.publish(SMALL)
    with pytest.raises(OSError, match="Input/output error"):
        SnapshotStore(Disk(Refuses("fsync", "snapshots")), world.layout).withdraw(SNAPSHOT)
    assert world.look() == SMALL


@pytest.mark.parametrize("operation", ["append", "chmod", "fsync", "rename"])
def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(world: World, operation: str) -> None:
    world.snapshots.write_ref(SNAPSHOT.repo_id, Revision("main"), SNAPSHOT.commit)
    part = "refs/" if operation == "rename" else "staging/"
    store = SnapshotStore(Disk(Refuses(operation, part)), world.layout)
    with pytest.raises(OSError, match="Input/output error"):
        store.write_ref(SNAPSHOT.repo_id, Revision("main"), Commit("d" * 40))
    assert store.says(SNAPSHOT.repo_id, Revision("main"), SNAPSHOT.commit)
    assert os.listdir(world.layout.staging) == []


def test_a_link_that_cannot_be_put_in_place_leaves_nothing_beside_it(world: World) -> None:
    store = SnapshotStore(Disk(Refuses("rename", "blobs/")), world.layout)
    with pytest.raises(OSError, match="Input/output error"):
        store.link_blob(digest_of(FILES["file-0"]), SNAPSHOT.repo_id, RepoId("org/other"))
    assert os.listdir(world.layout.staging) == []


def test_a_ballast_without_blocks_is_made_anew(world: World) -> None:
    ballast = Ballast(Disk(), world.layout)
    path = Path(world.layout.private, "ballast")
    path.touch()  # killed between its name and its blocks
    assert ballast.fill()
    assert path.stat().st_blocks * 512 >= BALLAST_BYTES
    inode = path.stat().st_ino
    assert ballast.fill()
    assert path.stat().st_ino == inode


def test_a_file_that_the_disk_cannot_show_is_not_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = world.layout.blob(SNAPSHOT.repo_id, digest_of(FILES["file-0"]))
    assert regular_status(path) is not None
    assert regular_status(path + "x") is None
    assert regular_status(os.path.dirname(path)) is None

    def fails(path: str) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "lstat", fails)
    with pytest.raises(OSError, match="Input/output error"):
        regular_status(path)


def test_quarantine_keeps_a_bad_blob_for_a_while(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    Path(layout.quarantine).mkdir(parents=True)
    bad = Path(layout.quarantine) / ("0" * 64)
    bad.write_bytes(b"bad")
    store = SnapshotStore(Disk(), layout)
    assert store.empty(layout.quarantine, before=bad.stat().st_ctime) == []
    assert bad.exists()
    assert store.empty(layout.quarantine, before=float("inf")) == [bad.name]
    assert not bad.exists()

"""A disk that fails with EIO, call by call, through FUSE: said by name, harmless, and over when it is well again.

Invariants 1, 5, 7 and 8. Paths are those that the filesystem sees; see tests/node/passthrough.py.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.disks import FaultyDisk
from tests.node.standing import SIZE, WEIGHTS, Standing, states

FAILED = ("STORAGE_ERROR", 74)
EIO = os.strerror(errno.EIO)

StandOn = Callable[..., Standing]


@dataclass(frozen=True)
class Call:
    """One call on the way of a model, by operation and glob over paths."""

    operation: str
    pattern: str
    after: int = 0
    """Calls of its kind that succeed before."""
    leaves_residue: bool = False
    """What cannot be removed stays until the next start."""
    condemns: bool = False
    """What has come cannot be believed, and is fetched anew."""

    def of(self, standing: Standing, repo_id: str) -> str:
        """The glob, with the names that the model's files and folders will have."""
        files = standing.hub.find_repo(repo_id).files()
        return self.pattern.format(
            weights=files[WEIGHTS].etag,
            config=files["config.json"].etag,
            commit=standing.commits[repo_id],
            folder=f"models--{repo_id.replace('/', '--')}",
        )


CALLS = {
    "the journal is made": Call("create", "*/partial/{weights}.journal"),
    "the journal's first line is written": Call("write", "*/partial/{weights}.journal"),
    "blocks are allocated": Call("fallocate", "*/partial/{weights}"),
    "weights are written": Call("write", "*/partial/{weights}"),
    "weights are read back to be hashed": Call("read", "*/partial/{weights}", condemns=True),
    "weights are synced": Call("fsync", "*/partial/{weights}", condemns=True),
    "weights get their name": Call("rename", "*/blobs/{weights}"),
    "the weights' directory is synced": Call("fsyncdir", "*/{folder}/blobs", after=2),
    "the journal is removed": Call("unlink", "*/partial/{weights}.journal", leaves_residue=True),
    "a small file is written": Call("write", "*/staging/*-{config}"),
    "a small file is synced": Call("fsync", "*/staging/*-{config}"),
    "a small file's directory is synced": Call("fsyncdir", "*/{folder}/blobs"),
    "a small file gets its name": Call("rename", "*/blobs/{config}"),
    "the snapshot is begun": Call("mkdir", "*/staging/*-{commit}"),
    "a link is made": Call("symlink", "*/staging/*-{commit}/*"),
    "the snapshot is synced": Call("fsyncdir", "*/staging/*-{commit}"),
    "the snapshot is shown": Call("rename", "*/snapshots/{commit}"),
    "the snapshots' directory is synced": Call("fsyncdir", "*/{folder}/snapshots"),
    "the record is written": Call("write", "*/staging/*-manifest"),
    "the record is synced": Call("fsync", "*/staging/*-manifest"),
    "the record gets its name": Call("rename", "*/manifests/*/{commit}.json"),
    "the ref is written": Call("write", "*/staging/*-ref"),
    "the ref gets its name": Call("rename", "*/{folder}/refs/main"),
}


class Worn:
    """A node on one disk that fails again and again; each test has models of its own there."""

    def __init__(self, disk: FaultyDisk, standing: Standing) -> None:
        self.disk = disk
        self.standing = standing
        self._numbers = itertools.count()

    def published(self) -> str:
        return self.standing.publish(f"model-{next(self._numbers)}")

    def cached(self) -> str:
        repo_id = self.published()
        self.standing.node.ensure(repo_id)
        self.standing.kept.append(repo_id)
        return repo_id


@pytest.fixture(scope="module")
def worn_disk(private_mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worn]:
    root = tmp_path_factory.mktemp("worn")
    with Hub() as hub, FaultyDisk(root / "disk") as disk:
        node = Node(root / "node", hub.endpoint, {"cache": {"dir": str(disk.path)}})
        try:
            standing = Standing(node.start(), hub)
            standing.keep("one")
            yield Worn(disk, standing)
        finally:
            node.stop()


@pytest.fixture
def worn(worn_disk: Worn) -> Iterator[Worn]:
    yield worn_disk
    worn_disk.disk.heal()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_on_the_way_of_a_model_fails(worn: Worn, call: Call) -> None:
    standing, disk = worn.standing, worn.disk
    wanted, leases = worn.published(), standing.leases()
    disk.fail(call.operation, call.of(standing, wanted), after=call.after)
    with standing.watched(wanted):
        standing.assert_refused(standing.ask(wanted), *FAILED, EIO)
        assert disk.heal()
        assert standing.leases() == leases
        disk.fail(call.operation, call.of(standing, wanted))
        standing.assert_alive()
        standing.assert_hits(*standing.kept[:2])
        disk.heal()
        if call.leaves_residue:
            standing.note_residue()
        standing.node.ensure(wanted)
    if call.condemns:
        assert standing.hub.body_bytes(wanted, WEIGHTS) == SIZE
    standing.kept.append(wanted)
    standing.assert_hits(wanted)
    standing.assert_tidy()


@pytest.mark.parametrize(
    ("operation", "pattern"),
    [
        ("getattr", "*/blobs/{weights}"),
        ("readlink", "*/snapshots/{commit}/*"),
        ("getattr", "*/snapshots/{commit}"),
        ("read", "*/{folder}/refs/main"),
    ],
)
def test_a_hit_cannot_be_looked_at(worn: Worn, operation: str, pattern: str) -> None:
    """What cannot be seen is not gone: it is neither fetched again nor forgotten."""
    standing, disk = worn.standing, worn.disk
    one, leases = worn.cached(), standing.leases()
    disk.fail(operation, Call(operation, pattern).of(standing, one))
    standing.hub.reset_counters()
    standing.assert_refused(standing.ask(one), *FAILED, EIO)
    assert disk.fired()
    standing.assert_nothing_fetched()
    assert standing.leases() == leases
    standing.assert_alive()
    disk.heal()
    standing.assert_hits(one)
    standing.assert_tidy()


def test_a_blob_at_rest_that_cannot_be_read_is_fetched_anew(worn: Worn) -> None:
    """What the disk has lost is put away, and that blob alone comes from upstream again."""
    standing, disk = worn.standing, worn.disk
    one = worn.cached()
    weights = standing.node.snapshot(one, standing.commits[one]) / WEIGHTS
    lost = weights.stat().st_ino
    os.utime(weights)  # no longer as it was when it was hashed
    disk.fail("read", Call("read", "*/blobs/{weights}").of(standing, one))
    standing.hub.reset_counters()
    standing.node.ensure(one)
    assert disk.fired()
    fetched = {(request.repo, request.file) for request in standing.hub.requests() if request.is_content}
    assert fetched == {(one, WEIGHTS)}
    assert standing.hub.body_bytes(one, WEIGHTS) == SIZE
    assert [path.stat().st_ino for path in (standing.node.private / "quarantine").iterdir()] == [lost]
    standing.assert_alive()
    disk.heal()
    standing.assert_hits(one)
    standing.assert_tidy()


def test_a_hits_lease_cannot_be_written(worn: Worn) -> None:
    standing, disk = worn.standing, worn.disk
    one = worn.cached()
    disk.fail("write", "*/state.db*")
    standing.assert_a_hit_is_refused(one, "state.db cannot be written")
    assert disk.fired()
    standing.assert_alive()
    disk.heal()
    standing.assert_hits(one)
    standing.assert_tidy()


@pytest.mark.parametrize(
    ("operation", "pattern"),
    [
        ("unlink", "*/{folder}/refs/main"),
        ("rename", "*/trash/*"),
        ("fsyncdir", "*/{folder}/snapshots"),
        ("unlink", "*/blobs/{weights}"),
        ("unlink", "*/manifests/{folder}/*"),
        ("unlink", "*/trash/*"),
    ],
)
def test_an_eviction_fails(worn: Worn, operation: str, pattern: str) -> None:
    """It says so; and afterwards the model can be asked for and evicted as if nothing had been."""
    standing, disk, node = worn.standing, worn.disk, worn.standing.node
    one = worn.cached()
    standing.kept.remove(one)
    standing.release(one)
    disk.fail(operation, Call(operation, pattern).of(standing, one))
    with standing.watched(one):
        done = node.run("cachectl", "evict", one, "--yes")
        assert (done.returncode, EIO in done.stderr) == (74, True), done.stderr
        assert disk.fired()
        standing.assert_alive()
        if node.visible(one):
            assert states(node)[one] == "ready", "it is all there"
        else:
            assert one not in states(node)
        disk.heal()
        if pattern == "*/trash/*":
            standing.note_residue()
        node.assert_disk_truth()
        node.ensure(one)
    standing.assert_hits(one)
    standing.release(one)
    node.ctl("evict", one, "--yes")
    assert node.visible(one) == []
    assert list(node.snapshot(one, "").parent.glob("blobs/*")) == []
    standing.assert_tidy()


def test_status_answers_whatever_cannot_be_looked_at(worn: Worn) -> None:
    standing, disk = worn.standing, worn.disk
    disk.fail("getattr", "*/owner.lock")  # among what status looks at each time
    assert standing.node.status().models
    assert disk.fired()
    assert any(EIO in why for why in standing.node.status().degraded)
    standing.assert_alive()
    disk.heal()
    standing.assert_tidy()


def test_of_all_these_failures_nothing_is_left_and_nothing_was_lost(worn: Worn) -> None:
    """The last word on the disk that they shared, before and after a kill."""
    worn.standing.assert_recovered()


def test_a_filesystem_that_cannot_allocate_ahead_is_used_and_named(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = FaultyDisk(tmp_path / "disk")
    standing = stand_on(disk, "one")
    disk.fail("fallocate", "*", "EOPNOTSUPP")
    wanted = standing.publish("wanted")
    standing.node.ensure(wanted)
    assert any("cannot allocate ahead" in why for why in standing.node.status().degraded)
    standing.assert_recovered(wanted, says="cannot allocate ahead")


def test_a_filesystem_that_cannot_exchange_directories_grows_what_nobody_reads(
    hub: Hub, stand_on: StandOn, tmp_path: Path
) -> None:
    disk = FaultyDisk(tmp_path / "disk")
    standing = stand_on(disk, "one")
    disk.fail("exchange", "*", "EINVAL")
    notes = Synthetic(MIB, 3)
    repo_id = "org/growing"
    commit = hub.create_repo(repo_id).commit({"config.json": b"{}", WEIGHTS: Synthetic(SIZE, 4), "notes.bin": notes})
    standing.node.ensure(repo_id)
    leased = standing.ask(repo_id, "--profile", "full")
    standing.assert_refused(leased, "IN_USE", 75, "cannot exchange directories")
    snapshot = standing.node.snapshot(repo_id, commit)
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", WEIGHTS]
    standing.node.release_all()
    standing.node.ensure(repo_id, "--profile", "full")
    assert hashlib.sha256((snapshot / "notes.bin").read_bytes()).hexdigest() == notes.sha256()
    standing.assert_recovered()


def test_a_filesystem_without_locks_is_refused_by_name(hub: Hub, tmp_path: Path, private_mounts: None) -> None:
    """Two daemons on one cache could not be told apart there."""
    with FaultyDisk(tmp_path / "disk", locks=True) as disk:
        disk.fail("flock", "*", "ENOSYS")
        node = Node(tmp_path / "node", hub.endpoint, {"cache": {"dir": str(disk.path)}})
        try:
            node.start(wait=False)
            assert node.process is not None
            assert node.process.wait(30) == 74
        finally:
            node.stop()
        (told,) = node.log_lines("cannot start")
        assert "owner.lock" in told["why"], told
        assert os.strerror(errno.ENOSYS) in told["why"], told

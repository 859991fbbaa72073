"""Belief is brought to the disk by merging: what others did is found twice and counted once, what we do never."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelcached.cache import Core, rescan
from modelcached.cache.rescan import Look, Rescan
from modelcached.events import DriftFound, Event
from modelcached.ledger.leases import LeasedModel, LeaseKind
from modelcached.ledger.victims import Name
from modelcached.model import Commit, RepoId, Revision, SnapshotId, repo_folder
from modelcached.store.index import SnapshotState

from tests.node.core import a_core, believe, digest_of, put_blob, put_snapshot

REPO = RepoId("org/name")
OLD, NEW = SnapshotId(REPO, Commit("a" * 40)), SnapshotId(REPO, Commit("b" * 40))
FILES = {"config.json": b"{}", "deep/weights": b"w" * 5000}
WEIGHTS = digest_of(FILES["deep/weights"])
MAIN = Revision("main")


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def core(tmp_path: Path, events: list[Event]) -> Iterator[Core]:
    """One snapshot, whole and believed."""
    with a_core(tmp_path, events) as core:
        put_snapshot(core, OLD, FILES)
        believe(core, REPO, {OLD: FILES})
        assert core.index.repo(REPO).snapshots[OLD.commit].state is SnapshotState.READY
        yield core


@pytest.fixture
def looking(core: Core) -> Rescan:
    return Rescan(core, lambda _digest: False)


def put_ref(core: Core, revision: Revision, commit: Commit) -> None:
    Path(core.layout.ref(REPO, revision)).write_text(commit)


def lead_elsewhere(path: Path, elsewhere: Path) -> None:
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


async def twice(looking: Rescan) -> dict[str, list[str]]:
    """What two looks have made of it: nothing may be believed after the first."""
    first = await looking.look(REPO)
    assert first.drifts == ()
    second = await looking.look(REPO)
    assert not second.again
    found: dict[str, list[str]] = {}
    for drift in second.drifts:
        found.setdefault(drift.kind.value, []).append(drift.what)
    return found


def blob(core: Core) -> Path:
    return Path(core.layout.blob(REPO, WEIGHTS))


def state_of(core: Core, snapshot: SnapshotId = OLD) -> SnapshotState | None:
    known = core.index.snapshot(snapshot)
    return known.state if known is not None else None


async def test_at_rest_nothing_differs(core: Core, looking: Rescan, events: list[Event]) -> None:
    assert await looking.look(REPO) == Look(again=False)
    assert events == []
    assert core.space.area_bytes(repo_folder(REPO)) > 5000, "looked at, and counted"


async def test_a_blob_that_is_gone_makes_its_snapshot_unverified(
    core: Core, looking: Rescan, events: list[Event]
) -> None:
    blob(core).unlink()
    first = await looking.look(REPO)
    assert first == Look(again=True)
    assert (state_of(core), events) == (SnapshotState.READY, []), "once is not enough"
    second = await looking.look(REPO)
    assert [(drift.kind.value, drift.what) for drift in second.drifts] == [("blob_gone", WEIGHTS.hex)]
    assert events == [DriftFound("blob_gone", 1)]
    assert (state_of(core), core.index.blob(REPO, WEIGHTS)) == (SnapshotState.UNVERIFIED, None)
    assert core.index.repo(REPO).snapshots[OLD.commit].record is not None
    assert await looking.look(REPO) == Look(again=False), "counted once"


async def test_what_is_back_before_the_second_look_was_no_drift(core: Core, looking: Rescan) -> None:
    blob(core).rename(blob(core).with_name("away"))
    assert (await looking.look(REPO)).again
    blob(core).with_name("away").rename(blob(core))
    assert await looking.look(REPO) == Look(again=False)
    blob(core).rename(blob(core).with_name("away"))
    assert await looking.look(REPO) == Look(again=True), "suspected anew"
    assert state_of(core) is SnapshotState.READY


async def test_a_blob_that_comes_back_as_it_was_verified_is_believed(core: Core, looking: Rescan) -> None:
    blob(core).rename(blob(core).with_name("away"))
    await twice(looking)
    blob(core).with_name("away").rename(blob(core))
    assert await twice(looking) == {"blob_found": [WEIGHTS.hex]}
    assert state_of(core) is SnapshotState.READY


async def test_a_blob_that_was_written_to_is_believed_no_more(core: Core, looking: Rescan) -> None:
    path = blob(core)
    path.chmod(0o644)
    path.write_bytes(b"other")
    assert await twice(looking) == {"blob_changed": [WEIGHTS.hex]}
    known = core.index.blob(REPO, WEIGHTS)
    assert known is not None
    assert (known.verified, known.foreign, known.stamp.size_bytes) == (False, False, 5)
    assert state_of(core) is SnapshotState.UNVERIFIED


async def test_a_blob_that_others_may_write_to_from_now_on_is_theirs(core: Core, looking: Rescan) -> None:
    blob(core).chmod(0o666)
    assert await twice(looking) == {"blob_changed": [WEIGHTS.hex]}
    known = core.index.blob(REPO, WEIGHTS)
    assert known is not None
    assert (known.verified, known.foreign, known.path) == (False, True, str(blob(core)))


async def test_what_nobody_believed_may_change_unsaid(core: Core, looking: Rescan) -> None:
    """A bad blob's other names are touched by the daemon itself when it is put away."""
    known = core.index.blob(REPO, WEIGHTS)
    assert known is not None
    core.index.doubt(WEIGHTS, known.stamp.inode)
    os.utime(blob(core))
    assert await looking.look(REPO) == Look(again=False)
    now = core.index.blob(REPO, WEIGHTS)
    assert now is not None
    assert now.stamp.mtime_ns == blob(core).stat().st_mtime_ns
    assert not now.verified
    assert state_of(core) is SnapshotState.UNVERIFIED


async def test_names_that_others_gave_an_inode_are_counted_unsaid(core: Core, looking: Rescan, tmp_path: Path) -> None:
    os.link(blob(core), tmp_path / "theirs")
    assert await looking.look(REPO) == Look(again=False)
    known = core.index.blob(REPO, WEIGHTS)
    assert known is not None
    assert (known.link_count, known.verified) == (2, True)


async def test_a_snapshot_that_is_gone_is_forgotten_with_its_record(core: Core, looking: Rescan) -> None:
    core.use.touch(OLD)
    shutil.rmtree(core.layout.snapshot(OLD))
    assert await twice(looking) == {"snapshot_gone": [OLD.commit]}
    assert state_of(core) is None
    assert OLD not in core.use.usage
    assert core.manifests.read(REPO, OLD.commit) is None
    assert core.index.blob(REPO, WEIGHTS) is not None


async def test_a_repository_that_is_gone_leaves_nothing(core: Core, looking: Rescan) -> None:
    await looking.look(REPO)
    shutil.rmtree(core.layout.repo(REPO))
    found = await twice(looking)
    assert {kind: len(names) for kind, names in found.items()} == {"blob_gone": 2, "snapshot_gone": 1, "ref_gone": 1}
    assert REPO not in core.index.repos
    assert core.space.area_bytes(repo_folder(REPO)) == 0


async def test_a_link_that_is_gone_makes_its_snapshot_unverified(core: Core, looking: Rescan) -> None:
    os.unlink(f"{core.layout.snapshot(OLD)}/config.json")
    assert await twice(looking) == {"snapshot_changed": [OLD.commit]}
    known = core.index.repo(REPO).snapshots[OLD.commit]
    assert (set(known.links), known.state) == ({"deep/weights"}, SnapshotState.UNVERIFIED)
    assert known.record is not None


async def test_what_somebody_brings_is_found_and_not_believed(core: Core, looking: Rescan) -> None:
    put_snapshot(core, NEW, {**FILES, "more": b"more"})
    found = await twice(looking)
    assert found == {
        "blob_found": [digest_of(b"more").hex],
        "ref_moved": ["main"],
        "snapshot_found": [NEW.commit],
    }
    assert (state_of(core, NEW), state_of(core)) == (SnapshotState.UNVERIFIED, SnapshotState.READY)
    known = core.index.blob(REPO, digest_of(b"more"))
    assert known is not None
    assert not known.verified


async def test_what_others_may_write_to_is_found_as_theirs(core: Core, looking: Rescan) -> None:
    path = put_blob(core, REPO, b"theirs")
    path.chmod(0o664)
    assert await twice(looking) == {"blob_found": [path.name]}
    known = core.index.blob(REPO, digest_of(b"theirs"))
    assert known is not None
    assert (known.foreign, known.path) == (True, str(path))


async def test_a_lease_by_branch_follows_what_others_have_pointed_it_to(core: Core, looking: Rescan) -> None:
    put_snapshot(core, NEW, FILES, branch="other")
    await twice(looking)
    core.use.lease(LeaseKind.TTL, "somebody", (LeasedModel(OLD, "main"),), ttl_seconds=60)
    assert core.use.protections(NEW, core.refs()) == []
    put_ref(core, MAIN, NEW.commit)
    assert await twice(looking) == {"ref_moved": ["main"]}
    assert [protection.kind for protection in core.use.protections(NEW, core.refs())] == ["leased"]
    assert core.use.formerly(REPO, MAIN)[0] == NEW.commit
    os.unlink(core.layout.ref(REPO, MAIN))
    assert await twice(looking) == {"ref_gone": ["main"]}
    assert core.use.protections(NEW, core.refs()) == []


# What the daemon itself is doing


async def test_a_repository_that_a_request_is_about_to_use_is_looked_at_later(core: Core, looking: Rescan) -> None:
    blob(core).unlink()
    await looking.look(REPO)
    with core.use.hold([OLD], frozenset({Name(REPO, WEIGHTS)})):
        for _ in range(3):
            assert await looking.look(REPO) == Look(again=True)
        assert core.index.blob(REPO, WEIGHTS) is not None
    assert await twice(looking) == {"blob_gone": [WEIGHTS.hex]}, "what was seen before the request counts no more"


async def test_a_repository_of_which_something_is_evicted_is_looked_at_later(core: Core, looking: Rescan) -> None:
    shutil.rmtree(core.layout.snapshot(OLD))
    await looking.look(REPO)
    core.evictions[OLD] = asyncio.create_task(asyncio.sleep(0, 0))
    assert await looking.look(REPO) == Look(again=True)
    await core.evictions.pop(OLD)
    assert state_of(core) is SnapshotState.READY


async def test_nobody_removes_anything_while_it_is_merged(core: Core, looking: Rescan) -> None:
    async with core.removing(REPO):
        look = asyncio.create_task(looking.look(REPO))
        await asyncio.sleep(0.05)
        assert not look.done()
        blob(core).unlink()
        core.index.drop_link(REPO, WEIGHTS)
    assert await look == Look(again=False)


async def test_a_condemned_snapshot_stays_condemned(core: Core, looking: Rescan) -> None:
    core.index.repo(REPO).snapshots[OLD.commit].state = SnapshotState.CONDEMNED
    shutil.rmtree(core.layout.snapshot(OLD))
    assert await looking.look(REPO) == Look(again=False)
    assert state_of(core) is SnapshotState.CONDEMNED


async def test_what_changes_while_we_look_is_looked_at_again(
    core: Core, looking: Rescan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole request has come and gone between the look and its end: no hold shows that."""
    shutil.rmtree(core.layout.snapshot(OLD))
    await looking.look(REPO)
    scan = rescan.scan_repo

    def publishing_meanwhile(*arguments: object) -> object:
        found = scan(*arguments)  # type: ignore[arg-type]
        put_snapshot(core, OLD, FILES)
        believe(core, REPO, {OLD: FILES})
        return found

    monkeypatch.setattr(rescan, "scan_repo", publishing_meanwhile)
    assert await looking.look(REPO) == Look(again=True)
    assert state_of(core) is SnapshotState.READY
    monkeypatch.undo()
    assert await looking.look(REPO) == Look(again=False)


async def test_a_blob_in_flight_is_no_strangers(core: Core, events: list[Event]) -> None:
    """A transfer that nobody waits for any more lands all the same, and is believed a moment later."""
    flying = digest_of(b"flying")
    looking = Rescan(core, lambda digest: digest == flying)
    put_blob(core, REPO, b"flying")
    for _ in range(2):
        assert await looking.look(REPO) == Look(again=False)
    assert (core.index.blob(REPO, flying), events) == (None, [])


# What nobody can see


async def test_a_disk_that_does_not_answer_changes_no_belief(
    core: Core, looking: Rescan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(rescan, "scan_repo", fails)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            await looking.look(REPO)
    assert state_of(core) is SnapshotState.READY


async def test_nothing_is_gone_from_a_hub_that_is_not_ours(core: Core, looking: Rescan, events: list[Event]) -> None:
    status = os.stat(core.layout.hub)
    core.hub_at = (status.st_dev, status.st_ino)
    os.rename(core.layout.hub, f"{core.layout.cache_dir}/old")
    for _ in range(3):
        assert await looking.look(REPO) == Look(again=True)
    os.mkdir(core.layout.hub)
    for _ in range(3):
        assert await looking.look(REPO) == Look(again=True)
    assert (state_of(core), events) == (SnapshotState.READY, [])


async def test_a_symlink_in_its_place_is_not_followed(core: Core, looking: Rescan, tmp_path: Path) -> None:
    lead_elsewhere(Path(core.layout.repo(REPO)), tmp_path / "elsewhere")
    found = await twice(looking)
    assert set(found) == {"blob_gone", "snapshot_gone", "ref_gone"}

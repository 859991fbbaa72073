"""A disk that is really full (ENOSPC, EDQUOT, no inodes): said by name, harmless, and over when there is room again.

Invariants 1, 4, 7 and 8. Where blocks run out and where inodes do, it is another writer who takes the last of them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub
from tests.node.disks import Btrfs, Disk, Ext4, Tmpfs, fill_blocks
from tests.node.standing import WEIGHTS, Standing, states

SIZE = 16 * MIB
RATE = 8 * MIB
LOST_BYTES = 4 * MIB
"""What may have been in sockets when a transfer ended."""
FULL = ("NO_SPACE_NOW", 75)

StandOn = Callable[..., Standing]


@pytest.mark.parametrize("extents", [True, False], ids=["allocated ahead", "no room to allocate ahead"])
def test_another_writer_fills_the_disk_in_mid_transfer(
    hub: Hub, stand_on: StandOn, tmp_path: Path, extents: bool
) -> None:
    disk = Ext4(tmp_path / "disk", extents=extents)
    standing = stand_on(disk, "one", "two")
    wanted, leases = standing.publish("wanted", SIZE), standing.leases()
    hub.rate = RATE
    with standing.watched(wanted, *standing.kept):
        caller = standing.begin(wanted, SIZE // 4)
        disk.fill()
        standing.assert_ended(caller, *FULL, "full", "No space left on device")
        assert standing.leases() == leases
        standing.assert_alive()
        standing.assert_readable()
        hub.rate = None
        disk.empty()
        standing.node.ensure(wanted)
    assert hub.body_bytes(wanted, WEIGHTS) <= SIZE + LOST_BYTES, "what was done was kept"
    degraded = list(standing.node.status().degraded)
    if not extents:
        assert any("cannot allocate ahead" in why for why in degraded), degraded
    standing.assert_recovered(wanted, says="" if extents else "cannot allocate ahead")


def test_a_full_disk_admits_nothing_new_and_a_hit_is_given_the_ballast(
    hub: Hub, stand_on: StandOn, tmp_path: Path
) -> None:
    disk = Ext4(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    wanted = standing.publish("wanted", SIZE)
    disk.fill()
    hub.reset_counters()
    standing.assert_refused(standing.ask(wanted), *FULL, "the filesystem has", "cache.min_free")
    assert [request for request in hub.requests() if request.is_content] == []
    standing.assert_kept()
    standing.assert_alive()
    disk.empty()
    standing.assert_recovered(wanted)


def test_the_disk_is_full_when_a_hits_lease_is_committed(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """Whatever room is made for it, the other writer takes it."""
    disk = Ext4(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    one = standing.kept[0]
    _until_a_hit_is_refused(standing, one, lambda: fill_blocks(disk.mount))
    standing.assert_a_hit_is_refused(one, "state.db cannot be written", "full")
    standing.assert_alive()
    standing.assert_readable()
    disk.empty()
    standing.assert_recovered(standing.publish("wanted", SIZE))


def _until_a_hit_is_refused(standing: Standing, repo_id: str, fill: Callable[[], None]) -> None:
    for _ in range(20):
        fill()
        asked = standing.ask(repo_id)
        if asked.exit_status:
            standing.assert_refused(asked, "STORAGE_ERROR", 74, "state.db")
            return
    raise AssertionError("there was always room for one lease more")


def test_a_daemon_that_is_killed_on_a_full_disk_starts_there_again(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = Ext4(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    wanted, leases = standing.publish("wanted", SIZE), standing.leases()
    hub.rate = RATE
    caller = standing.begin(wanted, SIZE // 4)
    disk.fill()
    standing.restart()
    caller.kill()
    caller.communicate()
    hub.rate = None
    assert standing.leases() == leases
    standing.assert_alive()
    disk.empty()
    standing.assert_recovered(wanted)


def test_eviction_makes_room_on_a_full_disk(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """What has to be written for it must not need what it frees."""
    disk = Ext4(tmp_path / "disk")
    standing = stand_on(disk, "oldest", "leased", size_bytes=8 * MIB)
    standing.node.release_all()
    standing.node.ensure("org/leased")
    disk.fill()
    wanted = standing.publish("wanted", 6 * MIB)
    standing.node.ensure(wanted)
    assert states(standing.node) == {"org/leased": "ready", wanted: "ready"}
    standing.kept.remove("org/oldest")
    standing.assert_recovered(wanted)


def test_no_inode_is_left_in_mid_transfer(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = Tmpfs(tmp_path / "disk", inodes=300)
    standing = stand_on(disk, "one", "two")
    wanted, leases = standing.publish("wanted", SIZE), standing.leases()
    hub.rate = RATE
    with standing.watched(wanted, *standing.kept):
        caller = standing.begin(wanted, SIZE // 4)
        disk.fill()
        standing.assert_ended(caller, *FULL, "inode")
        assert standing.node.visible(wanted) == []
        assert standing.leases() == leases
        standing.assert_alive()
        standing.assert_kept()
        hub.rate = None
        disk.empty()
        hub.reset_counters()
        standing.node.ensure(wanted)
    assert hub.body_bytes(wanted, WEIGHTS) <= LOST_BYTES, "all of it had come"
    standing.assert_recovered(wanted)


def test_no_inode_is_left_before_the_start(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """A hit needs none, nor does an eviction."""
    disk = Tmpfs(tmp_path / "disk", inodes=300)
    standing = stand_on(disk, "one", "two", "three")
    wanted = standing.publish("wanted", SIZE)
    disk.fill()
    standing.assert_refused(standing.ask(wanted), *FULL, "inode")
    standing.assert_kept()
    standing.release("org/three")
    standing.node.ctl("evict", "org/three", "--yes")
    standing.kept.remove("org/three")
    standing.assert_alive()
    disk.empty()
    standing.assert_recovered(wanted)


def test_no_model_goes_for_inodes_that_it_cannot_give(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """Others have taken more of them than the cache has: without its models the node would be no better off."""
    disk = Tmpfs(tmp_path / "disk", inodes=300)
    standing = stand_on(disk, "one")
    node = standing.node
    standing.release("org/one")
    disk.fill()
    node.wait_until(lambda: any("0 inodes free" in why for why in node.status().degraded), 10, "it says so")
    turns = node.metric("modelcached_upkeep_runs_total", loop="watermarks")
    node.wait_until(lambda: node.metric("modelcached_upkeep_runs_total", loop="watermarks") > turns, 10, "a turn")
    assert states(node) == {"org/one": "ready"}
    disk.empty()
    standing.assert_recovered()


def _publish_many_files(hub: Hub, *names: str) -> None:
    for name in names:
        content = {f"folder/{number}.json": f"{name} {number}".encode() for number in range(100)}
        hub.create_repo(f"org/{name}").commit({**content, "model.safetensors": name.encode()})


def test_no_more_goes_for_inodes_than_must(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """They are promised before the first byte, like blocks; a model of many small files needs many."""
    disk = Tmpfs(tmp_path / "disk", inodes=2000)
    standing = stand_on(disk)
    node = standing.node
    _publish_many_files(hub, "a", "b", "c", "wanted", "more")
    for name in ("a", "b", "c"):
        node.ensure(f"org/{name}")
    node.release_all()
    others = [disk.mount / f"other-{number}" for number in range(os.statvfs(disk.mount).f_favail - 150)]
    for path in others:
        path.touch()
    node.ensure("org/wanted")
    held = dict.fromkeys(("org/b", "org/c", "org/wanted"), "ready")
    assert states(node) == held, "one was enough"
    node.ensure("org/b")
    node.ensure("org/c")
    hub.reset_counters()
    standing.assert_refused(standing.ask("org/more"), *FULL, "inodes more", "promised; 0 can be evicted")
    standing.assert_nothing_fetched()
    assert states(node) == held
    for path in others:
        path.unlink()
    node.ensure("org/more")
    assert node.status().reserved_bytes == 0
    node.assert_disk_truth()


def test_a_quota_is_reached_in_mid_transfer(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = Btrfs(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    wanted, leases = standing.publish("wanted", SIZE), standing.leases()
    hub.rate = RATE
    with standing.watched(wanted, *standing.kept):
        caller = standing.begin(wanted, SIZE // 4)
        disk.limit(disk.used_bytes())
        standing.assert_ended(caller, *FULL, "Disk quota exceeded")
        assert standing.node.visible(wanted) == []
        assert standing.leases() == leases
        standing.assert_alive()
        standing.assert_readable()
        hub.rate = None
        disk.limit(None)
        standing.node.ensure(wanted)
    standing.assert_recovered(wanted)


def test_a_quota_leaves_no_room_for_a_model(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """The filesystem itself shows plenty of free space."""
    disk = Btrfs(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    wanted = standing.publish("wanted", SIZE)
    disk.limit(disk.used_bytes() + SIZE // 2)
    hub.reset_counters()
    standing.assert_refused(standing.ask(wanted), *FULL, "Disk quota exceeded")
    assert hub.body_bytes(wanted, WEIGHTS) == 0
    standing.assert_alive()
    standing.assert_kept()
    disk.limit(None)
    standing.assert_recovered(wanted)


def test_a_quota_is_reached_when_a_hits_lease_is_committed(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = Btrfs(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    disk.limit(disk.used_bytes() + 2 * MIB)
    one = standing.kept[0]
    _until_a_hit_is_refused(standing, one, lambda: fill_blocks(disk.path))
    standing.assert_a_hit_is_refused(one, "state.db cannot be written")
    standing.assert_alive()
    standing.assert_readable()
    disk.limit(None)
    standing.assert_recovered(standing.publish("wanted", SIZE))


def test_an_eviction_makes_room_within_a_quota(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = Btrfs(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    standing.node.release_all()
    disk.limit(disk.used_bytes() + 2 * MIB)
    fill_blocks(disk.path)
    done = standing.node.run("cachectl", "evict", "org/one", "--yes")
    assert done.returncode == 0, done.stderr
    standing.kept.remove("org/one")
    standing.assert_alive()
    # btrfs counts what was unlinked against the quota until its transaction ends; the other model would go for that.
    subprocess.run(["sync", "-f", str(disk.path)], check=True)
    wanted = standing.publish("wanted")
    standing.assert_recovered(wanted)


def _fill_blocks(disk: Disk) -> None:
    assert isinstance(disk, Ext4)
    disk.fill()


def _fill_inodes(disk: Disk) -> None:
    assert isinstance(disk, Tmpfs)
    disk.fill()


def _use_up_quota(disk: Disk) -> None:
    assert isinstance(disk, Btrfs)
    disk.limit(disk.used_bytes())


@pytest.mark.parametrize(
    ("make", "squeeze"),
    [(Ext4, _fill_blocks), (lambda root: Tmpfs(root, inodes=300), _fill_inodes), (Btrfs, _use_up_quota)],
    ids=["blocks", "inodes", "quota"],
)
def test_what_nobody_uses_goes_for_a_transfer_that_meets_a_full_disk(
    hub: Hub, stand_on: StandOn, tmp_path: Path, make: Callable[[Path], Disk], squeeze: Callable[[Disk], None]
) -> None:
    """It goes on where it was, and what is leased stays."""
    disk = make(tmp_path / "disk")
    standing = stand_on(disk, "unused", "leased", size_bytes=4 * MIB)
    standing.release("org/unused")
    wanted = standing.publish("wanted", SIZE)
    hub.rate = RATE
    with standing.watched(wanted, "org/leased"):
        caller = standing.begin(wanted, SIZE // 4)
        squeeze(disk)
        _, stderr = caller.communicate(timeout=60)
        assert caller.returncode == 0, f"{stderr}\n{standing.node.log_text()[-4000:]}"
    assert hub.body_bytes(wanted, WEIGHTS) <= SIZE + LOST_BYTES
    assert states(standing.node) == {"org/leased": "ready", wanted: "ready"}
    standing.kept.remove("org/unused")
    standing.assert_recovered(wanted)

"""A disk that becomes read-only in mid-transfer: what is there is kept and read, nothing is condemned, and it ends.

``mount -o remount,ro`` itself the kernel refuses (EBUSY) while a daemon has state.db open. What happens in its stead:
ext4 with errors=remount-ro, which no remount brings back (Linux 6.15); a btrfs subvolume that is set read-only, where
files that were open can still be written; and a filesystem in FUSE that refuses every change, and comes back.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub
from tests.node.disks import Btrfs, Disk, Ext4, FaultyDisk
from tests.node.standing import WEIGHTS, Standing

SIZE = 16 * MIB
RATE = 8 * MIB
READ_ONLY = "Read-only file system"
FAILED = ("STORAGE_ERROR", 74)

StandOn = Callable[..., Standing]


class BtrfsSwitch:
    """A subvolume's property."""

    def __init__(self, root: Path) -> None:
        self.disk: Disk = Btrfs(root)

    def close(self) -> None:
        assert isinstance(self.disk, Btrfs)
        self.disk.set_read_only(True)

    def open(self) -> None:
        assert isinstance(self.disk, Btrfs)
        self.disk.set_read_only(False)


class FuseSwitch:
    """Every change is refused, on open files too."""

    def __init__(self, root: Path) -> None:
        self.disk: Disk = FaultyDisk(root)

    def close(self) -> None:
        assert isinstance(self.disk, FaultyDisk)
        self.disk.make_read_only()

    def open(self) -> None:
        assert isinstance(self.disk, FaultyDisk)
        self.disk.heal()


Switch = BtrfsSwitch | FuseSwitch


@pytest.fixture(params=[BtrfsSwitch, FuseSwitch], ids=["btrfs", "fuse"])
def switch(request: pytest.FixtureRequest, tmp_path: Path) -> Switch:
    return request.param(tmp_path / "disk")  # type: ignore[no-any-return]


def test_the_kernel_remounts_no_disk_that_a_daemon_writes_to(stand_on: StandOn, tmp_path: Path) -> None:
    """Why the other tests here are as they are."""
    disk = Ext4(tmp_path / "disk")
    stand_on(disk)
    done = subprocess.run(["mount", "-o", "remount,ro", str(disk.mount)], capture_output=True, text=True, check=False)
    assert (done.returncode, "busy" in done.stderr) == (32, True), done.stderr


def test_a_disk_becomes_read_only_in_mid_transfer_and_comes_back(hub: Hub, stand_on: StandOn, switch: Switch) -> None:
    standing = stand_on(switch.disk, "one", "two")
    wanted, leases = standing.publish("wanted", SIZE), standing.leases()
    hub.rate = RATE
    with standing.watched(wanted, *standing.kept):
        caller = standing.begin(wanted, SIZE // 4)
        switch.close()
        standing.assert_ended(caller, *FAILED, READ_ONLY)
        assert standing.node.visible(wanted) == []
        assert standing.leases() == leases
        standing.assert_alive()
        standing.assert_readable()
        hub.rate = None
        standing.assert_refused(standing.ask(wanted), *FAILED, READ_ONLY)
        switch.open()
        standing.node.ensure(wanted)
    standing.assert_recovered(wanted)


def test_what_cannot_be_evicted_from_a_read_only_disk_is_not_condemned(
    hub: Hub, stand_on: StandOn, switch: Switch
) -> None:
    standing = stand_on(switch.disk, "one", "two", size_bytes=SIZE, cache={"budget": f"{2 * SIZE + 8 * MIB}B"})
    node = standing.node
    node.release_all()
    wanted = standing.publish("wanted", SIZE)
    switch.close()
    with standing.watched(*standing.kept):
        done = node.run("cachectl", "evict", "org/one", "--yes")
        assert (done.returncode, READ_ONLY in done.stderr) == (74, True), done.stderr
        standing.assert_refused(standing.ask(wanted, "--timeout", "20s"), *FAILED, READ_ONLY)
        standing.assert_alive()
        switch.open()
        standing.assert_kept()
    node.release_all()
    node.ensure("org/two")
    node.ensure(wanted)
    standing.kept.remove("org/one")
    assert node.visible("org/one") == []
    standing.assert_recovered(wanted)


def test_a_hit_needs_a_lease_that_a_read_only_disk_cannot_keep(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    disk = FaultyDisk(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    disk.make_read_only()
    for repo_id in standing.kept:
        standing.assert_a_hit_is_refused(repo_id, "state.db cannot be written")
    standing.assert_alive()
    standing.assert_readable()
    disk.heal()
    standing.assert_recovered(standing.publish("wanted"))


def test_a_filesystem_contradicts_itself_in_mid_transfer(hub: Hub, stand_on: StandOn, tmp_path: Path) -> None:
    """ext4, errors=remount-ro. Until it is checked and mounted again nothing can be written.

    What was not synced is lost, as with the power: of state.db's log too, so that leases may come back as recovered.
    """
    disk = Ext4(tmp_path / "disk")
    standing = stand_on(disk, "one", "two")
    node = standing.node
    wanted, leases = standing.publish("wanted", SIZE), standing.leases()
    hub.rate = RATE
    with standing.watched(wanted, *standing.kept):
        caller = standing.begin(wanted, SIZE // 4)
        disk.break_down()
        standing.assert_ended(caller, *FAILED, READ_ONLY)
        assert node.visible(wanted) == []
        assert standing.leases() == leases
        standing.assert_a_hit_is_refused("org/one", "state.db cannot be written")
        done = node.run("cachectl", "evict", "org/two", "--yes")
        assert done.returncode == 75, "it is leased"
        standing.assert_alive()
        standing.assert_readable()
    came = hub.body_bytes(wanted, WEIGHTS)
    assert node.terminate() == 0, "it ends as it should although it can write nothing"
    disk.repair()
    hub.rate = None
    standing.started_again()
    for repo_id in standing.kept:
        assert node.run("cachectl", "evict", repo_id, "--yes").returncode == 75, "it is still in use"
    standing.assert_kept()
    node.ensure(wanted)
    assert came < SIZE
    node.ctl("release", "--recovered")
    standing.assert_recovered(wanted)

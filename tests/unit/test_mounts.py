"""Which directory is which, whatever it is called, and who has it mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from modelcached.store.mounts import Identity, holders, identity, is_mounted, mounts_below, remote_kind

POD = "11111111-2222-3333-4444-555555555555"


class Proc:
    """A /proc of a node's processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: dict[str, list[str]] = {}

    def mount(self, process: str, device: str, point: Path | str, kind: str = "ext4", source: str = "/") -> None:
        escaped = str(point).replace("\\", "\\134").replace(" ", "\\040")
        line = f"36 35 {device} {source} {escaped} rw,noatime shared:1 master:2 - {kind} /dev/root rw"
        self.lines.setdefault(process, []).append(line)
        directory = self.root / process
        (directory / "ns").mkdir(parents=True, exist_ok=True)
        (directory / "mountinfo").write_text("\n".join(self.lines[process]) + "\n")

    def process(self, pid: int, namespace: str, root: Path, comm: str = "python", cgroup: str = "") -> None:
        directory = self.root / str(pid)
        (directory / "ns").mkdir(parents=True, exist_ok=True)
        os.symlink(f"mnt:[{namespace}]", directory / "ns" / "mnt")
        os.symlink(root, directory / "root")
        (directory / "comm").write_text(f"{comm}\n")
        (directory / "cgroup").write_text(f"0::{cgroup}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path / "proc")


def test_a_directory_that_is_made_anew_is_another_one(tmp_path: Path) -> None:
    """Its inode's number is soon given to the next one."""
    path, seen, inodes = tmp_path / "hub", set(), set()
    for _ in range(20):
        path.mkdir()
        found = identity(str(path))
        assert found is not None
        assert found == identity(str(path)) == Identity.parse(str(found))
        seen.add(found)
        inodes.add(found.inode)
        path.rmdir()
    assert len(seen) == 20
    assert len(inodes) < 20, "or this proves nothing here"


def test_a_directory_is_the_same_wherever_it_goes_and_whatever_is_put_into_it(tmp_path: Path) -> None:
    path = tmp_path / "hub"
    path.mkdir()
    before = identity(str(path))
    path.rename(tmp_path / "old")
    (tmp_path / "old" / "file").touch()
    assert identity(str(tmp_path / "old")) == before
    path.symlink_to(tmp_path / "old")
    assert identity(str(path)) is None, "a link is no directory"
    assert identity(str(tmp_path / "none")) is None
    assert identity(str(tmp_path / "old" / "file" / "below")) is None


@pytest.mark.parametrize("text", ["", "1 2", "1 2 x", "1 2 3 4", "-1 2 3"])
def test_what_is_no_identity_is_none(text: str) -> None:
    assert Identity.parse(text) is None


def test_mounts_below_a_directory_are_found_by_the_path_it_was_asked_by(proc: Proc, tmp_path: Path) -> None:
    real, asked = tmp_path / "real", tmp_path / "asked"
    real.mkdir()
    asked.symlink_to(real)
    for point in (real, real / "models--a", real / "models--b" / "with space", tmp_path / "realm", "/"):
        proc.mount("self", "8:1", point)
    mounts = mounts_below(str(asked), str(proc.root))
    assert mounts == {f"{asked}/models--a", f"{asked}/models--b/with space"}
    found = {name: is_mounted(f"{asked}/{name}", mounts) for name in ("models--a", "models--b", "models--c", "models-")}
    assert found == {"models--a": True, "models--b": True, "models--c": False, "models-": False}


@pytest.mark.parametrize(
    ("kind", "remote"),
    [("ext4", False), ("xfs", False), ("btrfs", False), ("tmpfs", False), ("overlay", False), ("fuseblk", False),
     ("nfs", True), ("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("ceph", True), ("9p", True)],
)  # fmt: skip
def test_filesystems_that_others_change_are_known(proc: Proc, tmp_path: Path, kind: str, remote: bool) -> None:
    """The mount that holds the path says so: not one above, beside or below, nor one that is hidden."""
    cache = tmp_path / "cache"
    other = "ext4" if remote else "nfs4"
    for point in ("/", tmp_path, cache):
        proc.mount("self", "8:1", point, other)
    proc.mount("self", "8:1", cache, kind)
    for point in (tmp_path / "cach", cache / "hub" / "x"):
        proc.mount("self", "8:1", point, other)
    assert remote_kind(f"{cache}/hub", str(proc.root)) == (kind if remote else None)


def test_who_has_a_directory_mounted_is_named_once(proc: Proc, tmp_path: Path) -> None:
    old, new, pod_root = tmp_path / "old", tmp_path / "hub", tmp_path / "pod"
    for directory in (old, new, pod_root):
        directory.mkdir()
    (pod_root / "models").symlink_to(old)  # what the bind mount shows there
    (pod_root / "fresh").symlink_to(new)
    proc.mount("self", "8:1", "/")
    kubelet = f"/kubepods.slice/kubepods-burstable-pod{POD.replace('-', '_')}.slice/cri-containerd-0.scope"
    for pid in (200, 201):
        proc.process(pid, "2000", pod_root, "vllm", kubelet)
        proc.mount(str(pid), "8:1", "/models")
        proc.mount(str(pid), "8:1", "/fresh")
        proc.mount(str(pid), "8:1", "/gone")
    proc.process(300, "3000", pod_root, "elsewhere")
    proc.mount("300", "0:99", "/models", "nfs4")  # another filesystem is not even asked
    (proc.root / "400").mkdir()  # one that goes at this moment
    found = identity(str(old))
    assert found is not None
    (holder,) = holders(found, str(tmp_path), str(proc.root))
    assert str(holder) == f"process 200 (vllm, pod {POD}) at /models"

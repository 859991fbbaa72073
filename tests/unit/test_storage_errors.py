"""I7: what the disk refuses is told with the file and with what has run out; what it does not show is not gone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from modelcached.errors import Reason
from modelcached.model import Algorithm, Commit, Digest, RepoId, SnapshotId
from modelcached.store.disk import Disk, storage_error
from modelcached.store.layout import Layout, link_text
from modelcached.store.scan import snapshot_stamps

SNAPSHOT = SnapshotId(RepoId("org/name"), Commit("a" * 40))
DIGEST = Digest(Algorithm.SHA256, "b" * 64)


class Statvfs(NamedTuple):
    f_files: int
    f_favail: int


def refusal(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code), path) if path else OSError(code, os.strerror(code))


def test_a_full_disk_is_told_from_one_that_fails() -> None:
    full = storage_error(refusal(errno.ENOSPC, "/nowhere/file"), "writing")
    assert full.reason is Reason.NO_SPACE_NOW
    assert full.text == (
        "the filesystem below cache.dir is full while writing /nowhere/file: No space left on device; "
        "evict models, or remove what others keep there"
    )
    quota = storage_error(refusal(errno.EDQUOT, "/nowhere/file"), "writing")
    assert (quota.reason, "the quota below cache.dir is used up" in quota.message) == (Reason.NO_SPACE_NOW, True)
    failed = storage_error(refusal(errno.EIO, "/nowhere/file"), "writing")
    assert failed.reason is Reason.STORAGE_ERROR
    assert failed.message == "writing /nowhere/file failed: Input/output error"
    assert [error.metadata["errno"] for error in (full, quota, failed)] == ["ENOSPC", "EDQUOT", "EIO"]


@pytest.mark.parametrize(("files", "left", "told"), [(300, 0, True), (300, 1, False), (0, 0, False)])
def test_inodes_that_have_run_out_are_named(monkeypatch: pytest.MonkeyPatch, files: int, left: int, told: bool) -> None:
    """A filesystem that makes them as it goes (btrfs) says that it has none at all."""
    monkeypatch.setattr(os, "statvfs", lambda _path: Statvfs(files, left))
    error = storage_error(refusal(errno.ENOSPC, "/cache/partial/file"), "transferring")
    assert ("has none of its 300 inodes left" in error.message) is told


def test_calls_on_descriptors_name_the_file() -> None:
    disk, descriptor = Disk(), os.open("/dev/full", os.O_RDWR)
    pipe, writes = os.pipe()
    os.write(writes, b"x")
    try:
        for write in (
            lambda: disk.append(descriptor, b"x", "/cache/journal"),
            lambda: disk.write_at(descriptor, memoryview(b"x"), 0, "/cache/journal"),
            lambda: disk.write_from_pipe(descriptor, pipe, 1, 0, "/cache/journal"),
        ):
            with pytest.raises(OSError, match="No space left on device: '/cache/journal'"):
                write()
        for sync in (disk.sync, disk.sync_data):
            with pytest.raises(OSError, match="Invalid argument: '/cache/journal'"):
                sync(descriptor, "/cache/journal")
    finally:
        for opened in (descriptor, pipe, writes):
            os.close(opened)


@pytest.mark.parametrize("call", ["readlink", "lstat"])
@pytest.mark.parametrize(("code", "is_gone"), [(errno.ENOENT, True), (errno.EIO, False)])
def test_what_a_disk_does_not_show_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, is_gone: bool
) -> None:
    layout = Layout(str(tmp_path))
    for path in (layout.blob(SNAPSHOT.repo_id, DIGEST), f"{layout.snapshot(SNAPSHOT)}/file"):
        os.makedirs(os.path.dirname(path))
    Path(layout.blob(SNAPSHOT.repo_id, DIGEST)).touch()
    link = f"{layout.snapshot(SNAPSHOT)}/file"
    os.symlink(link_text("file", DIGEST), link)
    assert snapshot_stamps(layout, SNAPSHOT, {"file": DIGEST})["file"] is not None
    asked, fails = getattr(os, call), {link, layout.blob(SNAPSHOT.repo_id, DIGEST)}

    def fail(path: str) -> object:
        if path in fails:
            raise OSError(code, os.strerror(code), path)
        return asked(path)

    monkeypatch.setattr(os, call, fail)
    if is_gone:
        assert snapshot_stamps(layout, SNAPSHOT, {"file": DIGEST}) == {"file": None}
    else:
        with pytest.raises(OSError, match="Input/output error"):
            snapshot_stamps(layout, SNAPSHOT, {"file": DIGEST})

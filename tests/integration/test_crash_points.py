"""I1, I5 and I8: the whole daemon, killed by SIGKILL just before one call that changes the disk, and started again.

Every call is tried in tests/crash, without a daemon; these are those where most is at stake.
"""

from __future__ import annotations

import hashlib
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub, Synthetic, git_blob_sha1
from tests.node import Node
from tests.node.announcing import announcing

FILES = {
    "config.json": b"{}",
    "model.safetensors": Synthetic(5 * MIB, seed=1),
    "nested/deep/tokenizer.json": b"[]",
}
DIGEST = "[0-9a-f]{64}"
ENSURING = {
    "its second step is to be journalled": (r"append .*\.journal$", 3),
    "it is to be published": (f"rename .*/blobs/{DIGEST}$", 1),
    "its journal is to go": (rf"unlink .*/{DIGEST}\.journal$", 2),
    "the snapshot is to be shown": ("rename .*/snapshots/", 1),
    "the record is to be written": ("rename .*/manifests/", 1),
    "the branch is to be named": ("rename .*/refs/main$", 1),
}
EVICTING = {
    "the snapshot is to be withdrawn": ("rename .*/trash/", 1),
    "the blob is to go": (f"unlink .*/blobs/{DIGEST}$", 1),
    "the trash is to be emptied": ("rmdir .*/trash/", 1),
}


def assert_truth(node: Node, repo_id: str, commit: str) -> list[str]:
    """What a reader sees is whole and right, and every ref leads to it; the commits that are there."""
    repo = node.hub_dir / f"models--{repo_id.replace('/', '--')}"
    seen = node.visible(repo_id)
    assert seen in ([], [commit])
    for path in FILES if seen else ():
        content = (node.snapshot(repo_id, commit) / path).read_bytes()
        name = (node.snapshot(repo_id, commit) / path).resolve().name
        assert name == (hashlib.sha256(content).hexdigest() if len(name) == 64 else git_blob_sha1(content))
    for ref in (repo / "refs").iterdir() if (repo / "refs").is_dir() else ():
        assert ref.read_text() in seen
    return seen


def assert_tidy(node: Node) -> None:
    """Nothing is on its way, and what status shows is what du shows."""
    for name in ("staging", "trash", "partial"):
        assert os.listdir(node.private / name) == []
    node.assert_disk_truth()


def died(node: Node) -> None:
    """By its own hand, at the call that was named."""
    assert node.process is not None
    assert node.process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize("moment", ENSURING)
def test_killed_while_a_model_is_made_whole(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path, moment: str
) -> None:
    commit = hub.create_repo("org/model").commit(FILES)
    node = make_node()
    node.program, usual = announcing(tmp_path / "announced", *ENSURING[moment]), node.program
    node.start()
    caller = node.popen("ensure-model", "--profile", "full", "org/model")
    died(node)
    assert_truth(node, "org/model", commit)
    node.program = usual
    node.start()
    _, told = caller.communicate(timeout=60)
    assert caller.returncode == 0, told
    assert assert_truth(node, "org/model", commit) == [commit]
    assert_tidy(node)
    sent = sum(r.bytes_sent for r in hub.requests() if r.is_content and r.file == "model.safetensors")
    if "published" in moment or "journal is to go" in moment or "to be written" in moment:
        assert sent == FILES["model.safetensors"].size, "what was finished is not fetched again"  # type: ignore[attr-defined]


@pytest.mark.parametrize("moment", EVICTING)
def test_killed_while_a_model_is_evicted(hub: Hub, make_node: Callable[..., Node], tmp_path: Path, moment: str) -> None:
    commit = hub.create_repo("org/model").commit(FILES)
    node = make_node().start()
    node.ensure("--profile", "full", "org/model")
    node.release_all()
    assert node.terminate() == 0
    node.program, usual = announcing(tmp_path / "announced", *EVICTING[moment]), node.program
    node.start()
    evictor = node.popen("cachectl", "evict", "org/model", "--yes")
    died(node)
    evictor.communicate()
    assert_truth(node, "org/model", commit)
    node.program = usual
    node.start()
    assert_tidy(node)
    node.ensure("--profile", "full", "org/model")
    assert assert_truth(node, "org/model", commit) == [commit]
    assert_tidy(node)
    node.release_all()
    node.ctl("evict", "org/model", "--yes")
    assert os.listdir(node.hub_dir) == []
    assert os.listdir(node.private / "manifests") == []
    assert_tidy(node)


def test_killed_while_a_snapshot_grows(hub: Hub, make_node: Callable[..., Node], tmp_path: Path) -> None:
    commit = hub.create_repo("org/model").commit(FILES)
    node = make_node()
    node.program, usual = announcing(tmp_path / "announced", "exchange .*/snapshots/"), node.program
    node.start()
    node.ensure("org/model", "--include", "*.json")
    before = sorted(os.listdir(node.snapshot("org/model", commit)))
    caller = node.popen("ensure-model", "--profile", "full", "org/model")
    died(node)
    assert sorted(os.listdir(node.snapshot("org/model", commit))) == before, "a reader sees the old set"
    node.program = usual
    node.start()
    assert caller.wait(60) == 0
    caller.communicate()
    assert assert_truth(node, "org/model", commit) == [commit]
    assert_tidy(node)


def test_killed_while_it_makes_its_directories_under_a_narrow_umask(
    make_node: Callable[..., Node], tmp_path: Path
) -> None:
    """A directory that was made and not yet opened to others would stay closed to every workload."""
    node = make_node()
    node.wrapper = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
    node.program, usual = announcing(tmp_path / "announced", ".", 2), node.program
    node.start(wait=False)
    died(node)
    node.program = usual
    node.start()
    assert stat.S_IMODE(node.cache_dir.stat().st_mode) == 0o755
    assert stat.S_IMODE(node.hub_dir.stat().st_mode) == 0o755
    assert stat.S_IMODE(node.private.stat().st_mode) == 0o700

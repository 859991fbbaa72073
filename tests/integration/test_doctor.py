"""cachectl doctor finds what is wrong, and says what to do; on a node that is well it finds nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modelcached.doctor import node as surroundings
from modelcached.doctor.finding import Level
from modelcached.store.memory import smallest_limit_bytes

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node

CHECKS = {
    "daemon",
    "directory",
    "readers",
    "filesystem",
    "budget",
    "inodes",
    "kubelet's disk",
    "inotify",
    "pods",
    "SELinux",
    "memory",
    "workloads' socket",
    "operators' socket",
    "upstream",
    "token",
    "download",
}


def examined(node: Node, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit status, and the findings of each check."""
    done = node.run("cachectl", "doctor", "--json", *arguments, timeout=90)
    assert done.stdout, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        found.setdefault(finding["check"], []).append(finding)
    return done.returncode, found


def of(found: dict[str, list[dict[str, Any]]], check: str, level: str) -> str:
    """What the check says at that level, with its mend."""
    (finding,) = [finding for finding in found[check] if finding["level"] == level]
    return f"{finding['text']}; {finding['mend']}"


def open_to_all(path: Path) -> None:
    """pytest's own directories are for one user."""
    for each in (path, *path.parents):
        if each.stat().st_uid == os.geteuid() and str(each).startswith("/tmp/"):
            each.chmod(each.stat().st_mode | 0o011)


def test_on_a_node_that_is_well_every_check_is_made_and_none_fails(hub: Hub, make_node: Callable[..., Node]) -> None:
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    node = make_node(cache={"budget": "64MB"}).start()
    open_to_all(node.hub_dir)
    node.ensure("org/model")
    before = node.du()
    status, found = examined(node)
    assert set(found) == CHECKS
    assert [f for each in found.values() for f in each if f["level"] == "failure"] == []
    assert status == 0
    assert "hard links" in found["filesystem"][0]["text"]
    assert "flock" in found["filesystem"][0]["text"]
    assert hub.endpoint in of(found, "upstream", "ok")
    assert "public models only" in of(found, "token", "ok")
    assert found["download"][0]["level"] == "skipped"
    assert os.listdir(node.cache_dir / "modelcached" / "staging") == []
    assert node.du() - before < MIB // 4
    node.assert_disk_truth()


def test_a_model_that_is_named_is_fetched_in_part_and_read_offline(hub: Hub, node: Node) -> None:
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    _, found = examined(node, "--model", "org/model")
    assert "public, main is" in of(found, "access", "ok")
    assert "2 bytes fetched" in of(found, "download", "ok")
    assert "1 files read" in of(found, "offline load", "ok")
    assert hub.body_bytes("org/model", "model.safetensors") == 0
    assert node.ctl("leases") == []


def test_a_download_that_is_refused_is_told_with_one_mend(node: Node) -> None:
    done = node.run("cachectl", "doctor", "--model", "org/nowhere", "--json")
    (found,) = [finding for finding in json.loads(done.stdout) if finding["check"] == "download"]
    assert found["level"] == "failure"
    assert found["mend"] not in found["text"]


def test_a_directory_that_others_cannot_enter_is_named(hub: Hub, node: Node) -> None:
    open_to_all(node.hub_dir)
    node.cache_dir.chmod(0o700)
    told = of(examined(node)[1], "readers", "warning")
    assert f"{node.cache_dir} has mode 0700" in told
    assert f"chmod o+x {node.cache_dir}" in told
    node.cache_dir.chmod(0o755)
    node.hub_dir.chmod(0o700)
    status, found = examined(node)
    assert status == 1
    assert f"chmod o+rx {node.hub_dir}" in of(found, "readers", "failure")
    node.hub_dir.chmod(0o755)
    assert examined(node)[1]["readers"][0]["level"] == "ok"


def test_a_budget_that_cannot_be_had_is_a_warning(make_node: Callable[..., Node]) -> None:
    node = make_node(cache={"budget": "500TB"}).start()
    told = of(examined(node)[1], "budget", "warning")
    assert "500.00 TB" in told
    assert "lower cache.budget" in told


@pytest.mark.deep
def test_a_hub_that_is_down_and_a_token_that_is_none_are_told_apart(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("hf_wrong")
    node = make_node(hub={"token_file": str(token)}).start()
    told = of(examined(node)[1], "token", "failure")
    assert "rejects the token" in told
    token.write_text("\n")
    assert "is empty" in of(examined(node)[1], "token", "warning")
    assert "hf_wrong" not in told
    hub.tokens.add("hf_right")
    token.write_text("hf_right")
    assert "knows it as" in of(examined(node)[1], "token", "ok")
    token.unlink()
    assert "cannot be read" in of(examined(node)[1], "token", "failure")
    hub.stop()
    status, found = examined(node)
    assert status == 1
    assert "cannot be reached" in of(found, "upstream", "failure")


def test_what_the_daemon_itself_says_is_a_failure(hub: Hub, node: Node) -> None:
    node.hub_dir.rename(node.hub_dir.with_name("elsewhere"))
    node.wait_until(lambda: node.ctl("status")["degraded"], 20, "it to be seen")
    status, found = examined(node)
    assert status == 1
    assert [finding for finding in found["daemon"] if finding["level"] == "failure"]


def test_without_a_daemon_it_says_so(node: Node) -> None:
    node.stop()
    done = node.run("cachectl", "doctor")
    assert done.returncode == 69
    assert "no daemon answers" in done.stderr


# Surroundings that cannot be made here


@pytest.mark.parametrize(("enforcing", "level"), [("1", Level.WARNING), ("0", Level.OK), (None, Level.OK)])
def test_selinux_is_told(tmp_path: Path, enforcing: str | None, level: Level) -> None:
    if enforcing is not None:
        (tmp_path / "enforce").write_text(enforcing)
    assert surroundings.selinux(str(tmp_path)).level is level


def test_the_least_memory_limit_of_our_groups_is_found(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/pods/daemon\n")
    inner = tmp_path / "pods" / "daemon"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("2000000\n")
    (inner.parent / "memory.max").write_text("max\n")
    assert smallest_limit_bytes(str(tmp_path), str(tmp_path)) == 2_000_000
    (inner / "memory.max").write_text("max\n")
    assert smallest_limit_bytes(str(tmp_path), str(tmp_path)) is None


def test_pods_are_told_of_as_they_are_seen(tmp_path: Path) -> None:
    (tmp_path / "some-uid").mkdir()
    assert surroundings.pods(tmp_path, healthy=True, leases=1).text == f"{tmp_path} shows 1 pods"
    assert surroundings.pods(tmp_path, healthy=False, leases=2).level is Level.FAILURE
    assert surroundings.pods(None, healthy=True, leases=0).level is Level.SKIPPED
    assert surroundings.pods(tmp_path / "nowhere", healthy=True, leases=0).level is Level.SKIPPED

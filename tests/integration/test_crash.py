"""I5: the daemon is killed, its files are damaged: what is finished is kept, and nobody has to lend a hand."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub
from tests.hub.models import paced_model, tiny_llama
from tests.node import Node

SIZE = 256 * MIB
RATE = 80 * MIB
MOST_TWICE = 32 * MIB
"""Fetched again after a kill, at most: 8 connections, a 2 MiB step each, and what lay in their sockets."""


@pytest.fixture
def patient_node(make_node: Callable[..., Node]) -> Node:
    """A paced Hub is no stalled one."""
    return make_node(transfer={"stall_timeout": "30s"}).start()


def weight_bytes_sent(hub: Hub) -> int:
    """Content of weights given to the network so far."""
    return sum(r.bytes_sent for r in hub.requests() if r.is_content and r.file.endswith(".safetensors"))


def when_sent(hub: Hub, bytes_sent: int) -> None:
    """Waits until the Hub has sent that many bytes of weights, then holds it there."""
    assert hub.wait_until(lambda: weight_bytes_sent(hub) >= bytes_sent), "the transfer came so far"


def assert_right(node: Node, hub: Hub, repo_id: str, commit: str) -> None:
    """I1: each file of the snapshot has the bytes that its name promises."""
    snapshot = node.snapshot(repo_id, commit)
    repo = hub.find_repo(repo_id)
    assert repo is not None
    weights = sorted(snapshot.glob("*.safetensors"))
    assert [path.name for path in weights] == [path for path in repo.files(commit) if path.endswith(".safetensors")]
    for path in weights:
        with path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == path.resolve().name


def came_through(caller: subprocess.Popen[str]) -> dict[str, object]:
    """The client's answer; it was never started again."""
    stdout, stderr = caller.communicate(timeout=60)
    assert caller.returncode == 0, stderr
    return json.loads(stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("share", "files"), [(0.30, 1), (0.60, 1), (0.95, 1), (0.60, 5)])
def test_a_kill_costs_little_and_the_waiting_clients_come_through(
    hub: Hub, patient_node: Node, share: float, files: int
) -> None:
    node = patient_node
    commit = hub.create_repo("org/large").commit(paced_model(SIZE, files))
    hub.rate = RATE
    callers = [node.popen("ensure-model", "--json", "org/large") for _ in range(2)]
    when_sent(hub, int(share * SIZE))
    node.kill()
    assert node.visible("org/large") == [], "nothing unfinished is visible"
    hub.rate = None
    node.start()
    answers = [came_through(caller) for caller in callers]
    assert {answer["commit"] for answer in answers} == {commit}
    assert_right(node, hub, "org/large", commit)
    total = sum(path.stat().st_size for path in node.snapshot("org/large", commit).glob("*.safetensors"))
    assert weight_bytes_sent(hub) - total <= MOST_TWICE
    node.assert_disk_truth()
    assert list((node.private / "partial").iterdir()) == []


def killed_in_the_middle(hub: Hub, node: Node, size: int = 64 * MIB) -> tuple[str, Path]:
    """A node without a daemon and with half a model; its commit, and the unfinished data."""
    commit = hub.create_repo("org/half").commit(paced_model(size, 1))
    hub.rate = size
    caller = node.popen("ensure-model", "org/half")
    when_sent(hub, size // 2)
    node.kill()
    caller.kill()
    caller.communicate()
    hub.rate = None
    (data,) = [path for path in (node.private / "partial").iterdir() if path.suffix != ".journal"]
    return commit, data


def test_a_torn_journal_costs_its_tail_alone(hub: Hub, patient_node: Node) -> None:
    node = patient_node
    commit, data = killed_in_the_middle(hub, node)
    journal = data.with_name(f"{data.name}.journal")
    content = journal.read_bytes()
    # Torn in the middle of a checksum, and behind it what an older journal left there: "all is done".
    journal.write_bytes(content[:-9] + b"\nd 0 %d 00000000\n" % data.stat().st_size)
    hub.reset_counters()
    node.start()
    node.ensure("org/half")
    assert_right(node, hub, "org/half", commit)
    assert weight_bytes_sent(hub) < 0.75 * data_size(node, commit), "what was whole in the journal was kept"


def data_size(node: Node, commit: str) -> int:
    """Bytes of the one weights file."""
    return (node.snapshot("org/half", commit) / "model-00001-of-00001.safetensors").stat().st_size


def test_garbage_for_a_journal_is_a_fresh_start(hub: Hub, patient_node: Node) -> None:
    node = patient_node
    commit, data = killed_in_the_middle(hub, node)
    data.with_name(f"{data.name}.journal").write_bytes(b"\0" * 4096)
    node.start()
    node.ensure("org/half")
    assert_right(node, hub, "org/half", commit)
    node.assert_disk_truth()


def test_a_flipped_byte_in_unfinished_data_is_found_and_healed(hub: Hub, patient_node: Node) -> None:
    node = patient_node
    commit, data = killed_in_the_middle(hub, node)
    with data.open("r+b") as file:
        file.seek(12345)
        (byte,) = file.read(1)
        file.seek(12345)
        file.write(bytes([byte ^ 0xFF]))
    node.start()
    (ready,) = node.ensure("org/half")
    assert ready["commit"] == commit
    assert_right(node, hub, "org/half", commit)
    assert node.log_lines("resumed content differs from its digest, fetching it again")
    node.assert_disk_truth()


def test_sigterm_keeps_progress_and_tells_those_who_wait(hub: Hub, patient_node: Node) -> None:
    node = patient_node
    commit = hub.create_repo("org/large").commit(paced_model(SIZE, 1))
    hub.rate = RATE
    caller = node.popen("ensure-model", "--json", "org/large")
    when_sent(hub, SIZE // 2)
    assert node.terminate() == 0
    sent_before = weight_bytes_sent(hub)
    hub.rate = None
    node.start()
    stdout, stderr = caller.communicate(timeout=60)
    assert caller.returncode == 0, stderr
    assert json.loads(stdout)["commit"] == commit
    assert "the daemon is stopping; progress is kept" in stderr
    assert weight_bytes_sent(hub) - sent_before <= SIZE - sent_before + MOST_TWICE
    assert_right(node, hub, "org/large", commit)


@pytest.mark.parametrize("damage", ["deleted", "garbage"])
def test_a_lost_database_costs_no_model_in_use(hub: Hub, make_node: Callable[..., Node], damage: str) -> None:
    node = make_node(cache={"budget": "48MiB", "min_free": "1MB"}).start()
    hub.create_repo("org/leased").commit(paced_model(24 * MIB, 1, seed=1))
    hub.create_repo("org/other").commit(paced_model(24 * MIB, 1, seed=2))
    (leased,) = node.ensure("org/leased")
    node.kill()
    for path in node.private.glob("state.db*"):
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes(b"no database" * 1000)
    node.start()
    (lease,) = node.ctl("leases")
    assert lease["kind"] == "recovered"
    assert lease["models"][0]["repo_id"] == "org/leased"
    assert any("cachectl release --recovered" in why for why in node.status().degraded)
    refused = node.run("ensure-model", "org/other")
    assert refused.returncode == 75
    assert "leased" in refused.stderr
    evicted = node.run("cachectl", "evict", "org/leased", "--yes")
    assert evicted.returncode == 75
    assert "org/leased" in evicted.stderr
    assert "recovered" in evicted.stderr
    assert node.visible("org/leased") == [leased["commit"]]
    node.ctl("release", "--recovered")
    assert node.ctl("leases") == []
    node.ensure("org/other")
    assert node.visible("org/leased") == [], "the operator has spoken: it may go"
    node.assert_disk_truth()


def test_a_new_proof_of_use_stands_beside_the_recovered_lease(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    node.kill()
    (node.private / "state.db").unlink()
    node.start()
    node.ensure("org/tiny")
    assert "ttl" in {lease["kind"] for lease in node.ctl("leases")}

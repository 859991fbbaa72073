"""Proofs of use: what a pod, a stream, a ttl or a pin keeps, through restarts, pressure and branches that move."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from modelcache.errors import ModelCacheError
from modelcache.v1 import common_pb2

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import tiny_llama
from tests.node.daemon import Node, reference

SIZE = 8 * MIB
ONE_MODEL = {"budget": f"{SIZE + 7 * MIB}B"}
POD, OTHER_POD = "11111111-2222-3333-4444-555555555555", "99999999-8888-7777-6666-555555555555"


def publish(hub: Hub, *names: str) -> None:
    for number, name in enumerate(names):
        files = {"config.json": f'"{name}"'.encode(), "model.safetensors": Synthetic(SIZE, number)}
        hub.create_repo(f"org/{name}").commit(files)


def start_pod(node: Node, uid: str) -> Path:
    directory = node.pods_dir / uid
    directory.mkdir()
    return directory


def ensure_in_pod(node: Node, uid: str, *arguments: str) -> dict[str, Any]:
    return node.ensure(*arguments, env={"POD_UID": uid})[0]


def leases(node: Node) -> list[dict[str, Any]]:
    return list(node.ctl("leases"))


def evict(node: Node, repo_id: str, revision: str = "") -> None:
    with node.admin() as admin:
        admin.evict([reference(repo_id, revision)], dry_run=False)


def refusal_to_evict(node: Node, repo_id: str, revision: str = "") -> str:
    with pytest.raises(ModelCacheError) as caught:
        evict(node, repo_id, revision)
    assert (caught.value.reason, caught.value.exit_status) == ("IN_USE", 75)
    return caught.value.message


def no_space_for(node: Node, repo_id: str) -> str:
    """Asked without starting a process: some of these answers are worth something for seconds only."""
    with node.client() as client, pytest.raises(ModelCacheError) as caught:
        list(client.ensure(reference(repo_id)))
    assert (caught.value.reason, caught.value.exit_status) == ("NO_SPACE_NOW", 75)
    return caught.value.message


def may_go(node: Node, repo_id: str) -> bool:
    with node.admin() as admin:
        try:
            admin.evict([reference(repo_id)], dry_run=True)
        except ModelCacheError:
            return False
        return True


def loads_offline(node: Node, repo_id: str) -> str:
    """The commit that the real client loads by repo id."""
    done = subprocess.run(
        [sys.executable, "-c", f"from huggingface_hub import snapshot_download; print(snapshot_download({repo_id!r}))"],
        env={**os.environ, "HF_HUB_CACHE": str(node.hub_dir), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert (directory / "model.safetensors").stat().st_size > MIB
    return directory.name


# Pods


def test_a_pod_lease_survives_a_restart_and_ends_with_its_directory(hub: Hub, node: Node) -> None:
    publish(hub, "model")
    pod = start_pod(node, POD)
    start_pod(node, OTHER_POD)
    answer = ensure_in_pod(node, POD, "org/model")
    other = ensure_in_pod(node, OTHER_POD, "org/model")
    assert answer["lease_kind"] == "pod"
    again = ensure_in_pod(node, POD, "org/model")
    assert again["lease_id"] == answer["lease_id"], "an init container that runs twice has one lease"
    node.kill()
    node.start()
    assert {lease["kind"] for lease in leases(node)} == {"pod"}
    assert len(leases(node)) == 2
    assert POD in refusal_to_evict(node, "org/model")
    pod.rmdir()
    began = time.monotonic()
    node.wait_until(lambda: len(leases(node)) == 1, 10, "the pod's lease has ended")
    assert time.monotonic() - began < 10
    (left,) = leases(node)
    assert left["id"] == other["lease_id"]
    (ended,) = node.log_lines("lease ended")
    assert ended["why"] == "its pod has gone"


def test_a_pod_whose_directory_is_not_seen_gets_a_ttl_lease_and_is_told(hub: Hub, node: Node) -> None:
    publish(hub, "model")
    answer = ensure_in_pod(node, POD, "org/model")
    assert answer["lease_kind"] == "ttl"
    assert answer["lease_expires"]
    done = node.run("ensure-model", "org/model", env={"POD_UID": "../pods"})
    assert (done.returncode, "lease.pod_uid '../pods'" in done.stderr) == (64, True), "a uid is no path"


@pytest.fixture
def node_with_mounted_pods(hub: Hub, make_node: Callable[..., Node]) -> Iterator[Node]:
    """The kubelet's directory as a DaemonSet sees it: a mount that can go away."""
    node = make_node()
    kubelet = node.root / "kubelet-pods"
    for uid in (POD, OTHER_POD):
        (kubelet / uid).mkdir(parents=True)
    subprocess.run(["mount", "--bind", str(kubelet), str(node.pods_dir)], check=True)
    yield node.start()
    node.stop()
    subprocess.run(["umount", "--lazy", str(node.pods_dir)], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.deep
def test_an_unmounted_pods_directory_ends_nothing_and_is_said(hub: Hub, node_with_mounted_pods: Node) -> None:
    node = node_with_mounted_pods
    publish(hub, "model")
    ensure_in_pod(node, POD, "org/model")
    node.wait_until(lambda: not node.status().degraded, 10, "all is well at first")
    subprocess.run(["umount", str(node.pods_dir)], check=True)
    assert list(node.pods_dir.iterdir()) == []

    node.wait_until(lambda: any("pod leases do not end" in text for text in node.status().degraded), 10, "it is said")
    assert node.metric("modelcached_degraded") >= 1
    assert [line["healthy"] for line in node.log_lines("pods directory")] == [False], "logged once"
    (node.pods_dir / "stranger").mkdir()
    several_looks(node)
    assert len(leases(node)) == 1, "another directory in its place, with strangers in it"
    assert not may_go(node, "org/model")
    (node.pods_dir / "stranger").rmdir()
    node.pods_dir.rmdir()
    node.pods_dir.mkdir()
    several_looks(node)
    assert len(leases(node)) == 1, "an empty one"

    subprocess.run(["mount", "--bind", str(node.root / "kubelet-pods"), str(node.pods_dir)], check=True)
    node.wait_until(lambda: not node.status().degraded, 10, "the witness is back")
    assert len(leases(node)) == 1
    (node.root / "kubelet-pods" / POD).rmdir()
    node.wait_until(lambda: leases(node) == [], 10, "now absence means something again")


def test_a_pod_that_goes_while_no_daemon_runs_ends_its_lease_but_not_in_another_directory(
    hub: Hub, node_with_mounted_pods: Node
) -> None:
    """No leased pod is left to prove the directory; it is known for the one that was proven before."""
    node = node_with_mounted_pods
    publish(hub, "model")
    ensure_in_pod(node, POD, "org/model")
    node.kill()
    (node.root / "kubelet-pods" / POD).rmdir()
    subprocess.run(["umount", str(node.pods_dir)], check=True)
    (node.pods_dir / OTHER_POD).mkdir()
    node.start()
    several_looks(node)
    assert len(leases(node)) == 1, "another directory, with strangers in it"
    assert not may_go(node, "org/model")

    subprocess.run(["mount", "--bind", str(node.root / "kubelet-pods"), str(node.pods_dir)], check=True)
    node.wait_until(lambda: leases(node) == [], 10, "the directory itself says that the pod has gone")
    assert not node.status().degraded


def several_looks(node: Node, looks: int = 3) -> None:
    """Until the lease keeper has had more turns: by default one more than proves a pod gone."""

    def turns() -> float:
        return node.metric("modelcached_upkeep_runs_total", loop="leases", outcome="ok")

    seen = turns()
    node.wait_until(lambda: turns() >= seen + looks, 20, f"{looks} turns of the lease keeper")


def test_the_complaint_about_the_pods_directory_ends_with_the_last_pod_lease(hub: Hub, node: Node) -> None:
    publish(hub, "model")
    pod = start_pod(node, POD)
    ensure_in_pod(node, POD, "org/model")
    pod.rmdir()
    node.wait_until(lambda: node.status().degraded, 10, "an empty directory proves nothing, and that is said")
    node.release_all()
    node.wait_until(lambda: not node.status().degraded, 10, "nobody needs the witness any more")


# Streams


@pytest.mark.deep
def test_a_held_stream_survives_a_restart_under_pressure(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=ONE_MODEL, leases={"reconnect_grace": "10s"}).start()
    publish(hub, "held", "wanted")
    ready = node.root / "ready"
    keeper = node.popen("ensure-model", "--hold", "--ready-file", str(ready), "org/held")
    node.wait_until(ready.exists, 20, "the keeper holds")
    (lease,) = leases(node)
    assert lease["kind"] == "stream"
    os.kill(keeper.pid, signal.SIGSTOP)  # it cannot come back before we have asked
    node.kill()
    node.start()
    several_looks(node, 1)
    assert "leased" in no_space_for(node, "org/wanted"), "within reconnect_grace the space is still its"
    os.kill(keeper.pid, signal.SIGCONT)
    node.wait_until(lambda: node.metric("modelcached_leases") == 1, 10, "the lease is known")
    grace_is_over(node, seconds=10)
    assert [lease["id"]] == [left["id"] for left in leases(node)]
    assert "leased" in no_space_for(node, "org/wanted"), "the keeper has reconnected"

    keeper.terminate()
    assert keeper.wait(20) == 0
    keeper.communicate()
    assert not ready.exists()
    node.wait_until(lambda: leases(node) == [], 10, "SIGTERM gives the lease up")
    node.ensure("org/wanted")
    assert node.visible("org/held") == []


def test_a_keeper_that_ends_while_its_connection_waits_gives_its_lease_up(hub: Hub, node: Node) -> None:
    publish(hub, "held")
    ready = node.root / "ready"
    keeper = node.popen("ensure-model", "--hold", "--ready-file", str(ready), "org/held")
    node.wait_until(ready.exists, 20, "the keeper holds")
    node.kill()
    time.sleep(4)  # by then its tries are seconds apart
    node.start()
    keeper.terminate()
    assert keeper.wait(20) == 0
    assert leases(node) == [], "at once, not after reconnect_grace"


def grace_is_over(node: Node, seconds: float) -> None:
    """So many turns of the lease keeper (2 s each) that a lease without a stream would have ended."""
    several_looks(node, int(seconds // 2) + 1)


def test_a_lease_whose_stream_has_gone_says_how_long_it_waits(hub: Hub, node: Node) -> None:
    publish(hub, "model")
    ready = node.root / "ready"
    keeper = node.popen("ensure-model", "--hold", "--ready-file", str(ready), "org/model")
    node.wait_until(ready.exists, 20, "the keeper holds")
    assert "with its stream" in node.run("cachectl", "leases").stdout
    keeper.kill()
    keeper.communicate()
    node.wait_until(lambda: leases(node)[0]["expires_at"] is not None, 10, "its stream has gone")
    assert "unless its" in node.run("cachectl", "leases").stdout


def test_a_stream_that_is_gone_ends_its_lease_after_the_grace(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(leases={"reconnect_grace": "1s"}).start()
    publish(hub, "model")
    ready = node.root / "ready"
    keeper = node.popen("ensure-model", "--hold", "--ready-file", str(ready), "org/model")
    node.wait_until(ready.exists, 20, "the keeper holds")
    several_looks(node, 2)
    assert len(leases(node)) == 1, "a silent stream is no absent one"
    keeper.kill()
    keeper.communicate()
    node.wait_until(lambda: leases(node) == [], 10, "its lease has ended")


# Time


def test_a_ttl_lease_ends_after_its_ttl_and_a_renewal_begins_it_anew(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(leases={"ttl": "2s"}).start()
    publish(hub, "model")
    with node.client() as client:
        *_, ready = client.ensure(reference("org/model"))
        began = time.monotonic()
        assert ready.lease.kind == common_pb2.LEASE_KIND_TTL
        refusal_to_evict(node, "org/model")

        def renewed_for_longer_than_the_ttl() -> bool:
            assert client.renew(ready.lease.id).id == ready.lease.id
            return time.monotonic() - began > 4

        node.wait_until(renewed_for_longer_than_the_ttl, 10, "it is renewed again and again")
    refusal_to_evict(node, "org/model")
    node.wait_until(lambda: leases(node) == [], 10, "the lease has ended")
    evict(node, "org/model")
    with node.client() as client, pytest.raises(ModelCacheError) as caught:
        client.renew(ready.lease.id)
    assert caught.value.reason == "LEASE_NOT_FOUND"


def test_a_restart_does_not_begin_a_ttl_anew(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(leases={"ttl": "1h"}).start()
    publish(hub, "model")
    before = node.ensure("org/model")[0]
    granted = time.monotonic()
    node.kill()
    node.wait_until(lambda: time.monotonic() - granted > 3, 10, "a daemon that is away for a while")
    node.start()
    (lease,) = leases(node)
    assert lease["id"] == before["lease_id"]
    ends, ended = (datetime.fromisoformat(text) for text in (lease["expires_at"], before["lease_expires"]))
    assert abs(ends - ended) < timedelta(seconds=1), "a ttl that began at the start would end 3 s later"


# Branches that move


@pytest.fixture
def moved(hub: Hub, make_node: Callable[..., Node]) -> tuple[Node, str, str]:
    """A pod leased main at A; main moved to B upstream, and another caller ensured B."""
    node = make_node(hub={"resolve_ttl": "0s"}).start()
    repo = hub.create_repo("org/moving")
    a = repo.commit(tiny_llama(1))
    start_pod(node, POD)
    start_pod(node, OTHER_POD)
    assert ensure_in_pod(node, POD, "org/moving")["commit"] == a
    b = repo.commit(tiny_llama(2))
    other = node.ensure("org/moving")[0]
    assert other["commit"] == b
    with node.admin() as admin:
        admin.release([other["lease_id"]])
    return node, a, b


def test_a_lease_by_branch_covers_what_the_branch_points_to_now(moved: tuple[Node, str, str]) -> None:
    node, a, b = moved
    assert POD in refusal_to_evict(node, "org/moving", b)
    assert POD in refusal_to_evict(node, "org/moving", a)
    assert loads_offline(node, "org/moving") == b
    node.kill()
    node.start()
    assert POD in refusal_to_evict(node, "org/moving", b)


def test_a_pod_that_leases_by_commit_loads_it_offline_after_the_newer_one_went(
    moved: tuple[Node, str, str],
) -> None:
    node, a, b = moved
    node.release_all()
    assert ensure_in_pod(node, POD, "org/moving", "--revision", a)["lease_kind"] == "pod"
    evict(node, "org/moving", b)
    assert node.visible("org/moving") == [a]
    assert loads_offline(node, "org/moving") == a
    refusal_to_evict(node, "org/moving", a)


def test_a_pin_by_commit_stays_with_it_and_main_comes_back_to_it(moved: tuple[Node, str, str]) -> None:
    node, a, b = moved
    node.release_all()
    node.ctl("pin", f"org/moving@{a}")
    node.kill()
    node.start()  # which commits main has named is not only in memory
    evict(node, "org/moving", b)
    assert loads_offline(node, "org/moving") == a
    assert "pinned" in refusal_to_evict(node, "org/moving", a)


def test_a_pin_by_branch_follows_the_branch(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"resolve_ttl": "0s"}).start()
    repo = hub.create_repo("org/moving")
    a = repo.commit(tiny_llama(1))
    node.ensure("org/moving")
    node.ctl("pin", "org/moving")
    assert "pinned" in refusal_to_evict(node, "org/moving", a)
    b = repo.commit(tiny_llama(2))
    node.ensure("org/moving")
    node.release_all()
    node.kill()
    node.start()
    assert "pinned by org/moving@main" in refusal_to_evict(node, "org/moving", b)
    evict(node, "org/moving", a)
    node.ctl("unpin", "org/moving")
    evict(node, "org/moving", b)
    assert node.visible("org/moving") == []

"""The main job, from end to end, through the real programs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from modelcache.v1 import cache_pb2
from modelcached.config import load
from modelcached.daemon import Daemon

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.hub.models import sharded_llama, tiny_llama
from tests.node import Node
from tests.node.daemon import reference


def test_a_cold_model_is_downloaded_once_and_then_a_hit(hub: Hub, node: Node) -> None:
    repo = hub.create_repo("org/tiny")
    sha = repo.commit(tiny_llama())
    (first,) = node.ensure("org/tiny")
    (second,) = node.ensure("org/tiny")
    assert (first["outcome"], second["outcome"]) == ("downloaded", "hit")
    assert first["commit"] == second["commit"] == sha
    assert Path(first["path"]).is_dir()
    assert first["bytes_fetched"] == first["bytes_total"]
    assert second["bytes_fetched"] == 0
    assert hub.body_bytes("org/tiny", "model.safetensors") == repo.files(sha)["model.safetensors"].size
    node.assert_disk_truth()


def test_the_real_client_reads_it_offline(hub: Hub, node: Node) -> None:
    hub.create_repo("org/sharded").commit(sharded_llama())
    (ready,) = node.ensure("org/sharded", "--profile", "full")
    script = (
        "from huggingface_hub import snapshot_download, hf_hub_download, scan_cache_dir\n"
        "print(snapshot_download('org/sharded'))\n"
        "print(hf_hub_download('org/sharded', 'config.json'))\n"
        "print(len(scan_cache_dir().warnings))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_CACHE": str(node.hub_dir), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, config, warnings = done.stdout.split()
    assert path == ready["path"]
    assert config == f"{path}/config.json"
    assert warnings == "0"


def test_eviction_frees_what_du_loses(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    before = node.du()
    refused = node.run("cachectl", "evict", "org/tiny", "--yes")
    assert refused.returncode == 75
    assert "lease" in refused.stderr
    node.release_all()
    node.ctl("evict", "org/tiny", "--yes")
    assert node.visible("org/tiny") == []
    assert before - node.du() > 1_000_000
    node.assert_disk_truth()


def test_a_hit_by_another_name_is_on_the_books(hub: Hub, node: Node) -> None:
    """I8: a branch that is new to the cache costs a file, though nothing is fetched."""
    repo = hub.create_repo("org/tiny")
    repo.move("stable", repo.commit(tiny_llama()))
    node.ensure("org/tiny")
    (ready,) = node.ensure("org/tiny", "--revision", "stable")
    assert ready["outcome"] == "hit"
    node.assert_disk_truth()


def test_a_commit_is_no_branch(hub: Hub, node: Node) -> None:
    """Neither the answer that brings it nor a hit leaves a ref of that name, and its lease follows nothing."""
    sha = hub.create_repo("org/tiny").commit(tiny_llama())
    for outcome in ("downloaded", "hit"):
        (ready,) = node.ensure("org/tiny", "--revision", sha)
        assert ready["outcome"] == outcome
    refs = node.hub_dir / "models--org--tiny" / "refs"
    assert not refs.exists() or list(refs.iterdir()) == []
    with node.client() as client:
        *_, ready_again = client.ensure(reference("org/tiny", sha))
    assert [model.revision for model in ready_again.lease.models] == [""]


def test_a_mirror_brings_the_bytes_when_the_first_endpoint_is_gone(hub: Hub, make_node: Callable[..., Node]) -> None:
    files = sharded_llama()
    node = make_node(hub={"endpoints": ["http://127.0.0.1:9", hub.endpoint], "timeout": "5s"})
    node.start()
    repo = hub.create_repo("org/sharded")
    sha = repo.commit(files)
    (ready,) = node.ensure("org/sharded", timeout=120)
    assert ready["commit"] == sha
    for name in ("model.safetensors.index.json", "config.json"):
        assert (Path(ready["path"]) / name).read_bytes() == files[name]


def test_one_request_id_goes_from_the_client_to_the_disk(hub: Hub, make_node: Callable[..., Node]) -> None:
    """What is done for a request says so in the log, though movers and threads serve one request after the other."""
    node = make_node(cache={"budget": f"{15 * MIB}B"}).start()
    for number, name in enumerate(("first", "second")):
        files = {"config.json": f'"{name}"'.encode(), "model.safetensors": Synthetic(8 * MIB, number)}
        hub.create_repo(f"org/{name}").commit(files)
        hub.faults.add(
            Fault(FaultKind.RESET, path="model.safetensors", repo=f"org/{name}", where="cdn", times=1, at_fraction=0.5)
        )
        with node.client() as client:
            *_, ready = client.ensure(reference(f"org/{name}"), request_id=f"id-of-{name}")
        with node.client() as client:
            client.release(ready.lease.id)

    def ids(event: str) -> list[str]:
        return [line["request_id"] for line in node.log_lines(event)]

    assert ids("retrying a range") == ids("ensured") == ["id-of-first", "id-of-second"]
    assert ids("evicted") == ["id-of-second"], "the first went for it"


def test_a_stream_tells_how_it_goes_and_ends_with_all_of_it(hub: Hub, node: Node) -> None:
    hub.create_repo("org/large").commit({"model.safetensors": Synthetic(24 * MIB, 1)})
    hub.rate = 12 * MIB
    with node.client() as client:
        *steps, last_step, ready = client.ensure(reference("org/large", profile="full"))
    assert isinstance(ready, cache_pb2.Ready)
    downloading = [step.bytes_done for step in steps if step.phase == cache_pb2.PHASE_DOWNLOADING]
    assert len(set(downloading)) > 1, "it goes on"
    assert downloading == sorted(downloading)
    assert last_step.phase == cache_pb2.PHASE_READY
    assert last_step.bytes_done == last_step.bytes_total == ready.models[0].bytes_total
    with node.client() as client:
        (hit,) = client.ensure(reference("org/large", profile="full"))
    assert isinstance(hit, cache_pb2.Ready), "a hit has no steps"


async def test_what_only_waits_for_space_has_nothing_done(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node()
    node.write_config()
    hub.create_repo("org/tiny").commit(tiny_llama())
    daemon = Daemon(load(node.config_file))
    await daemon.start()
    reserving = asyncio.Event()
    loop, seen = asyncio.get_running_loop(), list[cache_pb2.Progress]()

    def ensure() -> None:
        with node.client() as client:
            for event in client.ensure(reference("org/tiny")):
                if isinstance(event, cache_pb2.Progress):
                    seen.append(event)
                    if event.phase == cache_pb2.PHASE_RESERVING:
                        loop.call_soon_threadsafe(reserving.set)

    try:
        async with daemon.core.admission:  # somebody is before us in the line for space
            asking = asyncio.create_task(asyncio.to_thread(ensure))
            await asyncio.wait_for(reserving.wait(), 30)
        await asking
    finally:
        await daemon.stop()
    waiting = [event for event in seen if event.phase == cache_pb2.PHASE_RESERVING]
    assert {event.bytes_done for event in waiting} == {0}
    assert all(event.bytes_total > 0 for event in waiting)
    assert seen[-1].bytes_done == seen[-1].bytes_total

"""Invariants 3 and 4: what is in use stays, and nothing takes the cache over its budget or the disk below min_free."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2, common_pb2
from modelcached.config import load
from modelcached.daemon import Daemon
from modelcached.store.disk import Disk

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node, reference

SIZE = 8 * MIB
FOR_ITSELF = 8 * MIB
"""What a budget needs beside models: 4 MiB set aside, a ballast of 1 MiB, directories; still less than a model."""
KUBELET_WARNING = "cache.min_free is below what the kubelet wants on the same filesystem: it will delete images"
PATIENT = {"stall_timeout": "30s", "retry_timeout": "60s"}
"""For bodies that the Hub's gate holds."""


def budget(models: int) -> dict[str, str]:
    return {"budget": f"{models * SIZE + FOR_ITSELF - MIB}B"}


def publish(hub: Hub, *names: str, file: str = "model.safetensors") -> None:
    """Models of one size, each with weights of its own."""
    for name in names:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), file: Synthetic(SIZE, seed)})


def ensure(node: Node, name: str, *adapters: str) -> cache_pb2.Ready:
    with node.client() as client:
        *_, last = client.ensure(reference(f"org/{name}"), [reference(f"org/{adapter}") for adapter in adapters])
    assert isinstance(last, cache_pb2.Ready)
    return last


def refused(node: Node, name: str, *adapters: str) -> ModelCacheError:
    with pytest.raises(ModelCacheError) as caught:
        ensure(node, name, *adapters)
    return caught.value


def attempt(node: Node, name: str) -> str:
    """The reason of a refusal; empty where there was none."""
    try:
        ensure(node, name)
    except ModelCacheError as error:
        return error.reason
    return ""


def cached(node: Node) -> set[str]:
    with node.client() as client:
        return {model.repo_id.removeprefix("org/") for model in client.list_models()}


class Sampler:
    """The most that was ever used and reserved together, as status shows it."""

    def __init__(self, node: Node) -> None:
        self.most = self.samples = 0
        self._node = node
        self._over = threading.Event()

    def run(self) -> None:
        with self._node.admin() as admin:
            while not self._over.is_set():
                status = admin.status()
                self.most = max(self.most, status.used_bytes + status.reserved_bytes)
                self.samples += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


@pytest.mark.parametrize("end", [Node.terminate, Node.kill])
def test_the_least_recently_used_goes_not_the_first_downloaded(
    hub: Hub, make_node: Callable[..., Node], end: Callable[[Node], None]
) -> None:
    node = make_node(cache=budget(3)).start()
    publish(hub, "a", "b", "c", "d")
    for name in ("a", "b", "c"):
        ensure(node, name)
    assert ensure(node, "a").models[0].outcome == common_pb2.OUTCOME_HIT
    end(node)
    node.start()  # the order of use is not only in memory
    node.release_all()
    ensure(node, "d")
    assert cached(node) == {"a", "c", "d"}
    assert node.metric("modelcached_evictions_total", reason="space") == 1
    node.assert_disk_truth()


def test_the_commit_that_a_branch_has_left_goes_before_what_is_unused_for_longer(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    node = make_node(cache=budget(4), hub={"resolve_ttl": "0s"}).start()
    publish(hub, "other", "moving", "new", "newer")
    ensure(node, "other")
    old = ensure(node, "moving").models[0].commit
    repo = hub.find_repo("org/moving")
    assert repo is not None
    repo.commit({"config.json": b"{}", "model.safetensors": Synthetic(SIZE, 9)})
    moved = ensure(node, "moving").models[0].commit
    assert set(node.visible("org/moving")) == {old, moved}, "it stays until its space is wanted"
    node.release_all()
    ensure(node, "new")
    assert cached(node) == {"other", "moving", "new"}
    ensure(node, "newer")
    assert node.visible("org/moving") == [moved]
    assert cached(node) == {"other", "moving", "new", "newer"}


def test_what_was_asked_for_of_late_goes_for_nobody_but_an_operator(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache={**budget(2), "min_age": "1h"}).start()
    publish(hub, "a", "b", "c")
    for name in ("a", "b"):
        ensure(node, name)
    node.release_all()
    error = refused(node, "c")
    assert error.reason == "NO_SPACE_NOW"
    assert "within the last 3600 s stays (cache.min_age)" in error.message
    assert cached(node) == {"a", "b"}
    with node.admin() as admin:
        admin.evict([reference("org/b")], dry_run=False)
    ensure(node, "b")
    node.release_all()
    node.settings["cache"]["min_age"] = "0s"
    node.write_config()
    node.wait_until(lambda: cached(node) == {"b", "c"} or not attempt(node, "c"), 10, "the configuration is read again")
    assert cached(node) == {"b", "c"}


def test_pinned_and_leased_models_are_passed_over(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(3)).start()
    publish(hub, "pinned", "leased", "free", "new", "newer")
    for name in ("pinned", "free", "leased"):
        ensure(node, name)
    node.release_all()
    with node.admin() as admin:
        admin.pin(reference("org/pinned"))
    ensure(node, "leased")
    with node.admin() as admin:
        ensure(node, "free")
        admin.release(repo_id="org/free")
    ensure(node, "new")
    assert cached(node) == {"pinned", "leased", "new"}, "the most recent of the three was the only one free to go"

    error = refused(node, "newer")
    assert (error.reason, error.exit_status) == ("NO_SPACE_NOW", 75)
    assert cached(node) == {"pinned", "leased", "new"}
    assert int(error.metadata["pinned_bytes"]) >= SIZE
    assert int(error.metadata["leased_bytes"]) >= 2 * SIZE
    for word in ("needs 8.5 MB", "budget of", "pinned", "leased", "in flight", "can be evicted"):
        assert word in error.message
    assert hub.request_count(repo="org/newer", kind="cdn") == 0


def test_a_model_that_a_request_is_about_to_use_is_passed_over(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(2), transfer=PATIENT).start()
    publish(hub, "growing", "other")
    hub.find_repo("org/growing").commit({"notes.bin": Synthetic(2 * MIB, 7)}, base="main")
    ensure(node, "growing")
    node.release_all()
    hub.gate.close("notes.bin")
    growing = node.popen("ensure-model", "--profile", "full", "org/growing")
    assert hub.gate.wait_for_waiting(1)
    assert refused(node, "other").reason == "NO_SPACE_NOW"
    done = node.run("cachectl", "evict", "org/growing", "--yes")
    assert done.returncode == 75
    assert "held by a request under way" in done.stderr
    hub.gate.open()
    assert growing.wait(30) == 0
    growing.communicate()
    node.release_all()
    ensure(node, "other")
    assert cached(node) == {"other"}


@pytest.mark.deep
def test_what_the_watermarks_evict_takes_its_time_until_somebody_needs_room(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    publish(hub, "m1", "m2", "m3", "m4")
    node = make_node(cache={**budget(3), "high_watermark": "60%", "low_watermark": "40%", "evict_rate": "1B"})
    node.start()
    for name in ("m1", "m2"):
        ensure(node, name)
    blobs = node.hub_dir / "models--org--m1" / "blobs"
    assert len(os.listdir(blobs)) == 2
    ensure(node, "m3")
    node.release_all()
    node.wait_until(lambda: len(os.listdir(blobs)) == 1, 30, "its first file to go")
    assert "m1" not in cached(node)
    turns = node.metric("modelcached_upkeep_runs_total", loop="watermarks")
    node.wait_until(
        lambda: node.metric("modelcached_upkeep_runs_total", loop="watermarks") > turns + 1, 30, "two looks"
    )
    assert len(os.listdir(blobs)) == 1
    ensure(node, "m4")
    node.wait_until(lambda: not blobs.parent.exists(), 30, "all of it to go")
    assert {"m3", "m4"} <= cached(node)
    node.assert_disk_truth()


def test_a_model_larger_than_the_budget_is_refused_before_its_first_byte(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    node = make_node(cache=budget(2)).start()
    publish(hub, "kept", "pinned")
    ensure(node, "pinned")
    node.ctl("pin", "org/pinned")
    node.release_all()
    ensure(node, "kept")
    hub.create_repo("org/huge").commit({"config.json": b"{}", "model.safetensors": Synthetic(3 * SIZE, 1)})
    hub.reset_counters()
    done = node.run("ensure-model", "org/huge")
    assert done.returncode == 73
    assert "needs 25.3 MB, cache.budget is 24.1 MB" in done.stderr
    error = refused(node, "huge")
    assert error.reason == "OVER_BUDGET"
    assert int(error.metadata["need_bytes"]) >= 3 * SIZE
    assert int(error.metadata["budget_bytes"]) == 2 * SIZE + FOR_ITSELF - MIB
    assert int(error.metadata["pinned_bytes"]) >= SIZE
    assert int(error.metadata["leased_bytes"]) >= SIZE
    assert "(8.4 MB pinned, 8.4 MB leased)" in error.message
    assert hub.request_count(kind="cdn") == hub.request_count(kind="resolve") == 0
    assert cached(node) == {"kept", "pinned"}
    assert node.status().reserved_bytes == 0
    assert os.listdir(node.private / "partial") == []


@pytest.mark.parametrize("size", [2 * SIZE, 4 * SIZE], ids=["no room now", "never"])
def test_what_was_linked_for_a_refused_model_does_not_stay(hub: Hub, make_node: Callable[..., Node], size: int) -> None:
    node = make_node(cache=budget(3)).start()
    shared = {"config.json": b"{}", "model.safetensors": Synthetic(SIZE, 99)}
    hub.create_repo("org/donor").commit(shared)
    publish(hub, "leased")
    ensure(node, "donor")
    ensure(node, "leased")
    hub.create_repo("org/larger").commit({**shared, "extra.safetensors": Synthetic(size, 1)})
    assert refused(node, "larger").reason == ("NO_SPACE_NOW" if size < 3 * SIZE else "OVER_BUDGET")
    links = node.hub_dir / "models--org--larger"  # to the donor's weights: they would keep their bytes
    node.wait_until(lambda: not links.exists(), 5, "what was made for it to go")
    node.assert_disk_truth()


def test_two_that_do_not_fit_together_are_not_admitted_half_way(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(1), transfer=PATIENT).start()
    publish(hub, "first", "second")
    hub.gate.close("model.safetensors")
    first = node.popen("ensure-model", "org/first")
    assert hub.gate.wait_for_waiting(1)
    error = refused(node, "second")
    assert error.reason == "NO_SPACE_NOW"
    assert "org/second@" in error.message
    assert int(error.metadata["in_flight_bytes"]) >= SIZE
    asked_for = {record.kind for record in hub.requests() if record.repo == "org/second"}
    assert asked_for == {"api"}, "no file of it, however small"
    hub.gate.open()
    assert first.wait(30) == 0
    first.communicate()
    node.release_all()
    ensure(node, "second")
    assert cached(node) == {"second"}
    assert hub.body_bytes("org/first", "model.safetensors") == hub.body_bytes("org/second", "model.safetensors") == SIZE


def test_a_refusal_names_the_limit_and_the_largest_holders(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(3)).start()
    publish(hub, "pinned", "leased", "wanted", "adapter")
    ensure(node, "leased")
    ensure(node, "pinned")
    node.release_all()
    node.ctl("pin", "org/pinned")
    ensure(node, "leased")
    told = refused(node, "wanted", "adapter").text
    assert "org/leased@" in told
    assert "org/pinned@" in told
    assert ", pinned by org/pinned@main)" in told
    assert "raise cache.budget" in told
    assert "the limit is the filesystem" not in told
    node.settings["cache"]["min_free"] = "99%"
    node.settings["cache"]["budget"] = "1TB"
    node.terminate()
    node.start()
    told = refused(node, "wanted").text
    assert "the limit is the filesystem" in told
    assert "raise cache.budget" not in told


def test_base_and_adapters_are_one_admission(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(3), transfer=PATIENT).start()
    publish(hub, "leased", "base", "adapter", "second-adapter", "third-adapter")
    ensure(node, "leased")
    error = refused(node, "base", "adapter", "second-adapter")
    assert error.reason == "NO_SPACE_NOW"
    assert "base@" in error.message
    assert "with 2 adapters" in error.message
    error = refused(node, "base", "adapter", "second-adapter", "third-adapter")
    assert error.reason == "OVER_BUDGET"
    assert hub.request_count(kind="cdn", repo="org/base") == 0, "the base fits, but was not begun without its adapters"

    hub.gate.close("model.safetensors")
    together = node.popen("ensure-model", "org/base", "org/adapter")
    assert hub.gate.wait_for_waiting(1)
    status = node.status()
    assert status.used_bytes + status.reserved_bytes >= 3 * SIZE, "both are promised before the first byte of either"
    hub.gate.open()
    assert together.wait(30) == 0
    together.communicate()
    (lease,) = [lease for lease in node.ctl("leases") if len(lease["models"]) == 2]
    assert {model["repo_id"] for model in lease["models"]} == {"org/base", "org/adapter"}


def test_a_shared_blob_is_linked_and_outlives_its_donor(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(2)).start()
    shared = Synthetic(SIZE, 99)
    for name in ("donor", "linked", "third"):
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": shared})
    publish(hub, "new", "newer")
    ensure(node, "donor")
    used = node.status().used_bytes
    for name in ("linked", "third"):
        ready = ensure(node, name)
        assert ready.models[0].bytes_linked == SIZE
        assert hub.request_count(repo=f"org/{name}", kind="cdn") == 0
    assert node.status().used_bytes - used < MIB
    inodes = {os.stat(node.hub_dir / f"models--org--{n}/blobs/{shared.sha256()}").st_ino for n in ("donor", "linked")}
    assert len(inodes) == 1

    node.release_all()
    with node.admin() as admin:
        for name in ("donor", "third"):
            gone = admin.evict([reference(f"org/{name}")], dry_run=False)
            assert gone.bytes_freed < MIB, "its bytes live on under other names"
    (linked,) = [model for model in node.ctl("ls") if model["repo_id"] == "org/linked"]
    assert linked["unique_bytes"] >= SIZE, "the last name is the one that frees the bytes"
    weights = Path(node.hub_dir, f"models--org--linked/snapshots/{linked['commit']}/model.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == shared.sha256()
    assert ensure(node, "linked").models[0].outcome == common_pb2.OUTCOME_HIT
    node.release_all()
    ensure(node, "new")
    node.release_all()
    ensure(node, "newer")
    assert cached(node) == {"new", "newer"}
    node.assert_disk_truth()


async def test_a_donor_in_the_middle_of_being_linked_is_not_evicted(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(2))
    node.write_config()
    shared = Synthetic(SIZE, 99)
    donor = hub.create_repo("org/donor").commit({"config.json": b"{}", "model.safetensors": shared})
    hub.create_repo("org/linked").commit({"config.json": b"[]", "model.safetensors": shared})
    publish(hub, "used-later", "new")
    linking, go_on = threading.Event(), threading.Event()

    def stop_the_world(operation: str, path: str) -> None:
        if operation == "link":
            linking.set()
            assert go_on.wait(30)

    daemon = Daemon(load(node.config_file), Disk(stop_the_world))
    await daemon.start()
    try:
        await asyncio.to_thread(ensure, node, "donor")
        await asyncio.to_thread(ensure, node, "used-later")
        await asyncio.to_thread(node.release_all)
        linked = asyncio.create_task(asyncio.to_thread(ensure, node, "linked"))
        assert await asyncio.to_thread(linking.wait, 30)
        done = await asyncio.to_thread(node.run, "cachectl", "evict", "org/donor", "--yes")
        assert (done.returncode, "held by a request under way" in done.stderr) == (75, True)
        assert node.visible("org/donor") == [donor]
        await asyncio.to_thread(ensure, node, "new")
        assert await asyncio.to_thread(cached, node) == {"donor", "new"}, "the least recently used was passed over"
        go_on.set()
        ready = await linked
        assert ready.models[0].bytes_linked == SIZE
        assert hub.request_count(repo="org/linked", kind="cdn") == 0
        done = await asyncio.to_thread(node.run, "cachectl", "evict", "org/donor", "--yes")
        assert done.returncode == 0
    finally:
        go_on.set()
        await daemon.stop()


def test_a_small_file_in_common_keeps_no_other_model(hub: Hub, make_node: Callable[..., Node]) -> None:
    """Fine-tunes share a tokenizer: while one is fetched, the others may go."""
    node = make_node(cache=budget(2)).start()
    for number in range(3):
        files = {"config.json": b"the same", "model.safetensors": Synthetic(SIZE, number)}
        hub.create_repo(f"org/tune{number}").commit(files)
    for number in range(3):
        ensure(node, f"tune{number}")
        node.release_all()
    assert cached(node) == {"tune1", "tune2"}
    node.assert_disk_truth()


def test_an_older_commit_goes_for_a_newer_one_that_shares_blobs_with_it(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    node = make_node(cache=budget(2)).start()
    publish(hub, "model")
    repo = hub.find_repo("org/model")
    assert repo is not None
    older = repo.commit({"tokenizer.json": Synthetic(2 * MIB, 1)}, base="main", branch="main")
    ensure(node, "model")
    node.release_all()
    hub.reset_counters()
    newer = repo.commit({"model.safetensors": Synthetic(SIZE + 4 * MIB, 5)}, base="main")
    with node.client() as client:
        *_, ready = client.ensure(reference("org/model", newer))
    assert isinstance(ready, cache_pb2.Ready)
    assert node.visible("org/model") == [newer] != [older]
    assert hub.body_bytes("org/model", "tokenizer.json") == 0, "its name stayed although its snapshot went"
    assert (node.hub_dir / ready.models[0].path / "tokenizer.json").stat().st_size == 2 * MIB
    node.assert_disk_truth()


def test_used_and_reserved_never_exceed_the_budget(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache={"budget": f"{2 * SIZE + 6 * MIB}B"}).start()
    names = [f"m{number}" for number in range(6)]
    for number, name in enumerate(names):
        shards = {f"{n}.safetensors": Synthetic(SIZE // 4, 100 * number + n) for n in range(4)}
        hub.create_repo(f"org/{name}").commit({"config.json": b"{}", **shards})
    hub.rate = 40 * MIB
    sampler, limit = Sampler(node), 2 * SIZE + 6 * MIB
    with sampler.watching():
        for name in names:
            ensure(node, name)
            assert node.du() <= limit
            node.release_all()
    assert sampler.samples > 10
    assert 2 * SIZE < sampler.most <= limit
    assert cached(node) == {"m4", "m5"}
    node.assert_disk_truth()


async def test_no_turn_of_the_event_loop_sees_more_than_the_budget(hub: Hub, make_node: Callable[..., Node]) -> None:
    """What is allocated is used from then on and promised no longer: never both, whoever looks meanwhile."""
    limit = 2 * SIZE + 6 * MIB
    node = make_node(cache={"budget": f"{limit}B"})
    node.write_config()
    for name in ("one", "two", "three"):
        shards = {f"{name}-{n}.safetensors": Synthetic(SIZE // 2, hash((name, n))) for n in range(2)}
        hub.create_repo(f"org/{name}").commit({"config.json": b"{}", **shards})
    daemon = Daemon(load(node.config_file))
    await daemon.start()
    seen: set[int] = set()

    async def look() -> None:
        space = daemon.core.space
        while True:
            seen.add(space.used_bytes + space.reserved_bytes)
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    try:
        await asyncio.gather(asyncio.to_thread(ensure, node, "one"), asyncio.to_thread(ensure, node, "two"))
        await asyncio.to_thread(node.release_all)
        await asyncio.to_thread(ensure, node, "three")
    finally:
        looking.cancel()
        await daemon.stop()
    assert 2 * SIZE < max(seen) <= 2 * SIZE + 3 * MIB


def test_when_others_fill_the_disk_nothing_is_admitted_and_that_is_said(hub: Hub, small_disk: Node) -> None:
    node = small_disk
    publish(hub, "leased", "wanted")
    ensure(node, "leased")
    foreign = node.cache_dir / "not-ours"
    with foreign.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 42 * MIB)
    error = refused(node, "wanted")
    assert (error.reason, error.exit_status) == ("NO_SPACE_NOW", 75)
    assert int(error.metadata["filesystem_free_bytes"]) < int(error.metadata["min_free_bytes"]) == 16 * MIB
    assert "cache.min_free" in error.message
    node.wait_until(lambda: any("cache.min_free" in text for text in node.status().degraded), 10, "it says so")
    assert node.metric("modelcached_degraded") == 1
    assert cached(node) == {"leased"}

    node.release_all()
    node.wait_until(lambda: cached(node) == set(), 10, "what may go has gone in the background")
    # It is out of sight before the last of it has gone and is counted.
    node.wait_until(lambda: node.metric("modelcached_evictions_total", reason="watermark") == 1, 10, "it is counted")
    foreign.unlink()
    node.wait_until(lambda: not node.status().degraded, 10, "it has recovered")
    ensure(node, "wanted")
    status = os.statvfs(node.cache_dir)
    assert status.f_bavail * status.f_frsize >= 16 * MIB


def test_min_free_is_kept_by_eviction_although_the_budget_has_room(hub: Hub, small_disk: Node) -> None:
    publish(hub, "a", "b", "c", "d", "e", "f")
    for name in "abcdef":
        ensure(small_disk, name)
        small_disk.release_all()
        status = os.statvfs(small_disk.cache_dir)
        assert status.f_bavail * status.f_frsize >= 16 * MIB
    assert cached(small_disk) == {"c", "d", "e", "f"} or cached(small_disk) == {"b", "c", "d", "e", "f"}


def test_a_resumed_model_needs_only_what_is_missing(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache=budget(1)).start()
    publish(hub, "big")
    hub.rate = 8 * MIB
    client = node.popen("ensure-model", "org/big")
    assert hub.wait_until(lambda: hub.body_bytes("org/big", "model.safetensors") > SIZE // 2, timedelta(seconds=20))
    node.kill()
    hub.rate = None
    node.start()
    assert client.wait(30) == 0
    client.communicate()
    assert hub.body_bytes("org/big", "model.safetensors") < 2 * SIZE


def test_beside_the_kubelet_more_is_left_free_and_less_is_warned_of(hub: Hub, make_node: Callable[..., Node]) -> None:
    """It deletes images below 15 % of the filesystem, and evicts pods below 10 %."""
    node = make_node(cache={"min_free": "auto"}).start()  # its pods directory is on the same filesystem
    status = node.status()
    assert status.min_free_bytes == int(status.filesystem_total_bytes * 0.20)
    assert not node.log_lines(KUBELET_WARNING)
    node.settings["leases"]["kubelet_pods_dir"] = "/proc/nowhere"
    node.terminate()
    node.start()
    assert node.status().min_free_bytes == int(status.filesystem_total_bytes * 0.10)

    node.settings["leases"]["kubelet_pods_dir"] = str(node.pods_dir)
    node.settings["cache"]["min_free"] = "14%"
    node.terminate()
    node.start()
    (warning,) = node.log_lines(KUBELET_WARNING)
    assert warning["directory"] == str(node.pods_dir)
    assert warning["min_free_bytes"] == int(status.filesystem_total_bytes * 0.14) < warning["kubelet_wants_bytes"]

"""At most transfer.models are downloaded at once: a pod that waits goes before background work, small ones pass, and
the line is a wait with an end like every other (invariants 2, 4 and 6)."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2, common_pb2
from modelcached.cache import Core
from modelcached.config import load
from modelcached.daemon import Daemon
from modelcached.model import RepoId
from modelcached.store.disk import Disk

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import sharded_llama
from tests.node.daemon import Node, reference

SIZE = 36 * MIB
"""More than what passes the line."""
LARGE = 200 * MIB
PATIENT = {"stall_timeout": "60s", "retry_timeout": "120s"}
"""For bodies that the Hub's gate holds."""
SECONDS = 60


def publish(hub: Hub, *names: str, size: int = SIZE) -> None:
    """Models with weights of their own, in a file with their own name, so that a gate can hold each alone."""
    for name in names:
        weights = Synthetic(size, int.from_bytes(name.encode(), "big") % 1_000_003)
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), f"{name}.safetensors": weights})


def weights_sent(hub: Hub, name: str) -> int:
    return hub.body_bytes(f"org/{name}", f"{name}.safetensors")


class Asking(threading.Thread):
    """One caller of EnsureModel: what it was told last, and how it ended."""

    def __init__(self, node: Node, *names: str) -> None:
        super().__init__(daemon=True)
        self.last: cache_pb2.Progress | None = None
        self.ready: cache_pb2.Ready | None = None
        self.error: ModelCacheError | None = None
        self._node = node
        self._base, *self._adapters = (reference(f"org/{name}") for name in names)
        self._cancel: Callable[[], None] | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._node.client() as client, client.ensure(self._base, self._adapters) as stream:
                self._cancel = stream.cancel
                for event in stream:
                    if isinstance(event, cache_pb2.Ready):
                        self.ready = event
                    else:
                        self.last = event
        except ModelCacheError as error:
            self.error = error

    def go_away(self) -> None:
        assert self._cancel is not None
        self._cancel()
        self.ends()

    def ends(self) -> None:
        self.join(SECONDS)
        assert not self.is_alive()

    def is_ready(self) -> bool:
        self.ends()
        assert self.error is None, self.error
        return self.ready is not None

    @property
    def queued(self) -> str:
        """What it waits for in the line; empty when it is not in it."""
        in_line = self.last is not None and self.last.phase == cache_pb2.PHASE_QUEUED and self.is_alive()
        return self.last.detail if in_line and self.last is not None else ""


@pytest.fixture
def one_at_a_time(make_node: Callable[..., Node]) -> Node:
    return make_node(transfer={"models": 1, **PATIENT}).start()


@pytest.fixture
def few_connections(make_node: Callable[..., Node]) -> Node:
    """So that a large model is in the middle for long; one more than the pod's model takes."""
    return make_node(transfer={"models": 1, "connections": 4, **PATIENT}).start()


@contextmanager
def downloading(hub: Hub, node: Node, name: str) -> Iterator[Asking]:
    """The model has its turn, and none of its weights comes before the end."""
    hub.gate.close(f"{name}.safetensors")
    asking = Asking(node, name)
    assert hub.gate.wait_for_waiting(1)
    try:
        yield asking
    finally:
        hub.gate.open()


def wait_in_line(node: Node, asking: Asking, detail: str) -> None:
    node.wait_until(lambda: asking.queued == detail, SECONDS, f"in line: {detail!r}, not {asking.last}")


def is_downloading(asking: Asking) -> bool:
    return asking.last is not None and asking.last.phase == cache_pb2.PHASE_DOWNLOADING


def test_what_can_never_fit_is_told_so_at_once_and_not_in_its_turn(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache={"budget": "100MB"}, transfer={"models": 1, **PATIENT}).start()
    publish(hub, "first")
    publish(hub, "giant", size=LARGE)
    with downloading(hub, node, "first") as first:
        giant = Asking(node, "giant")
        giant.ends()
        assert giant.error is not None
        assert giant.error.reason == "OVER_BUDGET"
    assert first.is_ready()


def test_one_at_a_time_first_come_first_served(hub: Hub, one_at_a_time: Node) -> None:
    node = one_at_a_time
    publish(hub, "first", "second", "third")
    with downloading(hub, node, "first") as first:
        promised = node.status().used_bytes + node.status().reserved_bytes
        second = Asking(node, "second")
        wait_in_line(node, second, "1 model comes first, transfer.models is 1")
        third = Asking(node, "third")
        wait_in_line(node, third, "2 models come first, transfer.models is 1")
        assert second.last is not None
        assert second.last.bytes_total > SIZE
        assert second.last.bytes_done == 0, "what is missing is not done while it waits"
        now = node.status()
        assert now.used_bytes + now.reserved_bytes - promised < MIB, "who waits is promised no space"
        assert node.metric("modelcached_transfers_queued") == 2
        assert node.metric("modelcached_transfers") == 3
        assert weights_sent(hub, "second") == weights_sent(hub, "third") == 0
    assert first.is_ready()
    assert second.is_ready()
    assert third.is_ready()
    order = [r.repo for r in hub.requests() if r.kind == "cdn" and r.is_content]
    assert order == sorted(order, key=["org/first", "org/second", "org/third"].index)
    assert weights_sent(hub, "first") == weights_sent(hub, "second") == weights_sent(hub, "third") == SIZE
    assert second.ready is not None
    assert second.ready.models[0].outcome == common_pb2.OUTCOME_DOWNLOADED


def test_what_is_small_passes(hub: Hub, one_at_a_time: Node) -> None:
    """An index file and a small adapter wait for nobody's 140 GB, nor for the line for space."""
    node = one_at_a_time
    publish(hub, "large")
    publish(hub, "small", size=2 * MIB)
    hub.create_repo("org/sharded").commit(sharded_llama(3))
    with downloading(hub, node, "large") as large:
        assert Asking(node, "small").is_ready()
        assert Asking(node, "sharded").is_ready()
        assert large.is_alive()


def test_an_index_is_read_before_its_model_stands_in_line(hub: Hub, one_at_a_time: Node) -> None:
    node = one_at_a_time
    publish(hub, "large")
    shards = {f"{n}.safetensors": Synthetic(SIZE // 2, n) for n in (1, 2)}
    index = b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    hub.create_repo("org/sharded").commit({"model.safetensors.index.json": index, **shards})
    with downloading(hub, node, "large"):
        sharded = Asking(node, "sharded")
        wait_in_line(node, sharded, "1 model comes first, transfer.models is 1")
        assert hub.body_bytes("org/sharded", "model.safetensors.index.json") == len(index)
    assert sharded.is_ready()


def test_a_base_and_its_adapters_have_one_turn(hub: Hub, one_at_a_time: Node) -> None:
    publish(hub, "base", "adapter", "second-adapter")
    asking = Asking(one_at_a_time, "base", "adapter", "second-adapter")
    assert asking.is_ready()
    assert asking.ready is not None
    assert [m.bytes_fetched > SIZE for m in asking.ready.models] == [True, True, True]


def test_who_wants_what_another_fetches_leaves_the_line_when_it_has_come(hub: Hub, one_at_a_time: Node) -> None:
    """Two pods with one base and different adapters, and a third model between them in the line."""
    node = one_at_a_time
    publish(hub, "base", "between")
    publish(hub, "adapter", size=MIB)
    shared = Synthetic(SIZE, 99)
    hub.create_repo("org/donor").commit({"config.json": b"{}", "donor.safetensors": shared})
    hub.create_repo("org/same-bytes").commit({"config.json": b"[]", "donor.safetensors": shared})
    with downloading(hub, node, "donor") as donor:
        between = Asking(node, "between")
        wait_in_line(node, between, "1 model comes first, transfer.models is 1")
        with_adapter = Asking(node, "donor", "adapter")
        wait_in_line(node, with_adapter, "2 models come first, transfer.models is 1")
        same_bytes = Asking(node, "same-bytes")
        wait_in_line(node, same_bytes, "3 models come first, transfer.models is 1")
        hub.gate.close("[ab]*.safetensors")
        assert donor.is_ready()
        assert same_bytes.is_ready()
        node.wait_until(lambda: is_downloading(with_adapter), SECONDS, "its adapter is fetched without a turn")
        hub.gate.close("between.safetensors")
        assert with_adapter.is_ready()
        assert between.is_alive()
        assert with_adapter.ready is not None
        assert with_adapter.ready.models[0].outcome == common_pb2.OUTCOME_JOINED, "it waited for what another fetched"
    assert between.is_ready()
    assert hub.body_bytes("org/donor", "donor.safetensors") == SIZE
    assert hub.body_bytes("org/same-bytes", "donor.safetensors") == 0


@pytest.mark.parametrize("evicted", [False, True], ids=["stays", "is evicted"])
def test_what_a_model_shares_with_one_that_is_ready_before_it_is_its_own(
    hub: Hub, make_node: Callable[..., Node], evicted: bool
) -> None:
    """However soon the other goes: it has waited for those bytes, and is spared a second transfer."""
    node = make_node(transfer=PATIENT).start()
    shared = Synthetic(SIZE, 99)
    hub.create_repo("org/first").commit({"config.json": b"{}", "shared.safetensors": shared})
    files = {"config.json": b"[]", "shared.safetensors": shared, "more.safetensors": Synthetic(SIZE, 5)}
    hub.create_repo("org/larger").commit(files)
    hub.gate.close("*.safetensors")
    try:
        first = Asking(node, "first")
        assert hub.gate.wait_for_waiting(1)
        before = hub.gate.waiting
        larger = Asking(node, "larger")
        assert hub.gate.wait_for_waiting(before + 1)
        hub.gate.close("more.safetensors")
        assert first.is_ready()
        node.release_all()
        if evicted:
            node.ctl("evict", "org/first", "--yes")
        hub.gate.open()
        assert larger.is_ready()
    finally:
        hub.gate.open()
    assert hub.body_bytes("org/first", "shared.safetensors") == SIZE
    assert hub.body_bytes("org/larger", "shared.safetensors") == 0
    first_is_there = (node.hub_dir / "models--org--first").exists
    node.wait_until(lambda: first_is_there() is not evicted, 5, "what the evicted one had left to go")
    node.assert_disk_truth()


def test_a_branch_that_moved_on_during_a_download_is_not_moved_back_at_its_end(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    node = make_node(hub={"resolve_ttl": "0s"}, transfer=PATIENT).start()
    repo = hub.create_repo("org/moving")
    old = repo.commit({"config.json": b"{}", "old.safetensors": Synthetic(SIZE, 1)})
    hub.gate.close("old.safetensors")
    try:
        before = Asking(node, "moving")
        assert hub.gate.wait_for_waiting(1)
        new = repo.commit({"config.json": b"[]", "new.safetensors": Synthetic(SIZE, 2)})
        assert Asking(node, "moving").is_ready()
    finally:
        hub.gate.open()
    assert before.is_ready()
    assert before.ready is not None
    assert before.ready.models[0].commit == old
    assert (node.hub_dir / "models--org--moving/refs/main").read_text() == new
    assert node.models()[f"org/moving@{new}"]["revisions"] == ["main"]
    node.assert_disk_truth()


def test_a_caller_that_goes_leaves_the_line(hub: Hub, one_at_a_time: Node) -> None:
    node = one_at_a_time
    publish(hub, "first", "gone", "third")
    with downloading(hub, node, "first") as first:
        gone = Asking(node, "gone")
        wait_in_line(node, gone, "1 model comes first, transfer.models is 1")
        third = Asking(node, "third")
        wait_in_line(node, third, "2 models come first, transfer.models is 1")
        gone.go_away()
        wait_in_line(node, third, "1 model comes first, transfer.models is 1")
        again = Asking(node, "gone")
        wait_in_line(node, again, "2 models come first, transfer.models is 1")
        again.go_away()
    assert first.is_ready()
    assert third.is_ready()
    node.wait_until(lambda: node.metric("modelcached_transfers") == 0, SECONDS, "nothing is on its way")
    assert weights_sent(hub, "gone") == 0
    assert "a download that nobody waits for failed" not in node.log_text()
    node.assert_disk_truth()


def test_an_operator_can_cancel_what_is_in_line(hub: Hub, one_at_a_time: Node) -> None:
    node = one_at_a_time
    publish(hub, "first", "second")
    with downloading(hub, node, "first"):
        second = Asking(node, "second")
        wait_in_line(node, second, "1 model comes first, transfer.models is 1")
        node.ctl("cancel", "org/second")
        second.ends()
        assert second.error is not None
        assert second.error.reason == "TRANSFER_CANCELLED"


def test_the_daemons_end_ends_the_wait_and_evicts_nothing_for_it(hub: Hub, make_node: Callable[..., Node]) -> None:
    budget = {"budget": f"{2 * SIZE + 16 * MIB}B"}
    node = make_node(cache=budget, transfer={"models": 1, **PATIENT}, server={"drain_timeout": "50s"}).start()
    publish(hub, "old", "first", "second")
    assert Asking(node, "old").is_ready()
    node.release_all()
    with downloading(hub, node, "first"):
        second = Asking(node, "second")
        wait_in_line(node, second, "1 model comes first, transfer.models is 1")
        began = time.monotonic()
        assert node.terminate(timeout=40) == 0
        assert time.monotonic() - began < 25, "not for as long as drain_timeout"
        second.ends()
        assert second.error is not None
        assert second.error.reason == "SHUTTING_DOWN"
        assert len(node.visible("org/old")) == 1


def in_the_background(hub: Hub, node: Node, name: str) -> None:
    """The model is on its way, and its caller has gone."""
    hub.rate = 40 * MIB
    caller = Asking(node, name)
    assert hub.wait_until(lambda: weights_sent(hub, name) > 20 * MIB)
    caller.go_away()
    (transfer,) = node.status().transfers
    assert transfer.background


def begun(hub: Hub, name: str) -> int:
    return sum(r.kind == "cdn" and r.repo == f"org/{name}" for r in hub.requests())


def assert_it_stands_still(hub: Hub, name: str) -> None:
    """Parts under way have come to their end, and no other begins although connections are free."""
    assert hub.wait_until(lambda: all(r.finished for r in hub.requests() if r.repo == f"org/{name}"))
    before = begun(hub, name)
    assert not hub.wait_until(lambda: begun(hub, name) > before, timedelta(seconds=1))


def test_a_pod_that_waits_goes_before_background_work(hub: Hub, few_connections: Node) -> None:
    """What nobody waits for any more steps aside, keeps what it has, and goes on afterwards."""
    node = few_connections
    publish(hub, "background", size=LARGE)
    publish(hub, "pod")
    in_the_background(hub, node, "background")
    with downloading(hub, node, "pod") as pod:
        assert_it_stands_still(hub, "background")
        assert weights_sent(hub, "background") < LARGE
        assert node.metric("modelcached_transfers_queued") == 1
    assert pod.is_ready()
    hub.rate = None
    node.wait_until(lambda: len(node.visible("org/background")) == 1, SECONDS, "it goes on by itself")
    assert weights_sent(hub, "background") == LARGE, "nothing is fetched twice"
    node.assert_disk_truth()


def test_what_stood_aside_goes_on_when_there_are_more_turns(hub: Hub, few_connections: Node) -> None:
    node = few_connections
    publish(hub, "background", size=LARGE)
    publish(hub, "pod")
    in_the_background(hub, node, "background")
    with downloading(hub, node, "pod") as pod:
        assert_it_stands_still(hub, "background")
        hub.rate = None
        reload_models(node, 2)
        node.wait_until(lambda: len(node.visible("org/background")) == 1, SECONDS, "it goes on")
        assert pod.is_alive()
    assert pod.is_ready()


def test_what_stood_aside_is_taken_over_by_whoever_else_wants_its_files(hub: Hub, few_connections: Node) -> None:
    """Another profile of the same model is another request, with the same transfers."""
    node = few_connections
    publish(hub, "background", size=LARGE)
    publish(hub, "pod")
    in_the_background(hub, node, "background")
    with downloading(hub, node, "pod") as pod:
        assert_it_stands_still(hub, "background")
        full = node.popen("ensure-model", "--profile", "full", "org/background")
        node.wait_until(lambda: node.metric("modelcached_transfers_queued") == 2, SECONDS, "both are in line")
    assert pod.is_ready()
    hub.rate = None
    assert full.wait(SECONDS) == 0
    assert weights_sent(hub, "background") == LARGE


def test_background_work_that_somebody_asks_for_again_stands_in_line_before_later_ones(
    hub: Hub, few_connections: Node
) -> None:
    node = few_connections
    publish(hub, "background", size=LARGE)
    publish(hub, "pod", "later")
    in_the_background(hub, node, "background")
    with downloading(hub, node, "pod") as pod:
        later = Asking(node, "later")
        wait_in_line(node, later, "1 model comes first, transfer.models is 1")
        back = Asking(node, "background")
        wait_in_line(node, back, "1 model comes first, transfer.models is 1")
        assert back.last is not None
        assert back.last.bytes_done > 15 * MIB, "what it has is counted"
        wait_in_line(node, later, "2 models come first, transfer.models is 1")
        hub.gate.close("later.safetensors")
        assert pod.is_ready()
        hub.rate = None
        assert back.is_ready()
        assert later.is_alive()
    assert later.is_ready()
    assert weights_sent(hub, "background") == LARGE


async def test_who_asks_for_what_has_just_left_the_line_is_not_turned_away_with_it(
    hub: Hub, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(transfer={"models": 1, **PATIENT})
    node.write_config()
    publish(hub, "first", "second")
    winding_down, go_on = asyncio.Event(), asyncio.Event()
    measure_after = Core.measure_after

    async def held(self: Core, *repos: RepoId) -> None:
        if "org/second" in repos and not winding_down.is_set():
            winding_down.set()
            await go_on.wait()
        await measure_after(self, *repos)

    monkeypatch.setattr(Core, "measure_after", held)
    daemon = Daemon(load(node.config_file))
    await daemon.start()
    try:
        hub.gate.close("first.safetensors")
        first = Asking(node, "first")
        assert await asyncio.to_thread(hub.gate.wait_for_waiting, 1)
        gone = Asking(node, "second")
        await asyncio.to_thread(wait_in_line, node, gone, "1 model comes first, transfer.models is 1")
        await asyncio.to_thread(gone.go_away)
        async with asyncio.timeout(SECONDS):
            await winding_down.wait()
        (winding_down_task,) = (t for t in asyncio.all_tasks() if t.get_name().startswith("assemble org/second"))
        again = Asking(node, "second")
        await asyncio.to_thread(wait_in_line, node, again, "1 model comes first, transfer.models is 1")
        go_on.set()
        async with asyncio.timeout(SECONDS):
            await asyncio.wait({winding_down_task})
        shown = await asyncio.to_thread(node.status)
        assert [transfer.repo_id for transfer in shown.transfers] == ["org/first", "org/second"]
        hub.gate.open()
        assert await asyncio.to_thread(first.is_ready)
        assert await asyncio.to_thread(again.is_ready)
    finally:
        go_on.set()
        await daemon.stop()


async def test_who_loses_its_turn_while_it_waits_for_space_fetches_nothing_when_it_gets_it(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    node = make_node(cache={"budget": f"{110 * MIB}B"}, transfer={"models": 1, **PATIENT})
    node.write_config()
    publish(hub, "old", size=80 * MIB)
    publish(hub, "first", "pod")
    evicting, go_on = threading.Event(), threading.Event()

    def stop_the_world(operation: str, path: str) -> None:
        if operation == "rename" and "/trash/" in path:
            evicting.set()
            assert go_on.wait(SECONDS)

    daemon = Daemon(load(node.config_file), Disk(stop_the_world))
    await daemon.start()
    try:
        assert await asyncio.to_thread(Asking(node, "old").is_ready)
        await asyncio.to_thread(node.release_all)
        first = Asking(node, "first")
        assert await asyncio.to_thread(evicting.wait, SECONDS)
        await asyncio.to_thread(first.go_away)
        hub.gate.close("pod.safetensors")
        pod = Asking(node, "pod")
        await asyncio.to_thread(node.wait_until, lambda: pod.last is not None, SECONDS, "the pod waits for space")
        go_on.set()
        assert await asyncio.to_thread(hub.gate.wait_for_waiting, 1)
        await asyncio.to_thread(assert_it_stands_still, hub, "first")
        assert begun(hub, "first") == 0
        hub.gate.open()
        assert await asyncio.to_thread(pod.is_ready)
        await asyncio.to_thread(node.wait_until, lambda: node.visible("org/first"), SECONDS, "it goes on")
    finally:
        go_on.set()
        await daemon.stop()


def reload_models(node: Node, models: int) -> None:
    node.settings["transfer"]["models"] = models
    node.write_config()
    node.ps.send_signal(signal.SIGHUP)


def test_more_turns_by_a_reload(hub: Hub, one_at_a_time: Node) -> None:
    node = one_at_a_time
    publish(hub, "first", "second")
    with downloading(hub, node, "first") as first:
        second = Asking(node, "second")
        wait_in_line(node, second, "1 model comes first, transfer.models is 1")
        reload_models(node, 2)
        assert second.is_ready()
        assert first.is_alive()

"""What was just written is warm for the load that follows; a hit reads ahead when it is asked to; looking leaves no
trace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from modelcache.client import reference
from modelcache.v1 import cache_pb2

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.warmth import make_cold, on_a_disk, warm_share

SIZE = 48 * MIB
WHOLE_SECONDS = 60


@pytest.fixture
def disk_node(tmp_path: Path, hub: Hub) -> Iterator[Callable[..., Node]]:
    """Makes and starts a node whose cache lies on a disk, not on a tmpfs."""
    nodes: list[Node] = []
    with on_a_disk(tmp_path) as directory:

        def make(**settings: Any) -> Node:
            nodes.append(Node(directory / f"node{len(nodes)}", hub.endpoint, settings).start())
            return nodes[-1]

        yield make
        for node in nodes:
            node.stop()


def publish(hub: Hub, *names: str) -> None:
    for number, name in enumerate(names):
        shards = {f"{n}.safetensors": Synthetic(SIZE // 2, 10 * number + n) for n in range(2)}
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), **shards})


def weights(node: Node, name: str) -> list[Path]:
    """Published blobs of the model's weights."""
    directory = node.hub_dir / f"models--org--{name}" / "blobs"
    return [path for path in directory.iterdir() if path.stat().st_size > MIB]


def ensure(node: Node, name: str, *, prewarm: bool | None = None) -> None:
    with node.client() as client:
        *_, last = client.ensure(reference(f"org/{name}"), prewarm=prewarm)
    assert isinstance(last, cache_pb2.Ready)


def prewarmed(node: Node, name: str) -> dict[str, Any] | None:
    lines = [line for line in node.log_lines("prewarmed") if line["model"].startswith(f"org/{name}@")]
    return lines[-1] if lines else None


def test_what_was_just_fetched_is_warm(hub: Hub, disk_node: Callable[..., Node]) -> None:
    node = disk_node()
    publish(hub, "model")
    ensure(node, "model")
    assert warm_share(*weights(node, "model")) >= 0.95


def test_what_goes_on_after_a_kill_is_warm(hub: Hub, disk_node: Callable[..., Node]) -> None:
    """A resumed prefix is hashed again, and so read: the load that follows wants that, too."""
    node = disk_node()
    publish(hub, "model")
    hub.rate = 20 * MIB
    waiting = node.popen("ensure-model", "org/model")
    assert hub.wait_until(lambda: hub.body_bytes("org/model", "0.safetensors") > SIZE // 4)
    node.kill()
    waiting.kill()
    waiting.communicate()
    partials = [path for path in (node.private / "partial").iterdir() if path.stat().st_size > MIB]
    make_cold(*partials)
    hub.rate = None
    node.start()
    ensure(node, "model")
    assert warm_share(*weights(node, "model")) >= 0.95


def test_a_hit_reads_ahead_when_it_is_asked_to(hub: Hub, disk_node: Callable[..., Node]) -> None:
    node = disk_node()
    publish(hub, "asked", "not-asked")
    for name in ("asked", "not-asked"):
        ensure(node, name)
        make_cold(*weights(node, name))
    ensure(node, "not-asked")
    done = node.run("ensure-model", "--prewarm", "org/asked")
    assert done.returncode == 0
    node.wait_until(lambda: prewarmed(node, "asked"), WHOLE_SECONDS, "it is read ahead")
    assert warm_share(*weights(node, "asked")) >= 0.95
    assert warm_share(*weights(node, "not-asked")) < 0.05, "one at a time: it would have been the first"
    line = prewarmed(node, "asked")
    assert line is not None
    assert line["read_bytes"] >= 0.95 * SIZE
    assert node.metric("modelcached_requests_total", outcome="hit") == 2


def test_the_configuration_says_what_a_request_leaves_open(hub: Hub, disk_node: Callable[..., Node]) -> None:
    node = disk_node(cache={"prewarm": True})
    publish(hub, "open", "refused")
    for name in ("open", "refused"):
        ensure(node, name, prewarm=False)
        make_cold(*weights(node, name))
    ensure(node, "refused", prewarm=False)
    ensure(node, "open")
    node.wait_until(lambda: prewarmed(node, "open"), WHOLE_SECONDS, "it is read ahead")
    assert warm_share(*weights(node, "open")) >= 0.95
    assert warm_share(*weights(node, "refused")) < 0.05


def test_the_answer_and_the_daemons_end_wait_for_no_reading(hub: Hub, disk_node: Callable[..., Node]) -> None:
    node = disk_node(cache={"prewarm_rate": "1MB"})  # a minute for all of it
    publish(hub, "model")
    ensure(node, "model")
    make_cold(*weights(node, "model"))
    ensure(node, "model", prewarm=True)
    assert warm_share(*weights(node, "model")) < 0.5
    node.wait_until(lambda: warm_share(*weights(node, "model")) > 0.1, WHOLE_SECONDS, "it is being read ahead")
    began = time.monotonic()
    assert node.terminate() == 0
    assert time.monotonic() - began < 15
    assert prewarmed(node, "model") is None
    assert warm_share(*weights(node, "model")) < 0.9


def test_what_is_being_read_ahead_can_be_evicted(hub: Hub, disk_node: Callable[..., Node]) -> None:
    node = disk_node(cache={"prewarm_rate": "1MB"})
    publish(hub, "model")
    ensure(node, "model")
    make_cold(*weights(node, "model"))
    ensure(node, "model", prewarm=True)
    node.wait_until(lambda: warm_share(*weights(node, "model")) > 0.1, WHOLE_SECONDS, "it is being read ahead")
    node.release_all()
    node.ctl("evict", "org/model", "--yes")
    assert node.visible("org/model") == []
    node.wait_until(lambda: node.log_lines("prewarming ended early"), WHOLE_SECONDS, "it is not read on")
    assert prewarmed(node, "model") is None


def test_adopting_what_is_cold_leaves_it_cold(hub: Hub, disk_node: Callable[..., Node]) -> None:
    """Files of an existing cache are hashed before the first answer."""
    node = disk_node()
    publish(hub, "model")
    ensure(node, "model")
    node.stop()
    make_cold(*weights(node, "model"))
    for path in (node.private / "manifests").rglob("*.json"):
        path.unlink()  # the daemon has never heard of it
    node.start()
    ensure(node, "model")
    assert hub.body_bytes("org/model", "0.safetensors") == SIZE // 2, "hashed, not fetched again"
    assert warm_share(*weights(node, "model")) < 0.05

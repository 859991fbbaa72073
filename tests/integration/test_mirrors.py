"""I6: an endpoint that fails is left for the next one, is not asked first for a while, and then is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from modelcache.reasons import Reason

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.node import Node
from tests.node.asking import ask

CONNECTIONS = 4
FILES = 24
LARGE = "model.safetensors"


@pytest.fixture
def mirror() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def node(hub: Hub, mirror: Hub, make_node: Callable[..., Node]) -> Node:
    settings = {"endpoints": [hub.endpoint, mirror.endpoint], "timeout": "4s", "resolve_ttl": "1ms"}
    return make_node(
        hub=settings, transfer={"connections": CONNECTIONS, "stall_timeout": "1s", "retry_timeout": "10s"}
    ).start()


def many(seed: int) -> dict[str, bytes | Synthetic]:
    """A model of many files, none of which another one has."""
    shards = {f"model-{n:02}.safetensors": Synthetic(100_000, seed=1000 * seed + n) for n in range(FILES)}
    return {"config.json": b'{"seed": %d}' % seed, **shards}


def commit(name: str, files: dict[str, bytes | Synthetic], *hubs: Hub) -> None:
    for each in hubs:
        each.create_repo(name).commit(files)


def asked(hub: Hub, *kinds: str) -> int:
    return sum(request.kind in kinds for request in hub.requests())


def test_a_dead_endpoint_is_not_asked_for_each_file_nor_for_each_question(hub: Hub, mirror: Hub, node: Node) -> None:
    commit("org/one", many(1), hub, mirror)
    commit("org/two", many(2), hub, mirror)
    hub.faults.add(Fault(FaultKind.STATUS, status=503))
    node.ensure("org/one")
    assert asked(hub, "api") == 1
    assert 1 <= asked(hub, "resolve") <= CONNECTIONS, "each connection may have been on its way"
    assert asked(mirror, "resolve") == FILES + 1
    hub.reset_counters()
    node.ensure("org/two")
    assert asked(hub, "api", "resolve") <= 4, "a trial of each kind, whenever a rest was over"


@pytest.mark.deep
def test_an_endpoint_that_has_rested_is_tried_again_and_is_first_again(hub: Hub, mirror: Hub, node: Node) -> None:
    commit("org/zero", many(0), hub, mirror)
    down = hub.faults.add(Fault(FaultKind.STATUS, status=503))
    node.ensure("org/zero")
    hub.faults.remove(down)
    numbers = iter(range(1, 100))

    def came_from_the_first() -> bool:
        number = next(numbers)
        commit(f"org/model{number}", many(number), hub, mirror)
        mirror.reset_counters()
        node.ensure(f"org/model{number}")
        return mirror.requests() == []

    node.wait_until(came_from_the_first, 60, "the first endpoint brings all again")


def test_a_stalled_range_goes_on_from_the_next_endpoint(hub: Hub, mirror: Hub, node: Node) -> None:
    size, stalled_at = 24 * MIB, 20 * MIB
    commit("org/large", {LARGE: Synthetic(size, seed=5)}, hub, mirror)
    stall = hub.faults.add(Fault(FaultKind.STALL, where="cdn", at_file_byte=stalled_at))
    began = time.monotonic()
    node.ensure("org/large")
    assert time.monotonic() - began < 10
    assert stall.fired == 1
    assert [r.range for r in mirror.requests() if r.kind == "cdn"] == [f"bytes={stalled_at}-{size - 1}"]
    assert hub.body_bytes("org/large", LARGE) + mirror.body_bytes("org/large", LARGE) == size


def test_a_silent_endpoint_takes_its_share_of_the_time_and_is_then_passed_over(
    hub: Hub, mirror: Hub, node: Node
) -> None:
    commit("org/one", many(1), hub, mirror)
    commit("org/two", many(2), hub, mirror)
    silence = hub.faults.add(Fault(FaultKind.SILENT, where="api"))
    began = time.monotonic()
    node.ensure("org/one")
    assert 2 <= time.monotonic() - began < 12
    node.ensure("org/two")
    assert silence.fired <= 2, "again only where its rest was over, not for each question"


def test_a_mirror_that_lacks_the_model_does_not_have_the_last_word(hub: Hub, mirror: Hub, node: Node) -> None:
    """The first endpoint fails once a question and once a file: the mirror's 404 must not end it."""
    commit("org/only-there", many(1), hub)
    hub.faults.add(Fault(FaultKind.STATUS, where="api", path="revision", status=503, times=1))
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", path="config.json", status=503, times=1))
    node.ensure("org/only-there")
    assert mirror.request_count(kind="api") >= 1
    assert mirror.request_count(kind="resolve") >= 1


def test_what_the_first_endpoint_refuses_is_refused(hub: Hub, mirror: Hub, node: Node) -> None:
    commit("org/elsewhere", many(1), mirror)
    assert ask(node, "org/elsewhere").reason == Reason.REPO_NOT_FOUND
    assert mirror.requests() == []


def test_one_that_limits_our_rate_is_left_alone_and_the_next_one_serves(hub: Hub, mirror: Hub, node: Node) -> None:
    commit("org/one", many(1), hub, mirror)
    commit("org/two", many(2), hub, mirror)
    hub.faults.add(Fault(FaultKind.STATUS, where="api", status=429, retry_after=60))
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=429, retry_after=60))
    node.ensure("org/one")
    assert asked(hub, "api") == 1
    assert asked(hub, "resolve") <= CONNECTIONS
    hub.reset_counters()
    node.ensure("org/two")
    assert hub.requests() == []


def test_wrong_content_is_blamed_on_one_endpoint_and_comes_right_from_the_other(
    hub: Hub, mirror: Hub, node: Node
) -> None:
    size = 24 * MIB
    commit("org/large", {LARGE: Synthetic(size, seed=6)}, hub, mirror)
    hub.faults.add(Fault(FaultKind.FLIPPED_BYTE, where="cdn"))
    node.ensure("org/large")
    assert hub.body_bytes("org/large", LARGE) == 2 * size
    assert mirror.body_bytes("org/large", LARGE) == size

"""One 429 slows every transfer of the node, once; and every question, once; each for itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.reasons import Reason

from tests.hub import Fault, FaultKind, Hub, RequestRecord, Synthetic
from tests.node import Node
from tests.node.asking import ask
from tests.node.daemon import in_threads

CONNECTIONS = 4
FILES = 16
PAUSE_SECONDS = 3.0
MODELS = [f"org/model{number}" for number in range(4)]


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    return make_node(
        hub={"timeout": "15s", "resolve_ttl": "1ms"}, transfer={"connections": CONNECTIONS, "retry_timeout": "20s"}
    ).start()


@pytest.fixture
def models(hub: Hub) -> list[str]:
    for seed, name in enumerate(MODELS):
        shards = {f"model-{n:02}.safetensors": Synthetic(100_000, seed=1000 * seed + n) for n in range(FILES)}
        hub.create_repo(name).commit({"config.json": b'{"seed": %d}' % seed, **shards})
    return MODELS


def limited(hub: Hub, where: str, **how: object) -> Fault:
    return hub.faults.add(Fault(FaultKind.STATUS, where=where, status=429, times=1, **how))  # type: ignore[arg-type]


def later(hub: Hub, request: RequestRecord) -> float:
    """Seconds after the 429."""
    return request.at - next(refused.at for refused in hub.requests() if refused.status == 429)


def in_the_pause(hub: Hub, *kinds: str) -> list[RequestRecord]:
    """What was asked between the 429 and the time that it named."""
    return [r for r in hub.requests() if r.kind in kinds and 0 < later(hub, r) < PAUSE_SECONDS]


@pytest.mark.parametrize("where", ["resolve", "cdn"])
@pytest.mark.parametrize("by", ["Retry-After", "RateLimit"])
def test_one_429_holds_back_every_flight_for_the_time_it_names(
    hub: Hub, node: Node, models: list[str], where: str, by: str
) -> None:
    how = {"retry_after": PAUSE_SECONDS} if by == "Retry-After" else {"rate_limit_reset": int(PAUSE_SECONDS)}
    fault = limited(hub, where, after_requests=10, **how)
    in_threads(len(models), lambda number: node.ensure(models[number]))
    assert fault.fired == 1
    assert hub.request_count(status=429) == 1
    paused = in_the_pause(hub, "resolve", "cdn")
    assert len(paused) <= 5 * CONNECTIONS < len(models) * FILES, "what was under way before the daemon had read it"
    assert max((later(hub, request) for request in paused), default=0.0) < PAUSE_SECONDS * 2 / 3


def test_one_429_holds_back_every_question_for_the_time_it_names(hub: Hub, node: Node, models: list[str]) -> None:
    first, *others = models
    limited(hub, "api", retry_after=PAUSE_SECONDS)
    waiting = node.popen("ensure-model", first)
    node.wait_until(lambda: node.log_lines("endpoint wants no request"), 20, "the daemon knows")
    in_threads(len(others), lambda number: node.ensure(others[number]))
    assert waiting.wait(60) == 0
    assert in_the_pause(hub, "api") == []
    assert hub.request_count(status=429) == 1


def test_a_limit_of_questions_holds_back_no_bytes(hub: Hub, node: Node, models: list[str]) -> None:
    """The Hub limits its API and its resolvers apart."""
    slow, asking = models[:2]
    hub.gate_bodies.close()
    downloading = node.popen("ensure-model", slow)
    assert hub.gate_bodies.wait_for_waiting(1)
    limited(hub, "api", retry_after=PAUSE_SECONDS)
    waiting = node.popen("ensure-model", asking)
    node.wait_until(lambda: node.log_lines("endpoint wants no request"), 20, "the daemon knows")
    hub.gate_bodies.open()
    assert downloading.wait(60) == 0
    assert waiting.wait(60) == 0
    assert len(in_the_pause(hub, "resolve", "cdn")) > CONNECTIONS


def test_a_limit_that_outlasts_the_timeout_is_told_at_once_without_another_question(
    hub: Hub, node: Node, models: list[str]
) -> None:
    first, second, cached, _ = models
    node.ensure(cached)
    hub.reset_counters()
    limited(hub, "api", retry_after=120)
    assert ask(node, first).reason == Reason.RATE_LIMITED
    began = time.monotonic()
    with node.client() as client:
        with pytest.raises(ModelCacheError) as caught:
            list(client.ensure(reference(second)))
        assert caught.value.reason == Reason.RATE_LIMITED
        assert f"{hub.endpoint} limits our rate (429), and wants no question for " in caught.value.message
        *_, ready = client.ensure(reference(cached))
        assert [model.stale for model in ready.models] == [True]
    assert time.monotonic() - began < 10
    assert len(hub.requests()) == 1

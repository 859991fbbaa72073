"""The Hub refuses or is silent: what is cached is served within two seconds, and says whether it may be stale."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2, common_pb2

from tests.hub import Fault, FaultKind, Hub
from tests.hub.models import tiny_llama
from tests.node import Node
from tests.node.daemon import in_threads

PROMISE_SECONDS = 2.5
"""Within this a cached model is answered, whatever the Hub does: 1.5 s, and what a busy machine adds."""
AT_ONCE_SECONDS = 1.2
"""What the breaker makes of it: no waiting for the Hub."""
BREAKER_SECONDS = 10.0
DEADLINE_SECONDS = 3.0
SILENCES = 10
"""Questions that a silent Hub swallows: more than the daemon has Hub threads."""


@dataclass(frozen=True)
class Answered:
    """An answer, and how long it took (from the second message of a warm connection on)."""

    ready: cache_pb2.Ready
    seconds: float

    @property
    def stale(self) -> list[bool]:
        return [model.stale for model in self.ready.models]


def ask(node: Node, repo_id: str, revision: str = "", *, adapters: tuple[str, ...] = (), token: str = "") -> Answered:
    with node.client() as client:
        began = time.monotonic()
        models = [reference(adapter) for adapter in adapters]
        *_, ready = client.ensure(reference(repo_id, revision), models, token=token)
        assert isinstance(ready, cache_pb2.Ready)
        return Answered(ready, time.monotonic() - began)


@pytest.fixture
def forgetful_node(make_node: Callable[..., Node]) -> Node:
    """A branch's commit is not believed for longer than it takes to answer: each request must ask."""
    return make_node(hub={"resolve_ttl": "1ms", "timeout": f"{DEADLINE_SECONDS:g}s"}).start()


@contextmanager
def silent(hub: Hub) -> Iterator[None]:
    """The API accepts questions and answers none."""
    fault = hub.faults.add(Fault(FaultKind.SILENT, where="api"))
    yield
    hub.faults.remove(fault)


@contextmanager
def refusing(hub: Hub) -> Iterator[None]:
    """Nobody listens."""
    hub.refuse(True)
    yield
    hub.refuse(False)


@pytest.fixture(params=[silent, refusing])
def down(request: pytest.FixtureRequest) -> Callable[[Hub], object]:
    """Both ways to be down."""
    return request.param  # type: ignore[no-any-return]


def test_a_cached_branch_is_answered_in_time_as_stale_and_fresh_again_later(
    hub: Hub, forgetful_node: Node, down: Callable[[Hub], Iterator[None]]
) -> None:
    node, repo = forgetful_node, hub.create_repo("org/tiny")
    first = repo.commit(tiny_llama())
    assert ask(node, "org/tiny").stale == [False]
    with down(hub):  # type: ignore[attr-defined]
        answered = ask(node, "org/tiny")
        assert answered.stale == [True]
        assert answered.ready.models[0].commit == first
        assert answered.ready.models[0].outcome == common_pb2.OUTCOME_HIT
        assert answered.seconds < PROMISE_SECONDS
        by_commit = ask(node, "org/tiny", first)
        assert by_commit.stale == [False]
        assert by_commit.seconds < AT_ONCE_SECONDS
        second = repo.commit(tiny_llama(seed=1))
    node.wait_until(
        lambda: ask(node, "org/tiny").stale == [False], BREAKER_SECONDS + 5, "the Hub is back, and asked again"
    )
    assert ask(node, "org/tiny").ready.models[0].commit == second


def test_a_cached_commit_makes_no_call(hub: Hub, forgetful_node: Node) -> None:
    commit = hub.create_repo("org/tiny").commit(tiny_llama())
    ask(forgetful_node, "org/tiny")
    hub.reset_counters()
    assert ask(forgetful_node, "org/tiny", commit).stale == [False]
    forgetful_node.kill()
    forgetful_node.start()
    assert ask(forgetful_node, "org/tiny", commit).stale == [False], "nor after a restart"
    assert hub.requests() == []
    ask(forgetful_node, "org/tiny")
    assert len(hub.requests()) == 1, "a branch is one question"


def test_a_base_and_its_adapters_share_the_two_seconds(hub: Hub, forgetful_node: Node) -> None:
    adapters = ("org/adapter1", "org/adapter2")
    for seed, repo_id in enumerate(("org/base", *adapters)):
        hub.create_repo(repo_id).commit(tiny_llama(seed))
    ask(forgetful_node, "org/base", adapters=adapters)
    with silent(hub):
        answered = ask(forgetful_node, "org/base", adapters=adapters)
    assert answered.stale == [True, True, True]
    assert answered.seconds < PROMISE_SECONDS


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_a_gated_model_that_the_token_could_read_is_answered_in_time(
    hub: Hub, make_node: Callable[..., Node], by: str
) -> None:
    node = make_node(hub={"resolve_ttl": "1ms", "timeout": "20s"}).start()
    repo = hub.create_repo("org/gated", gated="manual")
    commit = repo.commit(tiny_llama())
    hub.tokens.add("hf_right")
    repo.allow("hf_right")
    ask(node, "org/gated", token="hf_right")
    node.kill()
    node.start()  # what the Hub said of the token lately is forgotten, what it said at all is not
    with silent(hub):
        answered = ask(node, "org/gated", "" if by == "branch" else commit, token="hf_right")
        assert answered.seconds < PROMISE_SECONDS
        assert answered.stale == [by == "branch"]


def test_many_callers_of_a_silent_hub_do_not_stand_in_line(hub: Hub, forgetful_node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    ask(forgetful_node, "org/tiny")
    hub.reset_counters()
    with silent(hub):
        answers = in_threads(32, lambda _: ask(forgetful_node, "org/tiny"))
        assert all(answer.stale == [True] for answer in answers)
        assert max(answer.seconds for answer in answers) < PROMISE_SECONDS
        assert hub.request_count(path_glob="revision") == 1, "one question for all of them"


def test_a_question_that_is_late_already_is_not_waited_for_again(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"timeout": "20s", "resolve_ttl": "1ms"}).start()
    hub.create_repo("org/tiny").commit(tiny_llama())
    ask(node, "org/tiny")
    with silent(hub):
        assert ask(node, "org/tiny").seconds > AT_ONCE_SECONDS
        again = ask(node, "org/tiny")
    assert again.stale == [True]
    assert again.seconds < AT_ONCE_SECONDS


def test_a_hub_that_is_silent_about_three_models_is_not_asked_about_a_fourth(hub: Hub, forgetful_node: Node) -> None:
    models = [f"org/model{number}" for number in range(4)]
    for seed, repo_id in enumerate(models):
        hub.create_repo(repo_id).commit(tiny_llama(seed))
        ask(forgetful_node, repo_id)
    with silent(hub):
        waits = in_threads(3, lambda number: ask(forgetful_node, models[number]))
        assert max(answer.seconds for answer in waits) < PROMISE_SECONDS
        hub.reset_counters()
        fourth = ask(forgetful_node, models[3])
        assert fourth.stale == [True]
        assert fourth.seconds < AT_ONCE_SECONDS
        assert hub.request_count(repo=models[3]) == 0, "the breaker is everybody's"


def test_a_slow_answer_to_many_callers_is_one_failure(hub: Hub, forgetful_node: Node) -> None:
    for seed, repo_id in enumerate(("org/slow", "org/other")):
        hub.create_repo(repo_id).commit(tiny_llama(seed))
        ask(forgetful_node, repo_id)
    hub.faults.add(Fault(FaultKind.SILENT, where="api", repo="org/slow"))
    in_threads(8, lambda _: ask(forgetful_node, "org/slow"))
    assert ask(forgetful_node, "org/other").stale == [False], "the Hub answers: nothing keeps others from asking"


def test_blocked_hub_threads_stop_no_hit_of_another_model(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"timeout": "20s", "resolve_ttl": "1ms"}).start()
    commit = hub.create_repo("org/tiny").commit(tiny_llama())
    ask(node, "org/tiny")
    with silent(hub):
        waiting = [node.popen("ensure-model", f"org/unknown{n}") for n in range(SILENCES)]
        try:
            assert hub.wait_until(lambda: hub.request_count(path_glob="revision") >= 8 + 1)
            by_branch, by_commit = ask(node, "org/tiny"), ask(node, "org/tiny", commit)
        finally:
            for process in waiting:
                process.kill()
                process.communicate()
    assert by_commit.seconds < AT_ONCE_SECONDS
    assert by_branch.seconds < PROMISE_SECONDS
    assert (by_commit.stale, by_branch.stale) == ([False], [True])


def test_nothing_cached_is_a_refusal_within_the_deadline(
    hub: Hub, forgetful_node: Node, down: Callable[[Hub], Iterator[None]]
) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    with down(hub):  # type: ignore[attr-defined]
        began = time.monotonic()
        refused = forgetful_node.run("ensure-model", "org/tiny")
        seconds = time.monotonic() - began
        with pytest.raises(ModelCacheError) as told:
            ask(forgetful_node, "org/tiny")
    assert refused.returncode == 69
    assert hub.endpoint in refused.stderr, "says whom it asked"
    assert seconds < DEADLINE_SECONDS + 2
    assert told.value.reason == ("UPSTREAM_STALLED" if down is silent else "UPSTREAM_UNAVAILABLE")


def test_a_silent_hub_does_not_delay_the_daemons_end(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"timeout": "60s"}).start()
    hub.create_repo("org/tiny").commit(tiny_llama())
    with silent(hub), node.client() as client:
        stream = iter(client.ensure(reference("org/tiny")))
        next(stream)
        assert hub.wait_until(lambda: hub.request_count(path_glob="revision") == 1)
        began = time.monotonic()
        assert node.terminate() == 0
        assert time.monotonic() - began < 5
        with pytest.raises(ModelCacheError) as told:
            list(stream)
    assert told.value.reason == "SHUTTING_DOWN"

"""I6: an endpoint that failed lately is not asked first, is tried again by one, is left alone where it asks for it."""

from __future__ import annotations

from datetime import timedelta

import pytest
from modelcached.errors import Reason
from modelcached.sources.endpoints import FIRST_REST, LEAST_PAUSE, MOST_REST, Endpoints
from modelcached.sources.faults import TransientError

A, B = "https://a.example", "https://b.example"
BOTH = {A, B}
REST = FIRST_REST.total_seconds()
GONE = TransientError(Reason.UPSTREAM_UNAVAILABLE, "gone")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def endpoints(clock: Clock) -> Endpoints:
    return Endpoints([A + "/", B], "questions", clock)


def limited(seconds: float | None) -> TransientError:
    after = timedelta(seconds=seconds) if seconds is not None else None
    return TransientError(Reason.RATE_LIMITED, "429", retry_after=after)


def test_the_first_is_asked_as_long_as_it_answers(endpoints: Endpoints) -> None:
    assert endpoints.names == (A, B)
    assert [endpoints.choose(BOTH) for _ in range(3)] == [A, A, A]
    assert endpoints.choose({B}) == B


def test_one_that_failed_rests(endpoints: Endpoints, clock: Clock) -> None:
    endpoints.failed(A, GONE)
    assert endpoints.rested(BOTH)
    assert not endpoints.rested({A})
    clock.now += REST - 1
    assert [endpoints.choose(BOTH) for _ in range(3)] == [B, B, B]


def test_after_its_rest_one_caller_tries_it_and_the_others_wait_for_its_answer(
    endpoints: Endpoints, clock: Clock
) -> None:
    endpoints.failed(A, GONE)
    clock.now += REST
    assert [endpoints.choose(BOTH) for _ in range(3)] == [A, B, B]
    endpoints.answered(A)
    assert endpoints.choose(BOTH) == A
    endpoints.failed(A, GONE)
    clock.now += REST - 1
    assert endpoints.choose(BOTH) == B
    clock.now += 1
    assert endpoints.choose(BOTH) == A, "an answer made all forgotten"


def test_each_trial_that_fails_doubles_the_rest_and_there_is_a_most(endpoints: Endpoints, clock: Clock) -> None:
    endpoints.failed(A, GONE)
    rest, rests = REST, []
    while len(rests) < 10:
        clock.now += rest - 0.5
        assert endpoints.choose(BOTH) == B
        clock.now += 0.5
        assert endpoints.choose(BOTH) == A
        endpoints.failed(A, GONE)
        rest = min(2 * rest, MOST_REST.total_seconds())
        rests.append(rest)
    assert rests[:3] == [2 * REST, 4 * REST, 8 * REST]
    assert rests[-1] == MOST_REST.total_seconds()


def test_many_failures_at_once_are_one(endpoints: Endpoints, clock: Clock) -> None:
    for _ in range(8):
        endpoints.failed(A, GONE)
    clock.now += REST
    assert endpoints.choose(BOTH) == A


def test_when_all_rest_the_one_whose_rest_is_over_first_is_asked(endpoints: Endpoints, clock: Clock) -> None:
    endpoints.failed(B, GONE)
    clock.now += 1
    endpoints.failed(A, GONE)
    assert not endpoints.rested(BOTH)
    assert endpoints.choose(BOTH) == B
    assert endpoints.seconds_closed(BOTH) == 0, "to rest is no ban"


def test_the_only_one_is_asked_whatever_it_did(endpoints: Endpoints, clock: Clock) -> None:
    endpoints.failed(A, GONE)
    assert endpoints.choose({A}) == A
    clock.now += REST
    assert [endpoints.choose({A}) for _ in range(2)] == [A, A]


def test_a_pause_that_it_asks_for_is_kept_even_when_it_answered_others(endpoints: Endpoints, clock: Clock) -> None:
    endpoints.failed(A, limited(60))
    endpoints.answered(A)
    assert endpoints.choose(BOTH) == B
    assert endpoints.seconds_closed(BOTH) == 0
    assert endpoints.seconds_closed({A}) == 60
    endpoints.failed(B, limited(10))
    assert endpoints.seconds_closed(BOTH) == 10
    assert endpoints.choose(BOTH) == B, "which is open again first"
    clock.now += 60
    assert endpoints.seconds_closed({A}) == 0
    assert endpoints.choose(BOTH) == A


def test_a_429_that_names_no_time_asks_for_a_little_and_a_long_one_has_a_limit(endpoints: Endpoints) -> None:
    endpoints.failed(A, limited(None))
    assert endpoints.seconds_closed({A}) == LEAST_PAUSE.total_seconds()
    endpoints.failed(A, limited(86400))
    assert endpoints.seconds_closed({A}) == MOST_REST.total_seconds()

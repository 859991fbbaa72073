"""I2 and I6: one file from several endpoints: whose turn a range is, whose word is the last, and who is to blame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Commit, Digest, FileEntry, RepoId
from modelcached.sources.abort import Abort
from modelcached.sources.endpoints import FIRST_REST, Endpoints
from modelcached.sources.faults import TransientError
from modelcached.sources.http import RemoteFile
from modelcached.sources.origin import HubOrigin
from modelcached.sources.sink import Sink

A, B, C = "https://a.example", "https://b.example", "https://c.example"
GONE = TransientError(Reason.UPSTREAM_UNAVAILABLE, "gone")
MISSING = CacheError(Reason.REPO_NOT_FOUND, "missing")


@dataclass
class FakeSource:
    """What each endpoint does next; it brings the range where nothing is planned."""

    plans: dict[str, list[Exception]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def fetch(self, file: RemoteFile, _start: int, _end: int, _sink: Sink, _abort: Abort) -> None:
        self.asked.append(file.endpoint)
        if plan := self.plans.get(file.endpoint):
            error = plan.pop(0)
            raise type(error)(error.reason, error.message, **rest(error))  # type: ignore[attr-defined]

    def forget(self, file: RemoteFile) -> None:
        self.forgotten.append(file.endpoint)


def rest(error: Exception) -> dict[str, object]:
    return {"retry_after": error.retry_after} if isinstance(error, TransientError) else {}


@dataclass
class Case:
    source: FakeSource
    origin: HubOrigin
    now: float = 0.0

    def fetch(self, part: int = 1) -> None:
        self.origin.fetch(0, part, lambda _view, _offset: None, Abort())

    def fetched_from(self, part: int = 1) -> list[str]:
        before = len(self.source.asked)
        self.fetch(part)
        return self.source.asked[before:]


@pytest.fixture
def make() -> Callable[..., Case]:
    def made(*names: str, **plans: list[Exception]) -> Case:
        by_name = {"a": A, "b": B, "c": C}
        source = FakeSource({by_name[key]: plan for key, plan in plans.items()})
        entry = FileEntry("x", 1, Digest(Algorithm.SHA256, "0" * 64), "0" * 40)
        files = {name: RemoteFile(name, RepoId("org/name"), Commit("0" * 40), entry, None) for name in names}
        case: Case
        endpoints = Endpoints(names, "transfers", lambda: case.now)
        case = Case(source, HubOrigin(source, endpoints, files))  # type: ignore[arg-type]
        return case

    return made


def test_a_range_that_failed_goes_on_from_the_next_even_when_the_first_works_for_others(
    make: Callable[..., Case],
) -> None:
    case = make(A, B, a=[GONE])
    with pytest.raises(TransientError, match=r"gone \(from https://a.example\)"):
        case.fetch(part=1)
    case.origin.endpoints.answered(A)
    assert case.fetched_from(part=2) == [A]
    assert case.fetched_from(part=1) == [B]
    assert case.fetched_from(part=1) == [A], "what it brought is no grudge"


def test_the_only_endpoint_is_asked_again(make: Callable[..., Case]) -> None:
    case = make(A, a=[GONE])
    with pytest.raises(TransientError, match=r"^gone$"):
        case.fetch()
    assert case.fetched_from() == [A]


def test_a_mirror_that_refuses_is_left_out_and_the_first_has_the_last_word(make: Callable[..., Case]) -> None:
    case = make(A, B, C, b=[MISSING] * 9, c=[MISSING] * 9)
    case.origin.endpoints.failed(A, GONE)
    assert case.fetched_from() == [B, C, A]
    case.origin.endpoints.failed(A, GONE)
    assert case.fetched_from() == [A], "for good"
    case.source.plans[A] = [MISSING]
    with pytest.raises(CacheError, match="missing"):
        case.fetch()


def test_an_error_of_the_sink_is_nobodys_refusal(make: Callable[..., Case]) -> None:
    case = make(A, B, b=[CacheError(Reason.NO_SPACE_NOW, "full")])
    case.origin.endpoints.failed(A, GONE)
    with pytest.raises(CacheError, match="full"):
        case.fetch()
    assert case.source.asked == [B]


def test_a_429_of_one_is_told_only_when_all_want_to_be_left_alone(make: Callable[..., Case]) -> None:
    limited = TransientError(Reason.RATE_LIMITED, "429", retry_after=timedelta(seconds=60))
    case = make(A, B, a=[limited], b=[limited])
    with pytest.raises(TransientError, match="429"):
        case.fetch()
    assert case.source.asked == [A, B]


def test_wrong_content_comes_from_one_alone_until_each_was_to_blame(make: Callable[..., Case]) -> None:
    case = make(A, B)
    assert case.origin.content_tries == 3
    case.fetch()
    case.origin.forget()
    assert case.source.forgotten == [A, B]
    assert [case.fetched_from(part) for part in (1, 2)] == [[A], [A]]
    case.origin.forget()
    assert [case.fetched_from(part) for part in (1, 2)] == [[B], [B]]
    case.origin.forget()
    assert case.fetched_from() == [A]


def test_one_that_rests_does_not_bring_it_alone(make: Callable[..., Case]) -> None:
    case = make(A, B, a=[GONE])
    with pytest.raises(TransientError):
        case.fetch()
    case.origin.forget()
    assert case.fetched_from() == [B]
    case.now += FIRST_REST.total_seconds()
    assert case.fetched_from() == [B], "once begun, it brings all"
    case.source.plans[B] = [GONE]
    with pytest.raises(TransientError):
        case.fetch()
    assert case.fetched_from() == [A], "unless it fails"

"""Answers go before bytes, and bytes get on all the same."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from modelcache.v1 import cache_pb2, common_pb2
from modelcached import precedence as module
from modelcached.cache import Watch
from modelcached.precedence import Precedence
from modelcached.service import cache_service, telling
from modelcached.service.cache_service import CacheService
from modelcached.service.status import Gate


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that a test can tell whether a piece waits."""
    monkeypatch.setattr(module, "LONGEST_SECONDS", 30.0)


def waits(precedence: Precedence) -> bool:
    """Whether a piece would wait at this moment."""
    passing = threading.Thread(target=precedence.let_pass, daemon=True)
    passing.start()
    passing.join(0.1)
    return passing.is_alive()


def test_bytes_wait_while_anything_is_answered() -> None:
    precedence = Precedence()
    assert not waits(precedence)
    first, second = precedence.begin(), precedence.begin()
    passing = threading.Thread(target=precedence.let_pass, daemon=True)
    passing.start()
    first.end()
    first.end()
    passing.join(0.1)
    assert passing.is_alive()
    second.end()
    passing.join(10)
    assert not passing.is_alive()
    assert not waits(precedence)


def test_bytes_get_on_where_answers_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.001)
    monkeypatch.setattr(module, "REST_SECONDS", 0.0)
    precedence = Precedence()
    precedence.begin()
    assert not waits(precedence)
    monkeypatch.setattr(module, "LONGEST_SECONDS", 30.0)
    assert waits(precedence)


def test_bytes_that_have_waited_in_vain_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_SECONDS", 0.001)
    monkeypatch.setattr(module, "REST_SECONDS", 30.0)
    precedence = Precedence()
    precedence.begin()
    precedence.let_pass()
    monkeypatch.setattr(module, "LONGEST_SECONDS", 30.0)
    assert not waits(precedence)


def test_a_request_that_waits_for_bytes_does_not_hold_them_up() -> None:
    precedence = Precedence()
    watch = Watch(answer=precedence.begin())
    assert waits(precedence)
    watch.follow(cast("Any", object()), lambda _: 1)
    assert not waits(precedence)


class Call:
    """A call of EnsureModel; ``seen`` says whether bytes waited for it at each of its steps."""

    def __init__(self, *, fails: bool = False, takes_seconds: float = 0.0) -> None:
        self.precedence = Precedence()
        self.core = SimpleNamespace(pools=SimpleNamespace(precedence=self.precedence), clock=None)
        self.seen: list[bool] = []
        self._fails = fails
        self._seconds = takes_seconds

    async def ensure(self, _request: object, _watch: object, _pod_seen: object) -> None:
        await asyncio.sleep(self._seconds)
        self.seen.append(waits(self.precedence))
        if self._fails:
            raise ValueError

    async def write(self, _message: object) -> None:
        self.seen.append(waits(self.precedence))

    async def abort(self, *_: object, **__: object) -> None:
        raise ValueError

    async def run(self) -> list[bool]:
        service = CacheService(cast("Any", self), Gate(8), lambda _uid: False)
        request = cache_pb2.EnsureModelRequest(model=common_pb2.ModelReference(repo_id="org/name"))
        with contextlib.suppress(ValueError):
            await service.EnsureModel(request, self)
        return self.seen


@pytest.fixture
def any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_service.translate, "ready_message", lambda *_: cache_pb2.EnsureModelResponse())


@pytest.mark.usefixtures("any_answer")
@pytest.mark.parametrize("fails", [False, True])
async def test_a_call_goes_first_until_its_answer_has_left(*, fails: bool) -> None:
    call = Call(fails=fails)
    assert await call.run() == ([True] if fails else [True, True])
    assert not waits(call.precedence)


@pytest.mark.usefixtures("any_answer")
async def test_a_call_that_takes_long_is_no_hit_and_goes_first_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "FIRST_SECONDS", 0.0)
    call = Call(takes_seconds=0.2)
    assert await call.run()
    assert not any(call.seen)

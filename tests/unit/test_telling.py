"""A caller hears how its request stands also when nothing changes: else a silent Hub looks like a daemon that hangs."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from modelcached.cache import Watch
from modelcached.cache.requests import Phase, Progress
from modelcached.service import telling


class Waiting:
    """A request that waits for one thing all the time."""

    def progress(self) -> Progress:
        return Progress(Phase.RESOLVING)

    def step_back(self) -> None:
        pass


@pytest.mark.parametrize(("unchanged", "least", "most"), [(0.0, 3, 1000), (60.0, 1, 1)])
async def test_what_does_not_change_is_told_again(
    monkeypatch: pytest.MonkeyPatch, unchanged: float, least: int, most: int
) -> None:
    monkeypatch.setattr(telling, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(telling, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(telling, "_UNCHANGED_SECONDS", unchanged)
    told: list[Any] = []

    async def write(step: Any) -> None:
        told.append(step)

    async def request() -> str:
        await asyncio.sleep(0.2)
        return "answer"

    assert await telling.Telling().told(cast("Watch", Waiting()), "id", write, request()) == "answer"
    assert least <= len(told) - 1 <= most  # the last one says that it is ready


async def test_only_who_still_waits_then_is_told_and_each_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "FIRST_SECONDS", 0.1)
    both, told = telling.Telling(), []
    began = asyncio.get_running_loop().time()

    async def ask(name: str, later: float, seconds: float) -> None:
        async def write(_step: Any) -> None:
            told.append((name, asyncio.get_running_loop().time() - began - later))

        await asyncio.sleep(later)
        await both.told(cast("Watch", Waiting()), name, write, asyncio.sleep(seconds))

    await asyncio.gather(ask("hit", 0, 0.01), ask("first", 0, 0.15), ask("later", 0.06, 0.15))
    assert [name for name, _ in told] == ["first", "first", "later", "later"], "its step, and that it is ready"
    assert all(seconds >= 0.1 for _, seconds in told)
    await asyncio.gather(ask("again", 0, 0.15))
    assert told[-1][0] == "again"


async def test_hits_one_after_the_other_cost_no_timer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "FIRST_SECONDS", 0.1)
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at
    monkeypatch.setattr(loop, "call_at", lambda when, call, **how: timers.append(call) or call_at(when, call, **how))
    one, until = telling.Telling(), loop.time() + 0.35
    asked = 0
    while loop.time() < until:
        await one.told(cast("Watch", Waiting()), "hit", cast("Any", None), asyncio.sleep(0))
        asked += 1
    assert asked > 100
    assert len(timers) <= 4

"""A caller hears how its request stands also when nothing changes: else a silent Hub looks like a daemon that hangs."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from modelcached.cache import Watch
from modelcached.cache.requests import Phase, Progress
from modelcached.service import cache_service


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
    monkeypatch.setattr(cache_service, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(cache_service, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(cache_service, "_UNCHANGED_SECONDS", unchanged)
    told: list[Any] = []

    async def write(step: Any) -> None:
        told.append(step)

    async def request() -> str:
        await asyncio.sleep(0.2)
        return "answer"

    assert await cache_service.told(cast("Watch", Waiting()), "id", write, request()) == "answer"
    assert least <= len(told) - 1 <= most  # the last one says that it is ready

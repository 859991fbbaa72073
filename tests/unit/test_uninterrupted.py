"""What changes disk and account together is not left half done by a caller that goes."""

from __future__ import annotations

import asyncio

import pytest
from modelcached.cache.uninterrupted import uninterrupted
from structlog.testing import capture_logs


async def test_who_is_cancelled_twice_ends_behind_the_work() -> None:
    go, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await go.wait()
        done.set()

    task = asyncio.create_task(uninterrupted(work()))
    for _ in range(2):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_an_answer_and_a_failure_are_the_callers() -> None:
    async def answer() -> int:
        return 3

    async def fail() -> None:
        raise OSError("no disk")

    assert await uninterrupted(answer()) == 3
    with pytest.raises(OSError, match="no disk"):
        await uninterrupted(fail())


async def test_what_fails_behind_a_caller_that_has_gone_is_logged() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise OSError("no disk")

    with capture_logs() as lines:
        task = asyncio.create_task(uninterrupted(fail()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert [line["why"] for line in lines] == ["OSError('no disk')"]

"""Who waits for an eviction may give up; the eviction goes on."""

from __future__ import annotations

import asyncio

import pytest
from modelcached.cache.eviction import finished


async def test_cancelling_the_wait_does_not_end_the_removal() -> None:
    go_on = asyncio.Event()

    async def removal() -> int:
        await go_on.wait()
        return 7

    task = asyncio.create_task(removal())
    waiting = asyncio.create_task(finished([task]))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not task.done()
    go_on.set()
    assert await task == 7


async def test_a_failed_removal_is_told_beside_the_others() -> None:
    async def fails() -> int:
        raise OSError("no")

    async def frees() -> int:
        return 3

    results = await finished([asyncio.create_task(fails()), asyncio.create_task(frees())])
    assert isinstance(results[0], OSError)
    assert results[1] == 3

"""A lock for each key, which is gone with the last who wants it."""

from __future__ import annotations

import asyncio

import pytest
from modelcached.cache.locks import Locks


async def test_one_at_a_time_for_a_key_in_the_order_of_asking_and_others_meanwhile() -> None:
    locks: Locks[str] = Locks()
    order: list[str] = []

    async def hold(key: str, name: str, until: asyncio.Event) -> None:
        async with locks(key):
            order.append(name)
            await until.wait()

    first, second = asyncio.Event(), asyncio.Event()
    second.set()
    tasks = [
        asyncio.create_task(hold("a", "a1", first)),
        asyncio.create_task(hold("a", "a2", second)),
        asyncio.create_task(hold("b", "b1", second)),
    ]
    await asyncio.wait(tasks, timeout=0.05)
    assert order == ["a1", "b1"]
    first.set()
    await asyncio.gather(*tasks)
    assert order == ["a1", "b1", "a2"]
    assert locks._entries == {}


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    locks: Locks[str] = Locks()

    async def hold() -> None:
        async with locks("a"):
            pass

    async with locks("a"):
        waiting = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(locks._entries) == 1
    assert locks._entries == {}
    async with asyncio.timeout(1):
        await hold()

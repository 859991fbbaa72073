"""Threads for blocking work."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Iterator

import pytest
import structlog
from modelcached.pools import HASH_NICE, Pools, Threads


async def test_what_a_thread_logs_carries_its_request() -> None:
    pools = Pools.start(connections=1)
    try:
        with structlog.contextvars.bound_contextvars(request_id="7"):
            for run in (pools.on_disk, pools.on_hub, pools.on_hash, pools.on_flush, pools.on_mover):
                assert await run(structlog.contextvars.get_contextvars) == {"request_id": "7"}
        assert await pools.on_disk(structlog.contextvars.get_contextvars) == {}
    finally:
        pools.stop()


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(1, "one")
    yield made
    made.stop(wait=True)


async def test_what_a_thread_raises_is_raised_here(threads: Threads) -> None:
    def fail() -> None:
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        await threads.run(fail)
    assert await threads.run(lambda: 7) == 7, "the thread goes on"


async def test_work_that_nobody_wants_any_more_is_not_begun(threads: Threads) -> None:
    gate, begun = threading.Event(), []
    first = asyncio.create_task(threads.run(gate.wait))
    second = asyncio.create_task(threads.run(lambda: begun.append("second")))
    await asyncio.sleep(0.01)
    second.cancel()
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    gate.set()
    assert await threads.run(lambda: "after") == "after", "what was cancelled while it ran has let the thread go"
    assert begun == []


async def test_there_are_never_more_threads_than_the_size() -> None:
    few = Threads(2, "few")
    names: set[str] = set()

    def work() -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.002)

    await asyncio.gather(*(few.run(work) for _ in range(40)))
    few.stop(wait=True)
    assert names == {"few_0", "few_1"}


async def test_a_machine_that_gives_no_thread_now_fails_nobody_whom_another_thread_can_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads, gate = Threads(2, "few"), threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            await threads.run(lambda: 1)
    waiting = asyncio.create_task(threads.run(gate.wait))
    await asyncio.sleep(0.01)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        second = asyncio.create_task(threads.run(lambda: 2))
        await asyncio.sleep(0.01)
        assert not second.done(), "it stands in line"
    assert await threads.run(lambda: 3) == 3, "the next one brings a thread"
    assert await second == 2
    gate.set()
    assert await waiting is True
    threads.stop(wait=True)


async def test_a_stop_waits_for_what_runs_and_refuses_what_comes() -> None:
    threads, ended = Threads(1, "one"), []

    def work() -> None:
        time.sleep(0.05)
        ended.append("work")

    running = asyncio.create_task(threads.run(work))
    await asyncio.sleep(0.01)
    threads.stop(wait=True)
    assert ended == ["work"]
    await running
    with pytest.raises(RuntimeError, match="one threads are stopped"):
        await threads.run(work)


async def test_hashing_steps_back_behind_answers_and_nothing_else_does() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    pools = Pools.start(connections=1)
    try:
        own = nice()
        for run in (pools.on_disk, pools.on_hub, pools.on_flush, pools.on_mover):
            assert await run(nice) == own
        assert await pools.on_hash(nice) == min(19, own + HASH_NICE) > own
        assert nice() == own
    finally:
        pools.stop()


async def test_what_moves_bytes_takes_nobodys_place_when_it_wakes_and_answers_do() -> None:
    def policy() -> int:
        return os.sched_getscheduler(0)

    pools = Pools.start(connections=1)
    try:
        for run in (pools.on_hash, pools.on_flush, pools.on_mover):
            assert await run(policy) == os.SCHED_BATCH
        for run in (pools.on_disk, pools.on_hub):
            assert await run(policy) == os.SCHED_OTHER
        assert policy() == os.SCHED_OTHER
    finally:
        pools.stop()


async def test_where_a_sandbox_forbids_to_step_back_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def refuse(*arguments: object) -> None:
        refused.append(arguments)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    threads = Threads(1, "one", in_bulk=True)
    assert await threads.run(lambda: "done") == "done"
    assert len(refused) == 1
    threads.stop(wait=True)


async def test_who_reads_when_nobody_else_does_has_the_idle_class_and_nobody_else_has() -> None:
    get = {"x86_64": 252, "aarch64": 31}[os.uname().machine]

    def io_class() -> int:
        """ioprio_get(2) of the calling thread."""
        priority: int = ctypes.CDLL(None).syscall(get, 1, 0)
        return priority >> 13

    idle, other = Threads(1, "scrub", nice=19, idle_io=True), Threads(1, "disk")
    assert await idle.run(io_class) == 3
    assert await other.run(io_class) != 3
    idle.stop(wait=True)
    other.stop(wait=True)

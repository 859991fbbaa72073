"""What is evicted in the background goes a file at a time, and at once as soon as somebody waits for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from modelcached.cache import Core
from modelcached.cache.admission import admit
from modelcached.cache.eviction import condemn
from modelcached.config import Config
from modelcached.errors import CacheError, Reason
from modelcached.ledger.space import Amount, Limits
from modelcached.model import Commit, RepoId, SnapshotId

from tests.node.core import a_core, believe, put_snapshot

MIB = 1 << 20
FIRST = SnapshotId(RepoId("org/first"), Commit("1" * 40))
SECOND = SnapshotId(RepoId("org/second"), Commit("2" * 40))
FILES = {f"shard-{n}": bytes([n]) * MIB for n in range(3)}
NEVER = 1
"""Bytes a second: the pause after a file of a MiB takes twelve days."""


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[Core]:
    """Two models of three files each."""
    with a_core(tmp_path, []) as made:
        for snapshot in (FIRST, SECOND):
            files = {path: content + snapshot.commit.encode() for path, content in FILES.items()}
            put_snapshot(made, snapshot, files)
            believe(made, snapshot.repo_id, {snapshot: files})
            await made.measure_after(snapshot.repo_id)
        made.space.limits = Limits(1 << 40, 0)
        at_rate(made, NEVER)
        yield made


def at_rate(core: Core, bytes_per_second: int) -> None:
    cache = core.config.cache.model_copy(update={"evict_rate": bytes_per_second})
    core.config = Config().model_copy(update={"cache": cache})


def blobs(core: Core, snapshot: SnapshotId) -> int:
    try:
        return len(os.listdir(Path(core.layout.repo(snapshot.repo_id)) / "blobs"))
    except FileNotFoundError:
        return 0


def exists(path: str) -> bool:
    return Path(path).exists()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the daemon has no event for a test
            await asyncio.sleep(0.005)


async def nothing_is_here() -> None:
    """What a request sees that needs all of its model."""


async def pausing(core: Core) -> asyncio.Task[int]:
    """An eviction after its first file."""
    before = core.space.used_bytes
    [task] = condemn(core, [FIRST], "watermark", leisurely=True)
    await until(lambda: core.space.used_bytes <= before - MIB)
    assert not exists(core.layout.snapshot(FIRST))
    assert blobs(core, FIRST) == 2
    return task


async def goes(core: Core, task: asyncio.Task[int]) -> None:
    async with asyncio.timeout(30):
        await asyncio.shield(task)
    assert not exists(core.layout.repo(FIRST.repo_id))


async def test_it_pauses_after_a_file(core: Core) -> None:
    task = await pausing(core)
    await asyncio.sleep(0.1)
    assert (blobs(core, FIRST), task.done()) == (2, False)
    with core.pacer.hurried():
        await goes(core, task)


async def test_without_a_limit_it_does_not_pause(core: Core) -> None:
    at_rate(core, 0)
    [task] = condemn(core, [FIRST], "watermark", leisurely=True)
    await goes(core, task)


async def test_what_somebody_asked_for_does_not_pause(core: Core) -> None:
    [task] = condemn(core, [FIRST], "operator")
    await goes(core, task)


async def test_two_share_the_rate(core: Core) -> None:
    loop = asyncio.get_running_loop()
    at_rate(core, 20 * MIB)
    began = loop.time()
    async with asyncio.timeout(30):
        await asyncio.gather(*condemn(core, [FIRST, SECOND], "watermark", leisurely=True))
    assert loop.time() - began >= 6 / 20


async def test_who_is_in_line_and_finds_room_does_not(core: Core) -> None:
    task = await pausing(core)
    reservation = await admit(core, MIB, nothing_is_here, lambda: Amount(MIB), "a model")
    reservation.release()
    await asyncio.sleep(0.1)
    assert (blobs(core, FIRST), task.done()) == (2, False)
    with core.pacer.hurried():
        await goes(core, task)


async def test_a_request_for_the_same_repository_ends_the_pause(core: Core) -> None:
    task = await pausing(core)
    async with asyncio.timeout(30):
        await core.settled(FIRST.repo_id)
    await goes(core, task)


async def test_who_only_takes_something_out_of_it_ends_the_pause(core: Core) -> None:
    task = await pausing(core)
    async with asyncio.timeout(30), core.taking_from(FIRST.repo_id):
        assert not core.pacer.hurries
    await goes(core, task)


async def test_a_filesystem_that_is_short_of_space_ends_the_pause(core: Core) -> None:
    task = await pausing(core)
    core.pacer.set_urgent(True)
    await goes(core, task)
    core.pacer.set_urgent(False)
    assert not core.pacer.hurries


async def test_who_gives_up_waiting_ends_nothing_and_the_pauses_come_back(core: Core) -> None:
    task = await pausing(core)
    with core.pacer.hurried():
        waiting = asyncio.create_task(core.until_evicted([task]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert core.pacer.hurries
    assert not core.pacer.hurries
    core.pacer.set_urgent(True)
    await goes(core, task)


async def test_nothing_more_is_evicted_while_what_is_going_may_be_enough(core: Core) -> None:
    await pausing(core)
    free = 2 * MIB + 4096  # the second and third file of the first model, and what is there besides
    core.space.limits = Limits(core.space.used_bytes + 4096, 0)

    async with asyncio.timeout(30):
        reservation = await admit(core, free, nothing_is_here, lambda: Amount(free), "a model")
    reservation.release()
    assert blobs(core, SECOND) == 3
    assert core.index.snapshot(SECOND) is not None


async def test_a_file_that_cannot_be_removed_is_told_of_once_though_nobody_waits(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_repo_id: RepoId, _digest: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(core.snapshots, "remove_blob", refuse)
    [task] = condemn(core, [FIRST], "watermark", leisurely=True)
    untold: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: untold.append(context))
    await asyncio.wait({task})
    error = task.exception()
    assert isinstance(error, CacheError)
    assert error.reason is Reason.STORAGE_ERROR
    assert "eviction" in core.degraded
    assert not core.evictions
    assert not untold


async def test_each_end_is_told_to_who_waits(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = core.snapshots.remove_blob

    def refuse(repo_id: RepoId, digest: object) -> int:
        if repo_id == SECOND.repo_id:
            raise PermissionError(1, "Operation not permitted")
        return remove(repo_id, digest)  # type: ignore[arg-type]

    monkeypatch.setattr(core.snapshots, "remove_blob", refuse)
    first, second = await core.until_evicted(condemn(core, [FIRST, SECOND], "operator"))
    assert isinstance(first, int)
    assert first >= 3 * MIB
    assert isinstance(second, CacheError)

"""What happens between a thread's work and the step of the event loop that hears of it: belief stays the disk's."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from modelcached.cache import Core, eviction, linking
from modelcached.cache.account import FlightAccount
from modelcached.cache.admission import admit
from modelcached.cache.leftovers import drop_leftovers
from modelcached.cache.pointing import point
from modelcached.cache.shortage import NoRoomError
from modelcached.cache.verification import condemn
from modelcached.events import BlobCondemned, Event
from modelcached.ledger.space import Amount, Limits
from modelcached.ledger.victims import Name
from modelcached.model import Commit, RepoId, Revision, SnapshotId
from modelcached.store.index import SnapshotState
from modelcached.store.measure import Filesystem
from modelcached.transfer.flight import Flight

from tests.hub import MIB
from tests.node.core import a_core, believe, digest_of, put_snapshot

DONOR, TARGET = RepoId("org/donor"), RepoId("org/target")
FIRST, SECOND = (SnapshotId(DONOR, Commit(name * 40)) for name in "12")
MAIN = Revision("main")
CONTENT = b"weights"
DIGEST = digest_of(CONTENT)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def core(tmp_path: Path, events: list[Event]) -> Iterator[Core]:
    """With one model that is believed."""
    with a_core(tmp_path, events) as made:
        put_snapshot(made, FIRST, {"model.safetensors": CONTENT})
        believe(made, DONOR, {FIRST: {"model.safetensors": CONTENT}})
        yield made


def names_in(directory: str) -> list[str]:
    return os.listdir(directory)


def put_staged(core: Core) -> None:
    Path(core.layout.staged("taken")).write_bytes(CONTENT)


def main_of(core: Core) -> tuple[Commit, str]:
    """As it is believed, and as it is on the disk."""
    return core.index.repo(DONOR).refs[MAIN], Path(core.layout.ref(DONOR, MAIN)).read_text()


async def link(core: Core) -> bool | None:
    return await linking._link_from(core, DONOR, DIGEST, TARGET)


def while_it_is_linked(core: Core, monkeypatch: pytest.MonkeyPatch, before: Any = None, after: Any = None) -> None:
    """In the thread, on either side of the change."""
    original = core.snapshots.link_blob

    def linked(*arguments: Any) -> Any:
        if before is not None:
            before()
        status = original(*arguments)
        if after is not None:
            after()
        return status

    monkeypatch.setattr(type(core.snapshots), "link_blob", lambda _store, *arguments: linked(*arguments))


async def test_what_is_linked_is_believed(core: Core) -> None:
    assert await link(core) is True
    assert core.index.donors(DIGEST) == [DONOR, TARGET]


async def test_what_is_found_bad_while_it_is_linked_is_not_believed_under_its_new_name(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = core.index.repo(DONOR).blobs[DIGEST]
    while_it_is_linked(core, monkeypatch, after=lambda: core.index.doubt(DIGEST, blob.inode))
    assert await link(core) is False
    assert core.index.donors(DIGEST) == []


async def test_what_is_exchanged_before_it_is_linked_is_not_believed(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(core.layout.blob(DONOR, DIGEST))

    def exchange() -> None:
        path.unlink()
        path.write_bytes(b"other w")

    while_it_is_linked(core, monkeypatch, before=exchange)
    assert await link(core) is False
    assert TARGET not in core.index.donors(DIGEST)


async def test_a_right_blob_that_has_come_in_a_bad_ones_place_is_not_condemned(core: Core, events: list[Event]) -> None:
    judged = core.index.repo(DONOR).blobs[DIGEST]
    task = asyncio.create_task(condemn(core, DONOR, DIGEST, judged))
    core.index.add_link(DONOR, DIGEST, replace(judged))
    await task
    core.index.drop_link(DONOR, DIGEST)
    await condemn(core, DONOR, DIGEST, judged)
    assert not [event for event in events if isinstance(event, BlobCondemned)]
    assert names_in(core.layout.quarantine) == []


async def test_a_bad_snapshot_that_the_disk_does_not_let_go_can_be_withdrawn_again(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = core.index.repo(DONOR).snapshots[FIRST.commit]
    with monkeypatch.context() as refusing:

        def refuse(*_: Any) -> None:
            raise OSError(errno.EIO, "no")

        refusing.setattr(eviction, "_withdraw_from_disk", refuse)
        await core.until_evicted([eviction.withdraw(core, snapshot)])
    assert snapshot.state is SnapshotState.UNVERIFIED
    await core.until_evicted([eviction.withdraw(core, snapshot)])
    assert FIRST.commit not in core.index.repo(DONOR).snapshots


async def test_blocks_that_a_flight_takes_while_another_request_looks_are_not_promised_twice(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.space.limits = Limits(100 * MIB, 0)
    core.space.set_area("hub", {})
    reservation = core.space.reserve(Amount(4 * MIB), "first")
    flight = SimpleNamespace(
        taken=None,
        partial=SimpleNamespace(hard_allocated=True, allocated=lambda: {1: 4 * MIB}),
        reservation=reservation,
        digest=DIGEST,
        size_bytes=4 * MIB,
    )

    async def allocate() -> None:
        async with FlightAccount(core).allocating(cast("Flight", flight)):
            pass

    async def look() -> None:
        tasks.append(asyncio.create_task(allocate()))
        await asyncio.sleep(0.05)

    async def before_the_flight() -> Filesystem:
        return Filesystem(100 * MIB, 6 * MIB, None, None)

    tasks: list[asyncio.Task[None]] = []
    monkeypatch.setattr(type(core), "filesystem", lambda _core: before_the_flight())
    with pytest.raises(NoRoomError):
        await admit(core, 4 * MIB, look, lambda: Amount(4 * MIB), "second")
    await asyncio.gather(*tasks)
    assert core.space.area_bytes("partial") == 4 * MIB


async def test_what_a_flight_is_about_to_publish_is_nobodys_leftover(core: Core) -> None:
    """Those who asked for it have gone, and their hold with them; it lands all the same."""
    digest = digest_of(b"unfinished")
    core.partials.open(digest, 64 * MIB).close()
    core.landing[Name(DONOR, digest)] += 1
    await drop_leftovers(core, None, expired_only=False)
    assert set(core.partials.listed()) == {digest}
    del core.landing[Name(DONOR, digest)]
    await drop_leftovers(core, None, expired_only=False)
    assert not core.partials.listed()


async def test_a_file_that_is_taken_over_waits_in_staging_for_as_long_as_it_takes(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelcached.cache.leftovers._ABANDONED_SECONDS", -60.0)
    put_staged(core)
    core.landing[Name(TARGET, DIGEST)] += 1
    await drop_leftovers(core, None, expired_only=True)
    assert names_in(core.layout.staging)
    del core.landing[Name(TARGET, DIGEST)]
    await drop_leftovers(core, None, expired_only=True)
    assert not names_in(core.layout.staging)


async def test_a_branch_goes_where_the_hub_said_last(core: Core) -> None:
    """Whichever of the two was brought last."""
    put_snapshot(core, SECOND, {"model.safetensors": CONTENT})
    believe(core, DONOR, {s: {"model.safetensors": CONTENT} for s in (FIRST, SECOND)})
    core.branches.heard(DONOR, MAIN, FIRST.commit, 1.0)
    core.branches.heard(DONOR, MAIN, SECOND.commit, 2.0)
    await point(core, DONOR, MAIN, SECOND.commit)
    await point(core, DONOR, MAIN, FIRST.commit)
    assert main_of(core) == (SECOND.commit, SECOND.commit)
    core.branches.heard(DONOR, MAIN, FIRST.commit, 3.0)  # somebody has moved it back
    await point(core, DONOR, MAIN, FIRST.commit)
    assert main_of(core) == (FIRST.commit, FIRST.commit)


async def test_two_who_move_a_branch_do_so_one_after_the_other(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    put_snapshot(core, SECOND, {"model.safetensors": CONTENT})
    believe(core, DONOR, {s: {"model.safetensors": CONTENT} for s in (FIRST, SECOND)})
    original, slow = type(core.snapshots).write_ref, asyncio.Event()
    loop = asyncio.get_running_loop()

    def write(store: Any, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
        if commit == FIRST.commit:
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(slow.wait(), 10), loop).result()
        original(store, repo_id, revision, commit)

    monkeypatch.setattr(type(core.snapshots), "write_ref", write)
    core.index.repo(DONOR).refs.clear()
    first = asyncio.create_task(point(core, DONOR, MAIN, FIRST.commit))
    second = asyncio.create_task(point(core, DONOR, MAIN, SECOND.commit))
    await asyncio.wait({second}, timeout=0.1)
    slow.set()
    await asyncio.gather(first, second)
    assert main_of(core) == (SECOND.commit, SECOND.commit)

"""I2, I5 and I6: one transfer a blob, what is wanted first comes first, and every end is an end."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Digest, RepoId
from modelcached.pools import Pools
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.sources.origin import RANGE_BYTES, OriginFailedError
from modelcached.sources.sink import FileSink, Sink
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.owner import prepare
from modelcached.store.partials import PartialStore
from modelcached.transfer import flights as module
from modelcached.transfer import flushing, patience
from modelcached.transfer.flight import STEP_BYTES, Flight
from modelcached.transfer.flights import Flights
from modelcached.transfer.movers import TransferLimits
from modelcached.transfer.pace import RateLimiter

MIB = 1 << 20
REPO = RepoId("org/name")
CANCELLED = CacheError(Reason.TRANSFER_CANCELLED, "cancelled by the test")
SECONDS = 10


@dataclass(eq=False)
class FakeOrigin:
    """Bytes from memory; ``behave`` may block, fail or lie before a part is delivered."""

    content: bytes = field(repr=False)
    label: str = "hub"
    part_bytes: int = RANGE_BYTES
    at_once: int | None = None
    content_tries: int = 2
    calls: list[tuple[int, int]] = field(default_factory=list)
    behave: Callable[[int, int, Sink, Abort], bool] | None = None
    """True when it delivered the part by itself."""

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        self.calls.append((start, end))
        if self.behave is not None and self.behave(start, end, sink, abort):
            return
        for position in range(start, end, MIB):
            if abort.is_set:
                raise AbortedError
            sink(memoryview(self.content)[position : min(position + MIB, end)], position)

    def forget(self) -> None:
        pass

    @property
    def digest(self) -> Digest:
        return Digest(Algorithm.SHA256, hashlib.sha256(self.content).hexdigest())


def origin(size: int, seed: int = 1) -> FakeOrigin:
    return FakeOrigin(seed.to_bytes(4, "big") + bytes(size - 4))


class Bench:
    """Flights over a real disk."""

    def __init__(self, root: Path, connections: int = 4) -> None:
        self.before: Callable[[str, str], None] = lambda _operation, _path: None
        self.layout = Layout(str(root / "cache"))
        disk = Disk(self._announced)
        prepare(disk, self.layout)
        self.pools = Pools.start(connections)
        self.partials = PartialStore(disk, self.layout, "this boot")
        self.ended: list[Flight] = []
        self.flights = Flights(
            pools=self.pools,
            partials=self.partials,
            limits=TransferLimits(connections, timedelta(seconds=6)),
            limiter=RateLimiter(0),
            allocating=lambda _flight: nullcontext(),
            published=lambda _flight, _status: None,
            ended=self.ended.append,
            make_room=self._make_room,
            observe=lambda _event: None,
        )
        self.may_go = 0

    async def _make_room(self, _wanted_bytes: int) -> bool:
        """Something else goes, as often as there is something."""
        self.may_go -= 1
        return self.may_go >= 0

    def _announced(self, operation: str, path: str) -> None:
        self.before(operation, path)

    def start(self, source: FakeOrigin, *others: FakeOrigin) -> Flight:
        return self.flights.start(source.digest, len(source.content), REPO, [source, *others])

    def blob(self, source: FakeOrigin) -> Path:
        return Path(self.layout.blob(REPO, source.digest))

    def open_partials(self) -> list[str]:
        return [f.path for f in psutil.Process().open_files() if f.path.startswith(self.layout.partial)]


@asynccontextmanager
async def bench(root: Path, connections: int = 4) -> AsyncIterator[Bench]:
    made = Bench(root, connections)
    try:
        yield made
    finally:
        await made.flights.stop()
        made.pools.stop()


async def reason_of(flight: Flight) -> Reason:
    with pytest.raises(CacheError) as caught:
        await asyncio.wait_for(asyncio.shield(flight.done), SECONDS)
    return caught.value.reason


async def landed(flight: Flight) -> os.stat_result:
    return await asyncio.wait_for(asyncio.shield(flight.done), SECONDS)


async def turn_until(condition: Callable[[], bool]) -> None:
    """Lets the loop go on until it is so."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - what it asks for has no event of its own
            await asyncio.sleep(0)


async def until(event: threading.Event) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, event.wait, SECONDS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The transfers' own time, which only the test moves; and no pause between tries."""
    time = SimpleNamespace(now=0.0, pauses=[])
    for timed in (patience, flushing):
        monkeypatch.setattr(timed, "time", SimpleNamespace(monotonic=lambda: time.now))

    def uniform(_low: float, high: float) -> float:
        time.pauses.append(high)
        return 0.0

    monkeypatch.setattr(patience, "random", SimpleNamespace(uniform=uniform))
    return time


@pytest.mark.parametrize("size", [4, MIB, MIB + 1, RANGE_BYTES, 2 * RANGE_BYTES + 5])
async def test_a_blob_is_fetched_once_in_parts_and_is_what_its_digest_says(tmp_path: Path, size: int) -> None:
    async with bench(tmp_path) as it:
        source = origin(size)
        flight = it.start(source)
        assert it.flights.get(source.digest) is flight
        await landed(flight)
        assert it.blob(source).read_bytes() == source.content
        assert sorted(source.calls) == [(at, min(at + RANGE_BYTES, size)) for at in range(0, size, RANGE_BYTES)]
        assert flight.fetched.total() == size
        assert it.flights.get(source.digest) is None
        assert it.open_partials() == []


async def test_what_is_waited_for_and_small_comes_first(tmp_path: Path) -> None:
    async with bench(tmp_path, connections=1) as it:
        busy, release = threading.Event(), threading.Event()
        blocker = origin(8, seed=99)

        def block(_start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            busy.set()
            assert release.wait(SECONDS)
            return False

        blocker.behave = block
        flights = [it.start(blocker)]
        await until(busy)
        order: list[str] = []
        for number, (name, size, waited_for) in enumerate(
            [
                ("large background", 2 * MIB, False),
                ("small background", 10, False),
                ("large", 3 * MIB, True),
                ("small", 20, True),
                ("small, later", 5, True),
            ]
        ):
            source = origin(size, seed=number)
            source.behave = lambda *_, name=name: bool(order.append(name))  # type: ignore[misc]
            flight = it.start(source)
            if waited_for:
                it.flights.hurry(flight, 1)
            flights.append(flight)
        await turn_until(lambda: all(flight.pending for flight in flights[1:]))
        release.set()
        for flight in flights:
            await landed(flight)
        assert order == ["small", "small, later", "large", "small background", "large background"]


async def test_a_cancelled_flight_leaves_no_mover_and_is_resumed(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * RANGE_BYTES)
        reached, aborted, let_go = threading.Event(), threading.Event(), threading.Event()

        def deliver_some(start: int, _end: int, sink: Sink, abort: Abort) -> bool:
            if start == 0:
                sink(memoryview(source.content)[: 3 * MIB], 0)
                reached.set()
                assert abort.wait(SECONDS)
                aborted.set()
                assert let_go.wait(SECONDS)
                raise AbortedError
            return False

        source.behave = deliver_some
        flight = it.start(source)
        await until(reached)
        await turn_until(lambda: flight.ranges.total >= RANGE_BYTES + 2 * MIB)
        it.flights.cancel(flight, CANCELLED)
        assert it.flights.get(source.digest) is None
        again = it.start(source)
        source.behave = None
        await until(aborted)
        for _ in range(20):  # as many turns as opening the partial would take
            await it.pools.on_disk(lambda: None)
        assert again.partial is None  # the old mover may still write
        assert len(it.open_partials()) == 2
        let_go.set()
        with pytest.raises(CacheError, match="cancelled by the test"):
            await landed(flight)
        assert (flight.active, flight.partial) == ({}, None)
        await landed(again)
        assert source.calls[2:] == [(3 * MIB, RANGE_BYTES)]
        assert it.blob(source).read_bytes() == source.content
        assert it.open_partials() == []


async def test_what_becomes_a_file_may_come_through_a_pipe(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(3 * MIB)

        def by_pipe(start: int, end: int, sink: Sink, _abort: Abort) -> bool:
            assert isinstance(sink, FileSink)
            reads, writes = os.pipe()
            try:
                for at in range(start, end, MIB // 32):
                    os.write(writes, source.content[at : at + MIB // 32])
                    sink.splice(reads, MIB // 32, at)
            finally:
                os.close(reads)
                os.close(writes)
            return True

        source.behave = by_pipe
        await landed(it.start(source))
        assert it.blob(source).read_bytes() == source.content


async def test_movers_and_hashing_step_back_between_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = origin(16 * MIB)
    async with bench(tmp_path) as b:
        who: list[str] = []

        def let_pass() -> None:
            who.append(threading.current_thread().name.partition("_")[0])

        monkeypatch.setattr(b.pools.precedence, "let_pass", let_pass)
        await landed(b.start(source))
        assert who.count("mover") == 16  # each MiB that the origin hands on
        assert who.count("hash") == 16


async def test_a_flight_that_nobody_wants_any_more_ends(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source, begun = origin(100), threading.Event()

        def wait(_start: int, _end: int, _sink: Sink, abort: Abort) -> bool:
            begun.set()
            assert abort.wait(SECONDS)
            raise AbortedError

        source.behave = wait
        flight = it.start(source)
        flight.interest = 2
        await until(begun)
        it.flights.leave(flight)
        assert not flight.ending
        it.flights.leave(flight)
        assert await reason_of(flight) is Reason.TRANSFER_CANCELLED


async def test_progress_begins_the_patience_and_the_backoff_anew(tmp_path: Path, clock: SimpleNamespace) -> None:
    async with bench(tmp_path) as it:
        source = origin(RANGE_BYTES)

        def a_step_at_a_time(start: int, _end: int, sink: Sink, _abort: Abort) -> bool:
            clock.now += 5  # of six
            sink(memoryview(source.content)[start : start + STEP_BYTES], start)
            if start + STEP_BYTES == RANGE_BYTES:
                return True
            raise TransientError(Reason.UPSTREAM_UNAVAILABLE, "broken")

        source.behave = a_step_at_a_time
        await landed(it.start(source))
        assert len(source.calls) == RANGE_BYTES // STEP_BYTES
        assert set(clock.pauses) == {0.25}


async def test_without_progress_the_last_failure_is_told_with_the_limit(tmp_path: Path, clock: SimpleNamespace) -> None:
    async with bench(tmp_path) as it:
        source = origin(RANGE_BYTES)

        def fail(_start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            clock.now += 2
            raise TransientError(Reason.UPSTREAM_STALLED, "silent")

        source.behave = fail
        with pytest.raises(CacheError, match=r"silent; .*transfer.retry_timeout is 6 s") as caught:
            await landed(it.start(source))
        assert caught.value.reason is Reason.UPSTREAM_STALLED
        assert len(source.calls) == 3
        assert clock.pauses == [0.25, 0.5, 1.0]


async def test_one_429_holds_back_every_flight_until_its_time(tmp_path: Path, clock: SimpleNamespace) -> None:
    async with bench(tmp_path, connections=1) as it:
        limited, other = origin(10, seed=1), origin(10, seed=2)
        waits: list[float] = []
        it.flights._movers.cooldown = SimpleNamespace(  # type: ignore[assignment]
            extend=lambda delay: waits.append(delay.total_seconds()), seconds_left=0.0
        )

        def refuse(_start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            limited.behave = None
            raise TransientError(Reason.RATE_LIMITED, "429", retry_after=timedelta(seconds=0.01))

        limited.behave = refuse
        await landed(it.start(limited))
        assert waits == [1.0]
        it.flights._movers.cooldown = SimpleNamespace(extend=None, seconds_left=7.0)  # type: ignore[assignment]
        with pytest.raises(CacheError, match=r"no request for 7 s, transfer.retry_timeout is 6 s") as caught:
            await landed(it.start(other))
        assert caught.value.reason is Reason.RATE_LIMITED
        assert caught.value.retry_delay == timedelta(seconds=7)
        assert other.calls == []


async def test_wrong_content_is_fetched_anew_once_and_then_from_the_next_origin(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        good = origin(2 * MIB)
        bad = FakeOrigin(good.content[::-1])
        await landed(it.flights.start(good.digest, len(good.content), REPO, [bad, good]))
        assert (len(bad.calls), len(good.calls)) == (2, 1)
        assert it.blob(good).read_bytes() == good.content


async def test_wrong_content_everywhere_is_a_mismatch_and_keeps_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        good = origin(2 * MIB)
        bad = FakeOrigin(good.content[::-1])
        flight = it.flights.start(good.digest, len(good.content), REPO, [bad])
        assert await reason_of(flight) is Reason.DIGEST_MISMATCH
        assert len(bad.calls) == 2
        assert not it.blob(good).exists()
        assert it.partials.listed() == {}


async def test_wrong_data_of_an_earlier_try_costs_no_try(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * MIB)
        partial = it.partials.open(source.digest, len(source.content))
        partial.write(memoryview(b"wrong"), 0)
        partial.mark(0, MIB)
        partial.close()

        def lie_once(start: int, end: int, sink: Sink, _abort: Abort) -> bool:
            if len(source.calls) != 2:
                return False
            sink(memoryview(bytes(end - start)), start)
            return True

        source.behave = lie_once
        await landed(it.start(source))
        assert source.calls == [(MIB, 2 * MIB), (0, 2 * MIB), (0, 2 * MIB)]
        assert it.blob(source).read_bytes() == source.content


async def test_a_cancel_while_wrong_content_is_dropped_is_not_forgotten(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        good = origin(2 * MIB)
        bad = FakeOrigin(good.content[::-1])
        loop = asyncio.get_running_loop()
        flight = it.flights.start(good.digest, len(good.content), REPO, [bad])

        def cancel_meanwhile(operation: str, _path: str) -> None:
            if operation == "truncate":
                it.before = lambda _operation, _path: None
                done = threading.Event()
                loop.call_soon_threadsafe(lambda: (it.flights.cancel(flight, CANCELLED), done.set()))
                assert done.wait(SECONDS)

        it.before = cancel_meanwhile
        assert await reason_of(flight) is Reason.TRANSFER_CANCELLED
        assert len(bad.calls) == 1


async def test_a_part_that_waits_for_a_retry_ends_with_its_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the flight ends by itself: here the disk cannot be read back."""
    async with bench(tmp_path) as it:
        source = origin(2 * RANGE_BYTES)
        failed = threading.Event()

        def second_part_fails(start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            if start == 0:
                return False
            failed.set()
            raise TransientError(Reason.UPSTREAM_UNAVAILABLE, "broken")

        def unreadable(*_: object) -> None:
            assert failed.wait(SECONDS)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        source.behave = second_part_fails
        monkeypatch.setattr(module, "hash_partial", unreadable)
        flight = it.start(source)
        assert await reason_of(flight) is Reason.STORAGE_ERROR
        assert len(source.calls) < 6
        assert flight.active == {}
        assert it.open_partials() == []


async def test_a_failed_flush_is_told_and_its_data_never_used(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * MIB)

        def fail(operation: str, path: str) -> None:
            if operation == "fsync" and path.endswith(source.digest.hex):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        it.before = fail
        assert await reason_of(it.start(source)) is Reason.STORAGE_ERROR
        assert it.partials.listed() == {}
        it.before = lambda _operation, _path: None
        await landed(it.start(source))
        assert source.calls == [(0, 2 * MIB)] * 2


async def test_a_disk_that_cannot_be_written_ends_the_flight_by_its_name(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * RANGE_BYTES)

        def full(operation: str, path: str) -> None:
            if operation == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        it.before = full
        assert await reason_of(it.start(source)) is Reason.NO_SPACE_NOW
        assert it.open_partials() == []


@pytest.mark.parametrize("step", ["allocate", "write", "append"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_a_disk_that_is_full_in_the_middle_is_written_on_once_something_else_has_gone(
    tmp_path: Path, step: str, code: int
) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * RANGE_BYTES)
        it.may_go = 3
        calls = itertools.count()

        def full(operation: str, path: str) -> None:
            if operation == step and (step == "allocate" or next(calls) > 3) and it.may_go > 1:
                raise OSError(code, os.strerror(code), path)

        it.before = full
        await landed(it.start(source))
        assert it.blob(source).read_bytes() == source.content
        assert it.may_go <= 1


async def test_what_came_before_the_disk_was_full_is_kept(tmp_path: Path) -> None:
    async with bench(tmp_path, connections=1) as it:
        source, pieces = origin(RANGE_BYTES), itertools.count(1)

        def full(operation: str, path: str) -> None:
            if operation == "write" and not path.endswith(".journal") and next(pieces) > 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        it.before = full
        assert await reason_of(it.start(source)) is Reason.NO_SPACE_NOW
        kept = it.partials.done_bytes(source.digest)
        assert kept == 4 * MIB
        it.before = lambda _operation, _path: None
        source.calls.clear()
        await landed(it.start(source))
        assert source.calls == [(kept, RANGE_BYTES)]


async def test_stop_ends_flights_and_does_not_wait_for_a_mover_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.05)
    connecting, connected, written = threading.Event(), threading.Event(), threading.Event()
    async with bench(tmp_path) as it:
        source = origin(2 * MIB)

        def connect(_start: int, _end: int, sink: Sink, _abort: Abort) -> bool:
            connecting.set()
            assert connected.wait(SECONDS)
            try:
                sink(memoryview(source.content)[:MIB], 0)
            finally:
                written.set()
            return True

        source.behave = connect
        flight = it.start(source)
        await until(connecting)
        await asyncio.wait_for(it.flights.stop(), 5)
        assert await reason_of(flight) is Reason.SHUTTING_DOWN
        assert it.open_partials() == []
        connected.set()
        await until(written)
        assert it.partials.done_bytes(source.digest) == 0
        with pytest.raises(CacheError, match="stopping"):
            it.start(source)


@pytest.mark.parametrize("last_word", ["gives up", "goes silent"])
async def test_the_next_origin_goes_on_where_one_has_failed(
    tmp_path: Path, clock: SimpleNamespace, last_word: str
) -> None:
    async with bench(tmp_path) as it:
        source = origin(3 * RANGE_BYTES)
        first = FakeOrigin(source.content, label="xet", part_bytes=1 << 30, at_once=1)

        def fail(_start: int, _end: int, sink: Sink, _abort: Abort) -> bool:
            if len(first.calls) == 1:
                sink(memoryview(source.content)[: 5 * MIB], 0)
            if last_word == "gives up":
                raise OriginFailedError("it will not do")
            clock.now += 4.0
            raise TransientError(Reason.UPSTREAM_STALLED, "silence")

        first.behave = fail
        flight = it.start(first, source)
        await landed(flight)
        assert first.calls[0] == (0, 3 * RANGE_BYTES)
        assert source.calls[0] == (5 * MIB, 5 * MIB + RANGE_BYTES)
        assert flight.fetched == {"xet": 5 * MIB, "hub": 3 * RANGE_BYTES - 5 * MIB}
        assert it.blob(source).read_bytes() == source.content


async def test_the_last_origin_that_gives_up_fails_the_flight(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * MIB)

        def fail(_start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            raise OriginFailedError("it will not do")

        source.behave = fail
        assert await reason_of(it.start(source)) is Reason.UPSTREAM_UNAVAILABLE


async def test_a_cancelled_flight_tries_no_other_origin(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        source = origin(2 * MIB)
        first, begun, go_on = FakeOrigin(source.content), threading.Event(), threading.Event()

        def fail(_start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            begun.set()
            assert go_on.wait(SECONDS)
            raise OriginFailedError("it will not do")

        first.behave = fail
        flight = it.start(first, source)
        await until(begun)
        it.flights.cancel(flight, CANCELLED)
        go_on.set()
        assert await reason_of(flight) is Reason.TRANSFER_CANCELLED
        assert source.calls == []


async def test_a_kind_of_origin_that_bounds_itself_leaves_connections_to_others(tmp_path: Path) -> None:
    async with bench(tmp_path, connections=4) as it:
        begun, go_on, running, most = threading.Event(), threading.Event(), 0, 0

        def slowly(_start: int, _end: int, _sink: Sink, _abort: Abort) -> bool:
            nonlocal running, most
            running += 1
            most = max(most, running)
            begun.set()
            assert go_on.wait(SECONDS)
            running -= 1
            return False

        bounded = [origin(2 * MIB, seed) for seed in range(1, 5)]
        for made in bounded:
            made.label, made.at_once, made.behave = "xet", 1, slowly
        flights = [it.start(made) for made in bounded]
        await until(begun)
        await landed(it.start(origin(2 * MIB, 9)))
        assert most == 1
        go_on.set()
        for flight in flights:
            await landed(flight)
        assert most == 1

"""Single flight, parts and retries: every blob that is missing is fetched once, by all connections together.

The next free connection takes the part that is wanted most; see queue.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type

from modelcached.errors import CacheError, Reason
from modelcached.events import BytesReceived, FirstByteCame, FlightFailed, Observer, RangeRetried, RateLimited
from modelcached.model import Digest, RepoId
from modelcached.pools import Pools
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.sources.origin import LocalOrigin, Origin, OriginFailedError
from modelcached.store.disk import storage_error
from modelcached.store.partials import Partial, PartialStore
from modelcached.store.taking import Taken, TakenAwayError
from modelcached.transfer.flight import SMALL_BYTES, STEP_BYTES, Flight, Part, Stage
from modelcached.transfer.flushing import HASH_AHEAD_BYTES, Flushing
from modelcached.transfer.full_disk import MakeRoom, with_room
from modelcached.transfer.hashing import hash_partial, matches, new_hasher
from modelcached.transfer.pace import Cooldown, RateLimiter
from modelcached.transfer.patience import Patience
from modelcached.transfer.queue import WorkQueue

log = structlog.get_logger()

T = TypeVar("T")

_HASH_STEP_BYTES = 32 << 20
_ELSEWHERE_SECONDS = 20.0
"""How long an origin is tried for without progress when there is another."""
_STOP_SECONDS = 5.0
_SAME_SECONDS = 0.5
"""Connections that meet a 429 at the same time want nearly the same wait: it is told once."""


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """How much and how long."""

    connections: int
    retry_timeout: timedelta
    """A part that makes no progress for this long, over all its tries, fails its flight."""


class ContentError(Exception):
    """The whole file must be fetched again: what there is cannot be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Flights:
    """All running transfers of the node. The event loop's alone."""

    def __init__(
        self,
        *,
        pools: Pools,
        partials: PartialStore,
        limits: TransferLimits,
        limiter: RateLimiter,
        allocating: Callable[[Flight], AbstractAsyncContextManager[None]],
        published: Callable[[Flight, os.stat_result], None],
        ended: Callable[[Flight], None],
        make_room: MakeRoom,
        observe: Observer,
    ) -> None:
        """The first three keep the account.

        ``allocating`` surrounds the opening of a partial, ``published`` is called in the step in which
        a blob is there, ``ended`` when nothing of the flight is open any more. ``make_room`` is asked for bytes when
        the disk is full all the same, and says whether it is worth another try.
        """
        self._pools = pools
        self._partials = partials
        self._limits = limits
        self.limiter = limiter
        self.cooldown = Cooldown()
        self._allocating = allocating
        self._ended = ended
        self._published = published
        self._make_room = make_room
        self._observe = observe
        self._flights: dict[Digest, Flight] = {}
        self._numbers = itertools.count()
        self._queue = WorkQueue()
        self._work = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = False

    # What cache asks for

    def get(self, digest: Digest) -> Flight | None:
        """The running flight of that blob; one that is ending can no longer be joined."""
        flight = self._flights.get(digest)
        return flight if flight is not None and not flight.ending else None

    def has(self, digest: Digest) -> bool:
        """Whether a flight of that blob can be joined."""
        return self.get(digest) is not None

    def all(self) -> list[Flight]:
        """All running flights, oldest first."""
        return list(self._flights.values())

    def new_batch(self) -> int:
        """For flights that are started together."""
        return next(self._numbers)

    def start(
        self, digest: Digest, size_bytes: int, repo_id: RepoId, origins: Sequence[Origin], batch: int = 0
    ) -> Flight:
        """Starts the flight of a blob that is missing and has none."""
        if self._stopping:
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
        done: asyncio.Future[os.stat_result] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda future: future.cancelled() or future.exception())  # somebody may have gone
        flight = Flight(digest, size_bytes, repo_id, list(origins), next(self._numbers), done, batch)
        before = self._flights.get(digest)  # ending, its progress kept: this one goes on from there
        self._flights[digest] = flight
        flight.task = asyncio.create_task(
            self._fly(flight, before.task if before is not None else None), name=f"flight {digest.hex[:12]}"
        )
        return flight

    def hurry(self, flight: Flight, more: int) -> None:
        """So many more requests that somebody waits for want it; fewer if negative."""
        flight.urgent += more
        self._queue.push(flight)
        self._work.set()  # it may have been parked until now

    def park(self, flight: Flight, more: int) -> None:
        """So many more of those who want it have no turn; fewer if negative. Parts under way come to their end."""
        flight.parked += more
        self._queue.push(flight)
        self._work.set()

    def leave(self, flight: Flight) -> None:
        """One request less wants it; the last one ends it, its progress kept."""
        flight.interest -= 1
        if flight.interest <= 0 and not flight.done.done():
            self.cancel(flight, CacheError(Reason.TRANSFER_CANCELLED, "nobody wants the transfer any more"))

    def cancel(self, flight: Flight, why: CacheError) -> None:
        """Ends the flight; those who wait get ``why``. What is on disk stays and is resumed from.

        One that is verified and only being published lands all the same.
        """
        if flight.ending or flight.stage >= Stage.PUBLISHING:
            return
        flight.failure = why
        flight.abort()

    async def stop(self) -> None:
        """Ends all flights, keeping what they have; returns when the disk is at rest."""
        self._stopping = True
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for flight in self.all():
            self.cancel(flight, CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; progress is kept"))
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_SECONDS)  # a connect under way cannot be interrupted
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    # The life of a flight

    async def _fly(self, flight: Flight, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:
                await asyncio.wait({before})
            status = await (self._small(flight) if flight.size_bytes <= SMALL_BYTES else self._large(flight))
            flight.stage = Stage.DONE
            self._published(flight, status)
            if flight.first_byte_at is not None:
                self._observe(FirstByteCame(flight.first_byte_at - flight.began_at))
            self._forget(flight)
            if not flight.done.done():
                flight.done.set_result(status)
        except BaseException as error:
            failure = _explained(error)
            self._forget(flight)
            if failure.reason not in (Reason.TRANSFER_CANCELLED, Reason.SHUTTING_DOWN):
                self._observe(FlightFailed(failure.reason.value))
            if not flight.done.done():
                flight.done.set_exception(failure)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._ended(flight)
            for origin in flight.origins:
                origin.forget()

    def _forget(self, flight: Flight) -> None:
        if self._flights.get(flight.digest) is flight:
            del self._flights[flight.digest]

    async def _small(self, flight: Flight) -> os.stat_result:
        content = bytearray()  # grows as it comes: ten thousand files may wait for their turn

        def keep(view: memoryview, offset: int) -> None:
            content[offset:] = view  # in order; another try begins at 0

        async def once() -> None:
            part = Part.of(0, flight.size_bytes)
            if flight.size_bytes:
                await self._queue_and_wait(flight, part, keep)
            if not matches(flight.digest, content):
                raise ContentError(f"{flight.origin}: content differs from {flight.digest}")

        await self._until_right(flight, once)
        flight.stage = Stage.PUBLISHING
        publish = functools.partial(self._partials.publish_small, flight.repo_id, flight.digest, bytes(content))
        return await with_room(lambda: self._pools.on_flush(publish), flight.size_bytes, self._make_room)

    async def _taken(self, flight: Flight) -> os.stat_result | None:
        """A file of this machine that need not be copied: read once, to be verified. None where it must be."""
        origin = flight.origin
        if not isinstance(origin, LocalOrigin):
            return None
        taken = await with_room(lambda: self._take(flight, origin), flight.size_bytes, self._make_room)
        if taken is None:
            return None
        try:
            flight.stage = Stage.VERIFYING
            flight.ranges.spans = [(0, flight.size_bytes)]
            hasher = new_hasher(flight.digest, flight.size_bytes)
            for start in range(0, flight.size_bytes, _HASH_STEP_BYTES):
                if flight.failure is not None:
                    raise flight.failure
                end = min(start + _HASH_STEP_BYTES, flight.size_bytes)
                await self._pools.on_hash(hash_partial, taken, hasher, start, end)
            if hasher.hexdigest() != flight.digest.hex:
                raise ContentError(f"{origin}: content differs from {flight.digest}")
            flight.stage = Stage.PUBLISHING
            return await self._pools.on_flush(taken.publish, flight.repo_id)
        except TakenAwayError as error:
            log.info("copying what somebody else writes", digest=flight.digest.hex, why=str(error))
            return None
        finally:
            flight.taken = None
            if not taken.published:
                flight.ranges.spans, flight.stage = [], Stage.QUEUED
            await self._pools.on_disk(taken.close)

    async def _take(self, flight: Flight, origin: LocalOrigin) -> Taken | None:
        async with self._allocating(flight):
            take = functools.partial(self._partials.take, moves=origin.moves)
            flight.taken = await self._pools.on_disk(take, flight.digest, flight.size_bytes, origin.path)
            return flight.taken

    async def _large(self, flight: Flight) -> os.stat_result:
        if (status := await self._until_right(flight, lambda: self._taken(flight))) is not None:
            return status
        partial = await with_room(lambda: self._open(flight), flight.size_bytes, self._make_room)
        flight.ranges.spans = list(partial.resumed.spans)
        resumed = bool(flight.ranges.spans)
        try:

            async def once() -> None:
                nonlocal resumed
                try:
                    await self._move_and_hash(flight)
                except ContentError:
                    await self._pools.on_disk(partial.restart)
                    flight.ranges.spans = []
                    if not resumed:
                        raise
                    flight.clear_failure()
                    flight.origin.forget()
                    resumed = False  # what was kept from before may be what is wrong: that costs no try
                    log.warning("resumed content differs from its digest, fetching it again", digest=flight.digest.hex)
                    await once()

            await self._until_right(flight, once)
            flight.stage = Stage.PUBLISHING
            publish = functools.partial(self._pools.on_flush, partial.publish, flight.repo_id)
            return await with_room(publish, STEP_BYTES, self._make_room)
        except BaseException as error:
            wrong = isinstance(error, CacheError) and error.reason is Reason.DIGEST_MISMATCH
            if wrong or partial.condemned:
                await self._pools.on_disk(partial.discard)
            raise
        finally:
            while flight.active:  # a mover still has the descriptor
                flight.moved.clear()
                await flight.moved.wait()
            partial.close()
            flight.partial = None

    async def _open(self, flight: Flight) -> Partial:
        async with self._allocating(flight):
            flight.partial = await self._pools.on_disk(self._partials.open, flight.digest, flight.size_bytes)
            return flight.partial

    async def _until_right(self, flight: Flight, once: Callable[[], Awaitable[T]]) -> T:
        """Tries each origin until the content is what its digest says."""
        tries = 0
        while True:
            try:
                return await once()
            except OriginFailedError as error:
                if len(flight.origins) == 1:
                    flight.failure = CacheError(Reason.UPSTREAM_UNAVAILABLE, error.message)
                    raise flight.failure from error
                given_up, done = str(flight.origin), flight.ranges.total
                flight.next_origin()
                tries = 0
                log.warning(
                    "going on from another origin",
                    digest=flight.digest.hex,
                    given_up=given_up,
                    origin=str(flight.origin),
                    done_bytes=done,
                    size_bytes=flight.size_bytes,
                    why=error.message,
                )
            except ContentError as error:
                tries += 1
                flight.clear_failure()
                flight.origin.forget()
                log.warning("wrong content", digest=flight.digest.hex, origin=str(flight.origin), why=error.message)
                if tries < flight.origin.content_tries:
                    continue
                if len(flight.origins) > 1:
                    flight.next_origin()
                    tries = 0
                    continue
                flight.failure = CacheError(
                    Reason.DIGEST_MISMATCH, error.message, metadata={"digest": flight.digest.hex, "tries": tries}
                )
                raise flight.failure from error

    async def _move_and_hash(self, flight: Flight) -> None:
        """Fetches what is missing, hashing behind it while the bytes are in the page cache."""
        partial = flight.partial
        assert partial is not None
        hasher = new_hasher(flight.digest, flight.size_bytes)
        flight.plan()
        flight.stage = Stage.DOWNLOADING if flight.pending else Stage.VERIFYING
        self._wake(flight)
        flushing = Flushing(self._pools, partial, flight.ranges.total)
        try:
            while flight.hashed < flight.size_bytes:
                if flight.failure is not None:
                    raise flight.failure
                flight.moved.clear()
                flushing.go_on(flight)
                # In steps: what an earlier try left may be a hundred gigabytes, and the flight may be ended meanwhile.
                reach = min(flight.ranges.prefix, flight.hashed + _HASH_STEP_BYTES)
                if reach == flight.size_bytes or reach - flight.hashed >= HASH_AHEAD_BYTES:
                    if not flight.pending and not flight.active:
                        flight.stage = Stage.VERIFYING
                    await self._pools.on_hash(hash_partial, partial, hasher, flight.hashed, reach)
                    flight.hash_reached(reach)
                    self._wake(flight)
                    continue
                await flight.moved.wait()
            if hasher.hexdigest() != flight.digest.hex:
                raise ContentError(f"{flight.origin}: content differs from {flight.digest}")
        finally:
            if flight.failure is not None or flight.hashed < flight.size_bytes:
                flight.abort()
            while flight.active:
                flight.moved.clear()
                await flight.moved.wait()
            await flushing.ended()

    # Parts

    async def _queue_and_wait(self, flight: Flight, part: Part, sink: Callable[[memoryview, int], None]) -> None:
        """For small files: one part, kept by the caller's own sink."""
        if flight.failure is not None:
            raise flight.failure
        flight.pending.append(part)
        flight.small_sink = sink
        flight.stage = Stage.DOWNLOADING
        self._wake(flight)
        while flight.pending or flight.active:
            flight.moved.clear()
            await flight.moved.wait()
        if flight.failure is not None:
            raise flight.failure

    def _wake(self, flight: Flight) -> None:
        self._queue.push(flight)
        self._work.set()
        while len(self._workers) < self._limits.connections:
            # They outlive the request that happens to start them: its id is not theirs.
            worker = asyncio.create_task(
                self._serve(), name=f"mover {len(self._workers)}", context=contextvars.Context()
            )
            self._workers.append(worker)

    async def _serve(self) -> None:
        """One connection's worth of work, for ever."""
        while True:
            found = self._queue.pop()
            if found is None:
                self._work.clear()
                await self._work.wait()
                continue
            flight, part = found
            origin = flight.origin
            key = id(part)
            flight.active[key] = part
            self._queue.push(flight)  # behind those with fewer connections
            try:
                with structlog.contextvars.bound_contextvars(**flight.log_context):
                    await self._fetch(flight, part)
            except AbortedError:
                pass
            except Exception as error:  # noqa: BLE001 - the flight's own task tells its waiters
                if flight.failure is None:
                    flight.failure = _verdict(flight, error)
                flight.abort()
            finally:
                del flight.active[key]
                self._queue.push(flight)
                flight.moved.set()
                if self._queue.over(origin):
                    self._work.set()
            # The flight looks first at what came: a config that was wrong and is asked for again goes before weights.
            await asyncio.sleep(0)

    async def _fetch(self, flight: Flight, part: Part) -> None:
        limit = self._limits.retry_timeout.total_seconds()
        patience = Patience(min(limit, _ELSEWHERE_SECONDS) if len(flight.origins) > 1 else limit, part)
        retrying = AsyncRetrying(
            stop=lambda _: patience.is_over,
            wait=lambda _: patience.pause,
            sleep=flight.nap,
            retry=retry_if_exception_type(TransientError),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await self._cool_down(flight, patience)
                try:
                    missing = flight.size_bytes - flight.ranges.total
                    await with_room(lambda: self._once(flight, part), missing, self._make_room)
                except TransientError as error:
                    if error.reason is Reason.DIGEST_MISMATCH:
                        raise ContentError(error.message) from error
                    patience.failed(error)
                    if error.reason is Reason.RATE_LIMITED:
                        wanted = timedelta(seconds=max(1.0, patience.pause))
                        self._rest(min(wanted, self._limits.retry_timeout))
                    if patience.is_over:
                        raise patience.told(error) from error
                    self._observe(RangeRetried(error.reason.value))
                    log.info(
                        "retrying a range",
                        origin=str(flight.origin),
                        start=part.start,
                        end=part.end,
                        reason=error.reason.value,
                        why=error.message,
                        attempt=attempt.retry_state.attempt_number,
                    )
                    raise

    def _rest(self, delay: timedelta) -> None:
        """Nobody asks upstream before the delay is over."""
        before = self.cooldown.seconds_left
        self.cooldown.extend(delay)
        more = self.cooldown.seconds_left - before
        if before == 0 or more > _SAME_SECONDS:
            self._observe(RateLimited(more))

    async def _cool_down(self, flight: Flight, patience: Patience) -> None:
        """Waits until upstream wants to be asked again; not at all when that is beyond our patience."""
        while (left := self.cooldown.seconds_left) > 0 and not flight.ended.is_set():
            if left > patience.seconds_left:
                why = f"upstream limits our rate (429) for {flight.origin}"
                error = TransientError(Reason.RATE_LIMITED, why, retry_after=timedelta(seconds=math.ceil(left)))
                patience.give_up()
                raise patience.told(error)
            await flight.nap(left)
        if flight.ended.is_set():
            raise AbortedError

    def _advance(self, flight: Flight, part: Part, start: int, end: int) -> None:
        flight.advance(part, start, end)
        self._observe(BytesReceived(flight.origin.label, end - start))

    async def _once(self, flight: Flight, part: Part) -> None:
        abort = Abort()
        flight.aborts.add(abort)
        loop = asyncio.get_running_loop()
        origin, partial, small = flight.origin, flight.partial, flight.small_sink

        def fetch() -> None:
            marked = part.start

            def mark(end: int) -> None:
                nonlocal marked
                if partial is not None and end > marked:
                    partial.mark(marked, end)
                    loop.call_soon_threadsafe(self._advance, flight, part, marked, end)
                    marked = end

            def sink(view: memoryview, offset: int) -> None:
                end = offset + len(view)
                if flight.first_byte_at is None:
                    flight.first_byte_at = time.monotonic()
                self.limiter.take(len(view), abort.wait)
                try:
                    if partial is None:
                        assert small is not None
                        small(view, offset)
                    else:
                        partial.write(view, offset)
                        if end - marked >= STEP_BYTES or end == part.end:
                            mark(end)
                except OSError as error:
                    raise storage_error(error, "writing") from error
                part.written = end

            part.written = part.start
            try:
                origin.fetch(part.start, part.end, sink, abort)
            finally:
                mark(part.written)

        try:
            await self._pools.on_mover(fetch)
            if partial is None:
                flight.fetched[origin.label] += part.end
                self._observe(BytesReceived(origin.label, part.end))
        finally:
            flight.aborts.discard(abort)
            await asyncio.sleep(0)  # the last advance() is on the loop before anyone looks


def _verdict(flight: Flight, error: Exception) -> Exception:
    """What a failed part means for its flight: another try, another origin, or the end."""
    if isinstance(error, (ContentError, OriginFailedError)):
        return error
    if isinstance(error, TransientError) and len(flight.origins) > 1:
        return OriginFailedError(error.message)
    return _explained(error)


def _explained(error: BaseException) -> CacheError:
    """What the waiters are told."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, TransientError):
        return error.final()
    if isinstance(error, ContentError):
        return CacheError(Reason.DIGEST_MISMATCH, error.message)
    if isinstance(error, OSError):
        return storage_error(error, "transferring")
    if isinstance(error, asyncio.CancelledError):
        return CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; progress is kept")
    log.error("flight failed unexpectedly", exc_info=error)
    return CacheError(Reason.INTERNAL, f"{type(error).__name__}: {error}")

"""Single flight: every blob that is missing is fetched once, hashed as it comes, tried from each origin.

Its parts are moved by all connections together; see movers.py.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import structlog

from modelcached.errors import CacheError, Reason
from modelcached.events import FirstByteCame, FlightFailed, Observer
from modelcached.model import Digest, RepoId
from modelcached.pools import Pools
from modelcached.sources.origin import LocalOrigin, Origin, OriginFailedError
from modelcached.store.partials import Partial, PartialStore
from modelcached.store.taking import Taken, TakenAwayError
from modelcached.transfer.flight import SMALL_BYTES, STEP_BYTES, Flight, Part, Stage
from modelcached.transfer.flushing import HASH_AHEAD_BYTES, Flushing
from modelcached.transfer.full_disk import MakeRoom, with_room
from modelcached.transfer.hashing import Hasher, hash_partial, matches, new_hasher
from modelcached.transfer.movers import Movers, TransferLimits
from modelcached.transfer.pace import RateLimiter
from modelcached.transfer.verdict import ContentError, explained

log = structlog.get_logger()

T = TypeVar("T")

_HASH_STEP_BYTES = 32 << 20
_STOP_SECONDS = 5.0


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
        self._movers = Movers(pools=pools, limits=limits, limiter=limiter, make_room=make_room, observe=observe)
        self._allocating = allocating
        self._ended = ended
        self._published = published
        self._make_room = make_room
        self._observe = observe
        self._flights: dict[Digest, Flight] = {}
        self._numbers = itertools.count()
        self._stopping = False

    @property
    def limiter(self) -> RateLimiter:
        """Of all connections together."""
        return self._movers.limiter

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
        self._movers.look(flight)

    def park(self, flight: Flight, more: int) -> None:
        """So many more of those who want it have no turn; fewer if negative. Parts under way come to their end."""
        flight.parked += more
        self._movers.look(flight)

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
        await self._movers.stop()

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
            failure = explained(error)
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
                await self._hash(taken, hasher, start, end)
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

    async def _hash(self, content: Partial | Taken, hasher: Hasher, start: int, end: int) -> None:
        await self._pools.on_hash(hash_partial, content, hasher, start, end, self._pools.precedence.let_pass)

    async def _move_and_hash(self, flight: Flight) -> None:
        """Fetches what is missing, hashing behind it while the bytes are in the page cache."""
        partial = flight.partial
        assert partial is not None
        hasher = new_hasher(flight.digest, flight.size_bytes)
        flight.plan()
        flight.stage = Stage.DOWNLOADING if flight.pending else Stage.VERIFYING
        self._movers.wake(flight)
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
                    await self._hash(partial, hasher, flight.hashed, reach)
                    flight.hash_reached(reach)
                    self._movers.wake(flight)
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

    async def _queue_and_wait(self, flight: Flight, part: Part, sink: Callable[[memoryview, int], None]) -> None:
        """For small files: one part, kept by the caller's own sink."""
        if flight.failure is not None:
            raise flight.failure
        flight.pending.append(part)
        flight.small_sink = sink
        flight.stage = Stage.DOWNLOADING
        self._movers.wake(flight)
        while flight.pending or flight.active:
            flight.moved.clear()
            await flight.moved.wait()
        if flight.failure is not None:
            raise flight.failure

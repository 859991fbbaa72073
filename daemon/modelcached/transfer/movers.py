"""The connections: each takes the part that is wanted most (queue.py), and tries until it has it or patience ends."""

from __future__ import annotations

import asyncio
import contextvars
import math
from dataclasses import dataclass
from datetime import timedelta

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type

from modelcached.errors import Reason
from modelcached.events import BytesReceived, Observer, RangeRetried, RateLimited
from modelcached.pools import Pools
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.transfer.arrivals import Arrivals
from modelcached.transfer.flight import Flight, Part
from modelcached.transfer.full_disk import MakeRoom, with_room
from modelcached.transfer.pace import Cooldown, RateLimiter
from modelcached.transfer.patience import Patience
from modelcached.transfer.queue import WorkQueue
from modelcached.transfer.verdict import ContentError, verdict

log = structlog.get_logger()

_ELSEWHERE_SECONDS = 20.0
"""How long an origin is tried for without progress when there is another."""
_SAME_SECONDS = 0.5
"""Connections that meet a 429 at the same time want nearly the same wait: it is told once."""


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """How much and how long."""

    connections: int
    retry_timeout: timedelta
    """A part that makes no progress for this long, over all its tries, fails its flight."""


class Movers:
    """All connections of the node. The event loop's alone, but for the fetching itself."""

    def __init__(
        self, *, pools: Pools, limits: TransferLimits, limiter: RateLimiter, make_room: MakeRoom, observe: Observer
    ) -> None:
        """``make_room`` as of Flights."""
        self._pools = pools
        self._limits = limits
        self.limiter = limiter
        self.cooldown = Cooldown()
        self._make_room = make_room
        self._observe = observe
        self._queue = WorkQueue()
        self._work = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []

    def look(self, flight: Flight) -> None:
        """Its parts may be wanted more, or less, than before."""
        self._queue.push(flight)
        self._work.set()

    async def stop(self) -> None:
        """Ends the waits of all; what is under way has been ended by its flight."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def wake(self, flight: Flight) -> None:
        """As ``look``, and from now on somebody works."""
        self.look(flight)
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
                    flight.failure = verdict(flight, error)
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
        origin, in_memory = flight.origin, flight.partial is None

        def advance(start: int, end: int) -> None:
            loop.call_soon_threadsafe(self._advance, flight, part, start, end)

        arrivals = Arrivals(flight, part, abort, self.limiter, self._pools.precedence, advance)

        def fetch() -> None:
            part.written = part.start
            try:
                origin.fetch(part.start, part.end, arrivals.sink, abort)
            finally:
                arrivals.mark(part.written)

        try:
            await self._pools.on_mover(fetch)
            if in_memory:
                flight.fetched[origin.label] += part.end
                self._observe(BytesReceived(origin.label, part.end))
        finally:
            flight.aborts.discard(abort)
            await asyncio.sleep(0)  # the last advance() is on the loop before anyone looks

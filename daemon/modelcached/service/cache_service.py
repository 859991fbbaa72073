"""CacheService: the workloads' face."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from modelcache.v1 import cache_pb2, cache_pb2_grpc

from modelcached.cache import Cache, Watch
from modelcached.cache.requests import Phase, Progress
from modelcached.errors import CacheError, Reason
from modelcached.service import translate
from modelcached.service.status import Gate, stream, unary

T = TypeVar("T")

_UNCHANGED_SECONDS = 5.0
"""So that a caller can tell a daemon that waits (a silent Hub) from one that hangs."""

PROGRESS_SECONDS = 0.5
"""How often a stream looks at its request; a reader that is slower sees fewer steps."""
FIRST_SECONDS = 0.1
"""When it looks for the first time."""
_DEFAULT_PAGE, _MAX_PAGE = 100, 500


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Handlers; each translates, asks the cache, translates back."""

    def __init__(self, cache: Cache, gate: Gate, pod_seen: Callable[[str], bool]) -> None:
        self._cache = cache
        self.gate = gate
        self._pod_seen = pod_seen

    @stream
    async def EnsureModel(  # noqa: N802 - the contract's names
        self, request: cache_pb2.EnsureModelRequest, context: Any
    ) -> None:
        """See the contract."""
        wanted = translate.ensure_request(request)
        with structlog.contextvars.bound_contextvars(request_id=wanted.request_id):
            core = self._cache.core
            watch = Watch(with_files=wanted.with_files, answer=core.pools.precedence.begin())
            try:
                ready = await told(
                    watch, wanted.request_id, context.write, self._cache.ensure(wanted, watch, self._pod_seen)
                )
                await context.write(translate.ready_message(ready, core.clock))
            finally:
                watch.step_back()

    @unary
    async def GetModel(self, request: cache_pb2.GetModelRequest, context: Any) -> cache_pb2.GetModelResponse:  # noqa: N802
        """See the contract."""
        del context
        model = await self._cache.shelf.get(translate.model_request(request.model))
        return cache_pb2.GetModelResponse(model=translate.model_message(model), hub_dir=self._cache.core.layout.hub)

    @unary
    async def ListModels(self, request: cache_pb2.ListModelsRequest, context: Any) -> cache_pb2.ListModelsResponse:  # noqa: N802
        """See the contract."""
        del context
        size = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE) if request.page_size >= 0 else _DEFAULT_PAGE
        models, following = self._cache.shelf.page(translate.parse_page_token(request.page_token), size)
        return cache_pb2.ListModelsResponse(
            models=map(translate.model_message, models), next_page_token=translate.page_token(following)
        )

    @unary
    async def RenewLease(self, request: cache_pb2.RenewLeaseRequest, context: Any) -> cache_pb2.RenewLeaseResponse:  # noqa: N802
        """See the contract."""
        del context
        lease = await self._cache.leasing.renew(request.lease_id)
        return cache_pb2.RenewLeaseResponse(lease=translate.lease_message(lease, self._cache.core.clock))

    @unary
    async def ReleaseLease(  # noqa: N802
        self, request: cache_pb2.ReleaseLeaseRequest, context: Any
    ) -> cache_pb2.ReleaseLeaseResponse:
        """See the contract."""
        del context
        await self._cache.leasing.release([request.lease_id])
        return cache_pb2.ReleaseLeaseResponse()

    @stream
    async def HoldModel(  # noqa: N802
        self, request: cache_pb2.HoldModelRequest, context: Any
    ) -> None:
        """See the contract."""
        async with self._cache.leasing.held(request.lease_id) as lease:
            clock = self._cache.core.clock
            since = translate.timestamp(clock.wall())
            message = translate.lease_message(lease, clock)
            await context.write(cache_pb2.HoldModelResponse(lease=message, held_since=since))
            await self._cache.leasing.until_released(request.lease_id)
            if self._cache.stopping:
                raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; the lease waits for reconnect_grace")
            raise CacheError(Reason.LEASE_NOT_FOUND, f"lease {request.lease_id} was released")


async def told(watch: Watch, request_id: str, write: Callable[[Any], Awaitable[None]], request: Awaitable[T]) -> T:
    """The request's answer; meanwhile ``write`` is told how it stands."""
    teller = _Teller(watch, request_id, write)
    try:
        answer = await request
    except BaseException:
        await teller.cancel()
        raise
    await teller.end()
    return answer


class _Teller:
    """Tells a caller how its request stands: now and again, at the least when something changed."""

    def __init__(self, watch: Watch, request_id: str, write: Callable[[Any], Awaitable[None]]) -> None:
        self._watch = watch
        self._request_id = request_id
        self._write = write
        self._ended = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None
        # A hit takes milliseconds, many at once some tens: only what takes longer has steps.
        self._begins = asyncio.get_running_loop().call_later(FIRST_SECONDS, self._begin)

    def _begin(self) -> None:
        self._watch.step_back()
        self._telling = asyncio.create_task(self._tell(), name=f"tell {self._request_id}")

    async def _tell(self) -> None:
        last: Progress | None = None
        told_at = 0.0
        while not self._ended.is_set():
            now = self._watch.progress()
            if now != last or time.monotonic() - told_at >= _UNCHANGED_SECONDS:
                last, told_at = now, time.monotonic()
                await self._write(translate.progress_message(now, self._request_id))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), PROGRESS_SECONDS)

    async def end(self) -> None:
        """The request has its answer. A step that is being sent cannot be taken back, and goes first."""
        self._begins.cancel()
        if self._telling is not None:
            self._ended.set()
            await self._telling
            end = self._watch.progress()
            ready = Progress(Phase.READY, end.bytes_total, end.bytes_total, 0, end.waiters)
            await self._write(translate.progress_message(ready, self._request_id))

    async def cancel(self) -> None:
        """The request has none: it failed, or its caller has gone."""
        self._begins.cancel()
        if self._telling is not None:
            self._ended.set()
            await asyncio.gather(self._telling, return_exceptions=True)

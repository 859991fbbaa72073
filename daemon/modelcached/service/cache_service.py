"""CacheService: the workloads' face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog
from modelcache.v1 import cache_pb2, cache_pb2_grpc

from modelcached.cache import Cache, Watch
from modelcached.cache.requests import Phase, Progress, Ready
from modelcached.errors import CacheError, Reason
from modelcached.service import translate
from modelcached.service.status import Gate, stream, unary

PROGRESS_SECONDS = 0.5
"""How often a stream looks at its request; a reader that is slower sees fewer steps."""
_DEFAULT_PAGE, _MAX_PAGE = 100, 1000


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Handlers; each translates, asks the cache, translates back."""

    def __init__(self, cache: Cache, gate: Gate, pod_seen: Callable[[str], bool]) -> None:
        self._cache = cache
        self.gate = gate
        self._pod_seen = pod_seen

    @stream
    async def EnsureModel(  # noqa: N802 - the contract's names
        self, request: cache_pb2.EnsureModelRequest, context: Any
    ) -> AsyncIterator[cache_pb2.EnsureModelResponse]:
        """See the contract."""
        del context
        wanted = translate.ensure_request(request)
        with structlog.contextvars.bound_contextvars(request_id=wanted.request_id):
            watch = Watch()
            work = asyncio.create_task(self._cache.ensure(wanted, watch, self._pod_seen))
            try:
                async for progress in _steps(work, watch):
                    yield translate.progress_message(progress, wanted.request_id)
                yield translate.ready_message(await work, self._cache.core.clock)
            finally:
                await _end(work)

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
    ) -> AsyncIterator[cache_pb2.HoldModelResponse]:
        """See the contract."""
        del context
        async with self._cache.leasing.held(request.lease_id) as lease:
            clock = self._cache.core.clock
            yield cache_pb2.HoldModelResponse(
                lease=translate.lease_message(lease, clock), held_since=translate.timestamp(clock.wall())
            )
            await self._cache.leasing.until_released(request.lease_id)
            if self._cache.stopping:
                raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; the lease waits for reconnect_grace")
            raise CacheError(Reason.LEASE_NOT_FOUND, f"lease {request.lease_id} was released")


async def _steps(work: asyncio.Task[Ready], watch: Watch) -> AsyncIterator[Progress]:
    """The request's progress now and again until it ends; at the least when something changed."""
    last: Progress | None = None
    # A hit takes milliseconds: only what takes longer has steps.
    await asyncio.wait({work}, timeout=0.02)
    while not work.done():
        now = watch.progress()
        if now != last:
            last = now
            yield now
        await asyncio.wait({work}, timeout=PROGRESS_SECONDS)
    if last is not None and not work.cancelled() and work.exception() is None:
        final = watch.progress()
        yield Progress(Phase.READY, final.bytes_total, final.bytes_total, 0, final.waiters)


async def _end(work: asyncio.Task[Ready]) -> None:
    """The caller has gone or has its answer: nothing of the call is left behind."""
    if not work.done():
        work.cancel()
    await asyncio.gather(work, return_exceptions=True)

"""CacheService: the workloads' face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from modelcache.v1 import cache_pb2, cache_pb2_grpc

from modelcached.cache import Cache, Watch
from modelcached.errors import CacheError, Reason
from modelcached.service import translate
from modelcached.service.status import Gate, stream, unary
from modelcached.service.telling import Telling

_DEFAULT_PAGE, _MAX_PAGE = 100, 500


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Handlers; each translates, asks the cache, translates back."""

    def __init__(self, cache: Cache, gate: Gate, pod_seen: Callable[[str], bool]) -> None:
        self._cache = cache
        self.gate = gate
        self._pod_seen = pod_seen
        self._telling = Telling()

    @stream
    async def EnsureModel(  # noqa: N802 - the contract's names
        self, request: cache_pb2.EnsureModelRequest, context: Any
    ) -> None:
        """See the contract."""
        wanted = translate.ensure_request(request)
        # Never taken back: gRPC runs each call as a task of its own.
        structlog.contextvars.bind_contextvars(request_id=wanted.request_id)
        core = self._cache.core
        watch = Watch(with_files=wanted.with_files, answer=core.pools.precedence.begin())
        try:
            work = self._cache.ensure(wanted, watch, self._pod_seen)
            ready = await self._telling.told(watch, wanted.request_id, context.write, work)
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

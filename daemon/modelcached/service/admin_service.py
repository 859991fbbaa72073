"""AdminService: the operators' face."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog
from modelcache.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, common_pb2

from modelcached import __version__
from modelcached.cache import Cache, Watch, garbage
from modelcached.cache.requests import Reading
from modelcached.doctor import Doctor
from modelcached.errors import CacheError, Reason
from modelcached.ledger.history import History, Row
from modelcached.ledger.leases import LeaseKind
from modelcached.model import SnapshotId, as_commit, parse_repo_id, parse_revision, shown
from modelcached.service import operators, translate
from modelcached.service.status import Gate, stream, unary
from modelcached.service.telling import PROGRESS_SECONDS, Telling

_LEAST_INTERVAL_SECONDS = 0.1
_ROW_ID = re.compile(r"[0-9]{1,18}")
"""What SQLite takes as an integer, with room to spare."""
_DEFAULT_PAGE, _MAX_PAGE = 1000, 10_000
_EVENTS_PAGE, _MAX_EVENTS_PAGE = 100, 1000


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Handlers; each translates, asks the cache, translates back."""

    def __init__(
        self,
        cache: Cache,
        history: History,
        doctor: Doctor,
        config_file: Path | None,
        gate: Gate,
        pod_seen: Callable[[str], bool],
    ) -> None:
        self._cache = cache
        self._pod_seen = pod_seen
        self._doctor = doctor
        self._history = history
        self._config_file = config_file
        self.gate = gate
        self._telling = Telling()
        self._started_at = cache.core.clock.wall()

    async def _status(self) -> admin_pb2.CacheStatus:
        return operators.status_message(await self._cache.status(), version=__version__, started_at=self._started_at)

    @unary
    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Any) -> admin_pb2.GetStatusResponse:  # noqa: N802
        """See the contract."""
        del request, context
        return admin_pb2.GetStatusResponse(status=await self._status())

    @stream
    async def WatchStatus(  # noqa: N802
        self, request: admin_pb2.WatchStatusRequest, context: Any
    ) -> None:
        """See the contract."""
        interval = request.interval.ToTimedelta().total_seconds() if request.HasField("interval") else 1.0
        while not self._cache.stopping:
            await context.write(admin_pb2.WatchStatusResponse(status=await self._status()))
            await asyncio.sleep(max(_LEAST_INTERVAL_SECONDS, interval))
        raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")

    @unary
    async def EvictModels(self, request: admin_pb2.EvictModelsRequest, context: Any) -> admin_pb2.EvictModelsResponse:  # noqa: N802
        """See the contract."""
        del context
        snapshots: dict[SnapshotId, None] = {}
        short = 0
        by_rule = request.HasField("rule")
        if by_rule and request.models:
            raise CacheError(Reason.INVALID_REQUEST, "the request names models and a rule: one or the other")
        if by_rule:
            meant, short = await self._cache.shelf.by_rule(operators.eviction_rule(request.rule))
            snapshots = dict.fromkeys(meant)
        snapshots |= self._named(request.models)
        if not snapshots and not by_rule:
            raise CacheError(Reason.INVALID_REQUEST, "the request names no model")
        evicted = await self._cache.evict(list(snapshots), dry_run=request.dry_run)
        return admin_pb2.EvictModelsResponse(
            models=map(operators.evicted_message, evicted),
            bytes_freed=sum(e.freed_bytes for e in evicted),
            bytes_short=short,
        )

    def _named(self, models: Iterable[common_pb2.ModelReference]) -> dict[SnapshotId, None]:
        """The cached snapshots that they mean, in that order; a revision left empty means every cached commit."""
        snapshots: dict[SnapshotId, None] = {}
        for model in models:
            revision = parse_revision(model.revision) if model.revision else None
            snapshots |= dict.fromkeys(self._cache.shelf.named(parse_repo_id(model.repo_id), revision))
        return snapshots

    @unary
    async def PlanModels(self, request: admin_pb2.PlanModelsRequest, context: Any) -> admin_pb2.PlanModelsResponse:  # noqa: N802
        """See the contract."""
        del context
        if len(request.models) > translate.MAX_ADAPTERS + 1:
            raise CacheError(
                Reason.INVALID_REQUEST,
                f"a plan is for {translate.MAX_ADAPTERS + 1} models at the most, this one names {len(request.models)}",
            )
        models = translate.model_requests(request.models) or tuple(each.model for each in self._cache.core.listed())
        if not models:
            raise CacheError(Reason.INVALID_REQUEST, "the request names no model, and there is no model list")
        return operators.plan_message(await self._cache.plan(models))

    @unary
    async def PinModel(self, request: admin_pb2.PinModelRequest, context: Any) -> admin_pb2.PinModelResponse:  # noqa: N802
        """See the contract."""
        del context
        model = translate.model_request(request.model)
        pinned = await self._cache.pin(model.repo_id, model.revision)
        return admin_pb2.PinModelResponse(models=map(translate.model_message, pinned))

    @unary
    async def UnpinModel(self, request: admin_pb2.UnpinModelRequest, context: Any) -> admin_pb2.UnpinModelResponse:  # noqa: N802
        """See the contract."""
        del context
        model = translate.model_request(request.model)
        return admin_pb2.UnpinModelResponse(listed=await self._cache.unpin(model.repo_id, model.revision))

    @unary
    async def CancelTransfer(  # noqa: N802
        self, request: admin_pb2.CancelTransferRequest, context: Any
    ) -> admin_pb2.CancelTransferResponse:
        """See the contract."""
        del context
        commit = as_commit(request.commit) if request.commit else None
        if request.commit and commit is None:
            raise CacheError(Reason.INVALID_REVISION, f"'{shown(request.commit)}' is not a 40-hex commit")
        return admin_pb2.CancelTransferResponse(cancelled=self._cache.cancel(parse_repo_id(request.repo_id), commit))

    @unary
    async def ListLeases(self, request: admin_pb2.ListLeasesRequest, context: Any) -> admin_pb2.ListLeasesResponse:  # noqa: N802
        """See the contract."""
        del context
        size = min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE) if request.page_size >= 0 else _DEFAULT_PAGE
        core = self._cache.core
        ordered = sorted(core.use.leases.values(), key=lambda lease: (lease.granted_at, lease.id))
        start = int(request.page_token) if request.page_token.isdigit() else 0
        chosen = ordered[start : start + size]
        following = str(start + size) if start + size < len(ordered) else ""
        return admin_pb2.ListLeasesResponse(
            leases=[translate.lease_message(lease, core.clock, core.use.seconds_left(lease)) for lease in chosen],
            next_page_token=following,
        )

    @unary
    async def ReleaseLeases(  # noqa: N802
        self, request: admin_pb2.ReleaseLeasesRequest, context: Any
    ) -> admin_pb2.ReleaseLeasesResponse:
        """See the contract."""
        del context
        leases = self._cache.core.use.leases
        unknown = [lease_id for lease_id in request.lease_ids if lease_id not in leases]
        if unknown:
            raise CacheError(Reason.LEASE_NOT_FOUND, f"there is no lease '{shown(unknown[0])}'; nothing was released")
        chosen = dict.fromkeys(request.lease_ids)
        if request.repo_id:
            repo_id = parse_repo_id(request.repo_id)
            chosen |= dict.fromkeys(
                lease.id for lease in leases.values() if any(m.snapshot.repo_id == repo_id for m in lease.models)
            )
        if request.recovered:
            chosen |= dict.fromkeys(lease.id for lease in leases.values() if lease.kind is LeaseKind.RECOVERED)
        released = await self._cache.release(list(chosen))
        return admin_pb2.ReleaseLeasesResponse(lease_ids=released)

    @unary
    async def ListEvents(self, request: admin_pb2.ListEventsRequest, context: Any) -> admin_pb2.ListEventsResponse:  # noqa: N802
        """See the contract."""
        del context
        size = min(request.page_size or _EVENTS_PAGE, _MAX_EVENTS_PAGE) if request.page_size >= 0 else _EVENTS_PAGE
        kinds = operators.event_kinds(request.kinds)
        since = request.since.ToNanoseconds() / 1e9 if request.HasField("since") else 0.0
        name = parse_repo_id(request.repo_id) if request.repo_id else None
        before = int(request.page_token) if _ROW_ID.fullmatch(request.page_token) else None
        if request.page_token and before is None:
            raise CacheError(Reason.INVALID_REQUEST, f"page_token '{shown(request.page_token)}' is none of ours")

        def wanted(row: Row) -> bool:
            names = (row.entry.model, *row.entry.others)
            of_it = name is None or any(each.partition("@")[0] == name for each in names)
            return row.entry.kind in kinds and row.at >= since and of_it

        rows, more = await self._history.newest(size, before, wanted)
        return admin_pb2.ListEventsResponse(
            events=map(operators.event_message, rows), next_page_token=str(rows[-1].id) if more else ""
        )

    @unary
    async def DescribeModel(  # noqa: N802
        self, request: admin_pb2.DescribeModelRequest, context: Any
    ) -> admin_pb2.DescribeModelResponse:
        """See the contract."""
        del context
        repo_id, revision = parse_repo_id(request.model.repo_id), parse_revision(request.model.revision)
        return operators.detail_message(self._cache.shelf.detail(repo_id, revision), self._cache.core.clock)

    @stream
    async def VerifyModels(  # noqa: N802
        self, request: admin_pb2.VerifyModelsRequest, context: Any
    ) -> None:
        """See the contract."""
        snapshots = self._named(request.models)
        if not request.models:
            snapshots = dict.fromkeys(sorted(snapshot.id for snapshot in self._cache.core.index.snapshots()))
        reading = Reading()
        work = asyncio.create_task(self._cache.audit.read(snapshots, reading, repair=request.repair), name="verify")
        try:
            while not work.done():
                await context.write(operators.reading_message(reading))
                await asyncio.wait({work}, timeout=PROGRESS_SECONDS)
        finally:
            work.cancel()  # its caller has gone
        await work
        await context.write(operators.read_message(reading))

    @stream
    async def ImportModel(  # noqa: N802
        self, request: admin_pb2.ImportModelRequest, context: Any
    ) -> None:
        """See the contract."""
        wanted = operators.import_request(request)

        async def write(step: cache_pb2.EnsureModelResponse) -> None:
            await context.write(admin_pb2.ImportModelResponse(progress=step.progress))

        with structlog.contextvars.bound_contextvars(request_id=wanted.request_id):
            watch = Watch(with_files=wanted.with_files)
            work = self._cache.import_model(wanted, watch, self._pod_seen)
            ready, removed = await self._telling.told(watch, wanted.request_id, write, work)
            message = translate.ready_message(ready, self._cache.core.clock)
            await context.write(
                admin_pb2.ImportModelResponse(
                    ready=message.ready, removed_bytes=removed.freed_bytes, kept_paths=removed.kept
                )
            )

    @unary
    async def CollectGarbage(  # noqa: N802
        self, request: admin_pb2.CollectGarbageRequest, context: Any
    ) -> admin_pb2.CollectGarbageResponse:
        """See the contract."""
        del context
        kinds = operators.garbage_kinds(request.kinds)
        if request.remove:
            items, freed = await garbage.collect(self._cache.core, kinds)
        else:
            items = await garbage.found(self._cache.core, kinds)
            freed = sum(item.size_bytes for item in items if not item.in_use)
        return admin_pb2.CollectGarbageResponse(items=map(operators.garbage_message, items), bytes_freed=freed)

    @stream
    async def Diagnose(  # noqa: N802
        self, request: admin_pb2.DiagnoseRequest, context: Any
    ) -> None:
        """See the contract."""
        repo_id = parse_repo_id(request.repo_id) if request.repo_id else None
        async for finding in self._doctor.examine(repo_id):
            await context.write(operators.finding_message(finding))

    @unary
    async def GetConfig(self, request: admin_pb2.GetConfigRequest, context: Any) -> admin_pb2.GetConfigResponse:  # noqa: N802
        """See the contract."""
        del request, context
        core = self._cache.core
        return admin_pb2.GetConfigResponse(
            settings=operators.setting_messages(core.config, core.written or core.config),
            config_file=str(self._config_file or ""),
        )

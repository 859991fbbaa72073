"""A daemon whose answers a test writes: a real gRPC server on a real Unix socket, with nothing behind it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from modelcache.reasons import DOMAIN, TABLE, Reason
from modelcache.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, cache_pb2_grpc, common_pb2

COMMIT = "a" * 40
LEASE = "lease-1"
CODES = {code.value[0]: code for code in grpc.StatusCode}

Ensure = Callable[[cache_pb2.EnsureModelRequest, grpc.ServicerContext], Iterator[cache_pb2.EnsureModelResponse]]
Hold = Callable[[cache_pb2.HoldModelRequest, grpc.ServicerContext], Iterator[cache_pb2.HoldModelResponse]]


def snapshot_path(repo_id: str, commit: str = COMMIT) -> str:
    return f"models--{repo_id.replace('/', '--')}/snapshots/{commit}"


def details(
    reason: str, message: str, metadata: dict[str, str] | None = None, delay: timedelta | None = None
) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata of an error, as the daemon sends it."""
    status = common_pb2.Status(code=TABLE[Reason(reason)].code if reason in Reason.__members__ else 2, message=message)
    info = common_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata or {})
    status.details.append(
        PackedAny(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
    )
    if delay is not None:
        retry = common_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(delay)
        status.details.append(
            PackedAny(type_url="type.googleapis.com/google.rpc.RetryInfo", value=retry.SerializeToString())
        )
    return (("grpc-status-details-bin", status.SerializeToString()),)


def refuse(
    context: grpc.ServicerContext,
    reason: Reason,
    message: str = "the message of the daemon",
    *,
    metadata: dict[str, str] | None = None,
    delay: timedelta | None = None,
) -> NoReturn:
    context.set_trailing_metadata(details(reason, message, metadata, delay))
    context.abort(CODES[TABLE[reason].code], message)


def until_over(context: grpc.ServicerContext) -> None:
    """Returns when the caller has gone, or the server stops."""
    over = threading.Event()
    if context.add_callback(over.set):
        over.wait()


def progress(phase: int = cache_pb2.PHASE_DOWNLOADING, done: int = 0, total: int = 0) -> cache_pb2.EnsureModelResponse:
    return cache_pb2.EnsureModelResponse(
        progress=cache_pb2.Progress(phase=phase, bytes_done=done, bytes_total=total, waiters=1)
    )


@dataclass
class FakeDaemon:
    """Answers what its attributes say; notes what it was asked."""

    socket: Path
    hub: Path
    cached: list[common_pb2.Model] = field(default_factory=list)
    status: admin_pb2.CacheStatus = field(default_factory=admin_pb2.CacheStatus)
    lease: common_pb2.Lease | None = None
    on_ensure: Ensure | None = None
    on_hold: Hold | None = None
    on_any: Callable[[grpc.ServicerContext], None] = lambda _context: None
    ensured: queue.Queue[cache_pb2.EnsureModelRequest] = field(default_factory=queue.Queue)
    held: queue.Queue[str] = field(default_factory=queue.Queue)
    released: queue.Queue[str] = field(default_factory=queue.Queue)
    asked: list[object] = field(default_factory=list)
    leases: list[common_pb2.Lease] = field(default_factory=list)
    evictable: admin_pb2.EvictModelsResponse = field(default_factory=admin_pb2.EvictModelsResponse)
    planned: admin_pb2.PlanModelsResponse = field(default_factory=admin_pb2.PlanModelsResponse)
    detail: admin_pb2.DescribeModelResponse = field(default_factory=admin_pb2.DescribeModelResponse)
    events: list[admin_pb2.Event] = field(default_factory=list)
    read: admin_pb2.VerifyDone = field(default_factory=admin_pb2.VerifyDone)
    garbage: admin_pb2.CollectGarbageResponse = field(default_factory=admin_pb2.CollectGarbageResponse)
    config: admin_pb2.GetConfigResponse = field(default_factory=admin_pb2.GetConfigResponse)
    findings: list[admin_pb2.Finding] = field(default_factory=list)
    listed: bool = False
    """The model list keeps what is unpinned."""
    server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
        cache_pb2_grpc.add_CacheServiceServicer_to_server(_Cache(self), self.server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(_Admin(self), self.server)
        self.server.add_insecure_port(self.address)
        self.server.start()

    def stop(self) -> None:
        """Gone as after SIGKILL: connections end, and the socket file stays."""
        if self.server is not None:
            self.server.stop(None).wait()
            self.server = None

    def ready(self, request: cache_pb2.EnsureModelRequest, **fields: object) -> cache_pb2.EnsureModelResponse:
        """Ready, with a true snapshot directory for each model asked for."""
        models = []
        for wanted in (request.model, *request.adapters):
            (self.hub / snapshot_path(wanted.repo_id)).mkdir(parents=True, exist_ok=True)
            models.append(
                common_pb2.ReadyModel(
                    repo_id=wanted.repo_id,
                    revision=wanted.revision or "main",
                    commit=COMMIT,
                    path=snapshot_path(wanted.repo_id),
                    outcome=common_pb2.OUTCOME_DOWNLOADED,
                    profile=wanted.profile.name or "vllm",
                    bytes_total=1000,
                    bytes_fetched=900,
                    **fields,
                )
            )
        kind = common_pb2.LEASE_KIND_STREAM if request.lease.stream else common_pb2.LEASE_KIND_TTL
        lease = self.lease or common_pb2.Lease(id=LEASE, kind=kind)
        return cache_pb2.EnsureModelResponse(ready=cache_pb2.Ready(models=models, lease=lease, hub_dir=str(self.hub)))


@dataclass
class _Cache(cache_pb2_grpc.CacheServiceServicer):
    daemon: FakeDaemon

    def EnsureModel(self, request, context):  # noqa: N802
        self.daemon.ensured.put(request)
        self.daemon.on_any(context)
        if self.daemon.on_ensure is not None:
            yield from self.daemon.on_ensure(request, context)
        else:
            yield self.daemon.ready(request)

    def GetModel(self, request, context):  # noqa: N802
        self.daemon.on_any(context)
        for model in self.daemon.cached:
            if model.repo_id == request.model.repo_id:
                return cache_pb2.GetModelResponse(model=model, hub_dir=str(self.daemon.hub))
        refuse(context, Reason.MODEL_NOT_CACHED)

    def ListModels(self, request, context):  # noqa: N802
        """Pages of two, whatever is asked, so that every list has several."""
        self.daemon.on_any(context)
        at = int(request.page_token or 0)
        more = at + 2 < len(self.daemon.cached)
        return cache_pb2.ListModelsResponse(
            models=self.daemon.cached[at : at + 2], next_page_token=str(at + 2) if more else ""
        )

    def RenewLease(self, request, context):  # noqa: N802
        self.daemon.on_any(context)
        return cache_pb2.RenewLeaseResponse(lease=common_pb2.Lease(id=request.lease_id))

    def ReleaseLease(self, request, context):  # noqa: N802
        self.daemon.released.put(request.lease_id)
        return cache_pb2.ReleaseLeaseResponse()

    def HoldModel(self, request, context):  # noqa: N802
        self.daemon.held.put(request.lease_id)
        if self.daemon.on_hold is not None:
            yield from self.daemon.on_hold(request, context)
            return
        yield cache_pb2.HoldModelResponse(lease=common_pb2.Lease(id=request.lease_id))
        until_over(context)


@dataclass
class _Admin(admin_pb2_grpc.AdminServiceServicer):
    daemon: FakeDaemon

    def GetStatus(self, request, context):  # noqa: N802
        self.daemon.on_any(context)
        return admin_pb2.GetStatusResponse(status=self.daemon.status)

    def EvictModels(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return self.daemon.evictable

    def PlanModels(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return self.daemon.planned

    def PinModel(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return admin_pb2.PinModelResponse(models=self.daemon.cached[:1])

    def UnpinModel(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return admin_pb2.UnpinModelResponse(listed=self.daemon.listed)

    def CancelTransfer(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return admin_pb2.CancelTransferResponse(cancelled=1)

    def ListLeases(self, request, context):  # noqa: N802
        self.daemon.on_any(context)
        at = int(request.page_token or 0)
        more = at + 2 < len(self.daemon.leases)
        return admin_pb2.ListLeasesResponse(
            leases=self.daemon.leases[at : at + 2], next_page_token=str(at + 2) if more else ""
        )

    def ReleaseLeases(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return admin_pb2.ReleaseLeasesResponse(lease_ids=request.lease_ids or ["lease-7"])

    def WatchStatus(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        while context.is_active():
            yield admin_pb2.WatchStatusResponse(status=self.daemon.status)

    def DescribeModel(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return self.daemon.detail

    def ListEvents(self, request, context):  # noqa: N802
        """Pages of two, as ListModels."""
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        at = int(request.page_token or 0)
        more = at + 2 < len(self.daemon.events)
        return admin_pb2.ListEventsResponse(
            events=self.daemon.events[at : at + 2], next_page_token=str(at + 2) if more else ""
        )

    def VerifyModels(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        yield admin_pb2.VerifyModelsResponse(progress=admin_pb2.VerifyProgress(bytes_total=10, bytes_done=5))
        yield admin_pb2.VerifyModelsResponse(done=self.daemon.read)

    def CollectGarbage(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return self.daemon.garbage

    def GetConfig(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        return self.daemon.config

    def Diagnose(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        for finding in self.daemon.findings:
            yield admin_pb2.DiagnoseResponse(finding=finding)

    def ImportModel(self, request, context):  # noqa: N802
        self.daemon.asked.append(request)
        self.daemon.on_any(context)
        yield admin_pb2.ImportModelResponse(progress=cache_pb2.Progress(bytes_total=10, bytes_done=5))
        wanted = cache_pb2.EnsureModelRequest(model=request.model, lease=request.lease)
        yield admin_pb2.ImportModelResponse(ready=self.daemon.ready(wanted).ready)

"""What operators ask, for Python programs: AdminService beside the Client of the same socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import Self

from modelcache.client import Client, EnsureEvent, Stream, answer
from modelcache.connection import admin_address, open_channel
from modelcache.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, common_pb2

_PAGE_SIZE = 500

PLAN_SECONDS = 120.0
"""The Hub is asked for each model."""
VerifyEvent = admin_pb2.VerifyProgress | admin_pb2.VerifyDone

EVICT_SECONDS = 600.0
"""Unlinking 140 GB takes ext4 some seconds; a disk that is busy, minutes."""


class Admin:
    """A connection to the operators' socket, which serves CacheService too. Every call raises ModelCacheError."""

    def __init__(self, address: str | None = None) -> None:
        """``address``: else MODELCACHE_ADMIN_ADDRESS, else the default socket. Raises AddressError."""
        self.address = admin_address(address)
        self._channel = open_channel(self.address)
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.cache = Client(self.address, channel=self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def status(self) -> admin_pb2.CacheStatus:
        """The disk's truth at this moment."""
        return answer(self._stub.GetStatus, admin_pb2.GetStatusRequest()).status

    def watch(self, interval: timedelta) -> Stream[admin_pb2.CacheStatus]:
        """The same, again and again; at least 100 ms between two."""
        request = admin_pb2.WatchStatusRequest()
        request.interval.FromTimedelta(interval)
        return Stream(self._stub.WatchStatus(request), lambda response: response.status)

    def describe(self, model: common_pb2.ModelReference) -> admin_pb2.DescribeModelResponse:
        """One cached snapshot down to its files. Raises MODEL_NOT_CACHED."""
        return answer(self._stub.DescribeModel, admin_pb2.DescribeModelRequest(model=model))

    def events(
        self,
        repo_id: str = "",
        kinds: Iterable[admin_pb2.EventKind.ValueType] = (),
        since: datetime | None = None,
        page_size: int = _PAGE_SIZE,
    ) -> Iterator[admin_pb2.Event]:
        """The history, page after page, newest first. ``since`` is an aware moment."""
        request = admin_pb2.ListEventsRequest(page_size=page_size, repo_id=repo_id, kinds=kinds)
        if since is not None:
            request.since.FromDatetime(since)
        while True:
            page = answer(self._stub.ListEvents, request)
            yield from page.events
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def verify(self, models: Iterable[common_pb2.ModelReference], *, repair: bool) -> Stream[VerifyEvent]:
        """Reads cached files again, all where no model is named: VerifyProgress again and again, then VerifyDone."""
        request = admin_pb2.VerifyModelsRequest(models=models, repair=repair)
        return Stream(self._stub.VerifyModels(request), _verify_event)

    def import_model(
        self,
        path: str,
        model: common_pb2.ModelReference,
        lease: cache_pb2.LeaseRequest,
        *,
        move: bool = False,
        with_files: bool = False,
        ended: Callable[[admin_pb2.ImportModelResponse], object] = lambda _response: None,
    ) -> Stream[EnsureEvent]:
        """Takes a model from a folder that the daemon sees: Progress again and again, then Ready.

        ``move``: what was taken is removed there; ``ended`` is told of what was, with Ready. ``with_files``: whether
        Progress tells of each file.
        """

        def event_of(response: admin_pb2.ImportModelResponse) -> EnsureEvent:
            if response.WhichOneof("event") != "ready":
                return response.progress
            ended(response)
            return response.ready

        request = admin_pb2.ImportModelRequest(path=path, model=model, lease=lease, move=move, with_files=with_files)
        return Stream(self._stub.ImportModel(request), event_of)

    def garbage(
        self, kinds: Iterable[admin_pb2.GarbageKind.ValueType] = (), *, remove: bool
    ) -> admin_pb2.CollectGarbageResponse:
        """What lies in the cache beside models, or with ``remove`` what of it went."""
        request = admin_pb2.CollectGarbageRequest(kinds=kinds, remove=remove)
        return answer(self._stub.CollectGarbage, request, EVICT_SECONDS)

    def diagnose(self, repo_id: str = "") -> Stream[admin_pb2.Finding]:
        """The checklist that a person would go through, as the daemon sees it; ``repo_id``: whose access is tried."""
        request = admin_pb2.DiagnoseRequest(repo_id=repo_id)
        return Stream(self._stub.Diagnose(request), lambda response: response.finding)

    def config(self) -> admin_pb2.GetConfigResponse:
        """The settings in force."""
        return answer(self._stub.GetConfig, admin_pb2.GetConfigRequest())

    def evict(
        self,
        models: Iterable[common_pb2.ModelReference] = (),
        *,
        dry_run: bool,
        rule: admin_pb2.EvictionRule | None = None,
    ) -> admin_pb2.EvictModelsResponse:
        """What went, or would go; of the models named, or of those that nothing keeps and a rule means.

        Raises IN_USE, and then nothing went.
        """
        request = admin_pb2.EvictModelsRequest(models=models, dry_run=dry_run, rule=rule)
        return answer(self._stub.EvictModels, request, EVICT_SECONDS)

    def plan(self, models: Iterable[common_pb2.ModelReference]) -> admin_pb2.PlanModelsResponse:
        """What making them whole together would take. Raises what a request for them would, but for space."""
        return answer(self._stub.PlanModels, admin_pb2.PlanModelsRequest(models=models), PLAN_SECONDS)

    def pin(self, model: common_pb2.ModelReference) -> list[common_pb2.Model]:
        """Never evict this; returns the snapshots that the pin covers now."""
        return list(answer(self._stub.PinModel, admin_pb2.PinModelRequest(model=model)).models)

    def unpin(self, model: common_pb2.ModelReference) -> bool:
        """Takes an operator's pin away; whether the model list keeps one. Raises PIN_NOT_FOUND."""
        return answer(self._stub.UnpinModel, admin_pb2.UnpinModelRequest(model=model)).listed

    def cancel_transfer(self, repo_id: str, commit: str = "") -> int:
        """Ends running transfers of a repository, or of one commit; returns how many."""
        request = admin_pb2.CancelTransferRequest(repo_id=repo_id, commit=commit)
        return answer(self._stub.CancelTransfer, request).cancelled

    def leases(self) -> Iterator[common_pb2.Lease]:
        """All leases, page after page, oldest first."""
        token = ""
        while True:
            page = answer(self._stub.ListLeases, admin_pb2.ListLeasesRequest(page_size=_PAGE_SIZE, page_token=token))
            yield from page.leases
            token = page.next_page_token
            if not token:
                return

    def release(self, lease_ids: Iterable[str] = (), *, repo_id: str = "", recovered: bool = False) -> list[str]:
        """Ends leases by id, on a repository, or all recovered ones; returns the ids of those ended."""
        request = admin_pb2.ReleaseLeasesRequest(lease_ids=lease_ids, repo_id=repo_id, recovered=recovered)
        return list(answer(self._stub.ReleaseLeases, request).lease_ids)


def _verify_event(response: admin_pb2.VerifyModelsResponse) -> VerifyEvent:
    return response.done if response.WhichOneof("event") == "done" else response.progress

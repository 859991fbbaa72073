"""The daemon's API for Python programs: synchronous, typed, errors decoded.

    with Client() as client:
        for event in client.ensure(reference("org/name")):
            if isinstance(event, cache_pb2.Ready):
                print(event.models[0].path)

Every call raises ModelCacheError. Calls without a timeout of their own get
ANSWER_SECONDS; streams last as long as they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Self, TypeVar, cast

import grpc

from modelcache.connection import cache_address, open_channel
from modelcache.errors import ModelCacheError, from_rpc_error
from modelcache.v1 import cache_pb2, cache_pb2_grpc, common_pb2

ANSWER_SECONDS = 30.0
"""Longest wait for an answer that needs no network and no large disk work."""

_PAGE_SIZE = 500

_Response = TypeVar("_Response")
_Event = TypeVar("_Event")

EnsureEvent = cache_pb2.Progress | cache_pb2.Ready


def reference(
    repo_id: str,
    revision: str = "",
    *,
    profile: str = "",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> common_pb2.ModelReference:
    """A model as the API takes it; empty revision and profile mean the daemon's defaults, main and vllm."""
    return common_pb2.ModelReference(
        repo_id=repo_id,
        revision=revision,
        profile=common_pb2.Profile(name=profile, include=include, exclude=exclude),
    )


def parse_reference(text: str) -> tuple[str, str]:
    """Repository and revision of ``org/name`` or ``org/name@revision``; the revision is empty where none is given.

    Raises ValueError that names the text.
    """
    repo_id, at, revision = text.partition("@")
    if not repo_id or (at and not revision):
        raise ValueError(f"{text!r} is not a model: write org/name or org/name@revision")
    return repo_id, revision


class Stream(Generic[_Event]):
    """A server stream: iterate it for its events, cancel it (from a signal handler too) to end it."""

    def __init__(self, call: Iterator[_Response], event_of: Callable[[_Response], _Event]) -> None:
        self._call = call
        self._event_of = event_of

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[_Event]:
        try:
            for response in self._call:
                yield self._event_of(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def cancel(self) -> None:
        """Ends the stream; whoever iterates it gets ModelCacheError with CANCELLED."""
        cast(grpc.Call, self._call).cancel()


class Client:
    """A connection to CacheService. Cheap to make; one is enough for a process, and threads may share it."""

    def __init__(self, address: str | None = None, *, channel: grpc.Channel | None = None) -> None:
        """``address``: else MODELCACHE_ADDRESS, else the default socket. Raises AddressError.

        A channel that is given is used as it is, and stays the caller's to close.
        """
        self.address = cache_address(address)
        self._own_channel = None if channel else open_channel(self.address)
        self._stub = cache_pb2_grpc.CacheServiceStub(cast(grpc.Channel, channel or self._own_channel))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls under way end with CANCELLED."""
        if self._own_channel is not None:
            self._own_channel.close()

    def ensure(
        self,
        model: common_pb2.ModelReference,
        adapters: Iterable[common_pb2.ModelReference] = (),
        *,
        lease: cache_pb2.LeaseRequest | None = None,
        token: str = "",
        request_id: str = "",
        prewarm: bool | None = None,
        with_files: bool = False,
        timeout_seconds: float | None = None,
    ) -> Stream[EnsureEvent]:
        """Makes a model and its adapters whole on this node and leases them: Progress again and again, then Ready.

        ``prewarm``: whether the daemon reads the files ahead into the page cache, after its answer; None leaves it to
        the daemon's configuration. ``with_files``: whether Progress tells of each file that is on its way.
        Cancelling stops the wait, not the transfer.
        """
        request = cache_pb2.EnsureModelRequest(
            model=model,
            adapters=adapters,
            lease=lease,
            token=token,
            request_id=request_id,
            prewarm=prewarm,
            with_files=with_files,
        )
        return self.ensure_request(request, timeout_seconds=timeout_seconds)

    def ensure_request(
        self, request: cache_pb2.EnsureModelRequest, *, timeout_seconds: float | None = None
    ) -> Stream[EnsureEvent]:
        """The same, for a request that is made already."""
        return Stream(self._stub.EnsureModel(request, timeout=timeout_seconds), _ensure_event)

    def get(self, model: common_pb2.ModelReference) -> common_pb2.Model:
        """What is cached of a model, from the cache alone. Raises MODEL_NOT_CACHED."""
        return answer(self._stub.GetModel, cache_pb2.GetModelRequest(model=model)).model

    def list_models(self) -> Iterator[common_pb2.Model]:
        """All that is cached, page after page, in order of repository and commit; asked for at once."""
        return self._pages(self._page(""))

    def _pages(self, asked: grpc.Future[cache_pb2.ListModelsResponse] | None) -> Iterator[common_pb2.Model]:
        while asked is not None:
            try:
                page = asked.result()
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            # The daemon makes the next one while the caller looks at this one.
            asked = self._page(page.next_page_token) if page.next_page_token else None
            yield from page.models

    def _page(self, token: str) -> grpc.Future[cache_pb2.ListModelsResponse]:
        request = cache_pb2.ListModelsRequest(page_size=_PAGE_SIZE, page_token=token)
        return self._stub.ListModels.future(request, timeout=ANSWER_SECONDS)

    def renew(self, lease_id: str) -> common_pb2.Lease:
        """Starts a ttl lease's time anew. Raises LEASE_NOT_FOUND."""
        return answer(self._stub.RenewLease, cache_pb2.RenewLeaseRequest(lease_id=lease_id)).lease

    def release(self, lease_id: str, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        """Ends a lease; one that is gone is no error."""
        answer(self._stub.ReleaseLease, cache_pb2.ReleaseLeaseRequest(lease_id=lease_id), timeout_seconds)

    def hold(self, lease_id: str) -> Stream[common_pb2.Lease]:
        """Keeps a stream lease alive: one event when it is held, then silence. Raises LEASE_NOT_FOUND."""
        return Stream(self._stub.HoldModel(cache_pb2.HoldModelRequest(lease_id=lease_id)), _held_lease)


def _ensure_event(response: cache_pb2.EnsureModelResponse) -> EnsureEvent:
    return response.ready if response.WhichOneof("event") == "ready" else response.progress


def _held_lease(response: cache_pb2.HoldModelResponse) -> common_pb2.Lease:
    return response.lease


_Request = TypeVar("_Request")


def answer(
    method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout_seconds: float = ANSWER_SECONDS,
) -> _Response:
    """One call that answers once. Raises ModelCacheError."""
    try:
        return method(request, timeout=timeout_seconds)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


__all__ = ["ANSWER_SECONDS", "Client", "EnsureEvent", "ModelCacheError", "Stream", "parse_reference", "reference"]

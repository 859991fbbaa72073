"""The one place where the daemon's errors become gRPC statuses."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from modelcache.reasons import DOMAIN
from modelcache.v1 import common_pb2

from modelcached.errors import CacheError, Reason
from modelcached.model import shown

log = structlog.get_logger()
T = TypeVar("T")

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_DETAILS_KEY = "grpc-status-details-bin"
_NOT_LOGGED = (Reason.OVERLOADED, Reason.SHUTTING_DOWN)
"""Of all calls at once, and counted or known."""
_MAX_MESSAGE_CHARACTERS = 2000  # HTTP/2 header lists are limited to 8 KiB by default


def _packed(name: str, message: Message) -> AnyMessage:
    # google.rpc's own type names, so that any client that knows them decodes ours.
    return AnyMessage(type_url=f"type.googleapis.com/google.rpc.{name}", value=message.SerializeToString())


def details(error: CacheError) -> common_pb2.Status:
    """google.rpc.Status of the error, in our own wire-compatible message."""
    text = error.text[:_MAX_MESSAGE_CHARACTERS]
    metadata = {key: value[:500] for key, value in error.metadata.items()}
    info = common_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata)
    status = common_pb2.Status(code=int(error.entry.code), message=text, details=[_packed("ErrorInfo", info)])
    if error.retry_delay is not None:
        delay = Duration()
        delay.FromTimedelta(error.retry_delay)
        status.details.append(_packed("RetryInfo", common_pb2.RetryInfo(retry_delay=delay)))
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the call with the error's status. Never returns."""
    if not isinstance(error, CacheError):
        log.error("unexpected error in a call", exc_info=error)
        error = CacheError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
    status = details(error)
    await context.abort(
        _CODES[status.code], status.message, trailing_metadata=((_DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError("abort raises")


def unary(
    method: Callable[[Any, Any, Any], Awaitable[T]],
) -> Callable[[Any, Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[T]]:
    """Wraps a handler: its errors become statuses, its call is counted against the limit."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> T:
        try:
            with self.gate:
                return await method(self, request, context)
        except grpc.aio.InternalError:
            # ExecuteBatchError: what was being sent when its caller went. A call that is over has no status any more.
            raise asyncio.CancelledError from None
        except Exception as error:  # noqa: BLE001 - the edge of the daemon
            if isinstance(error, CacheError) and not error.is_logged and error.reason not in _NOT_LOGGED:
                asked = {"request_id": shown(request.request_id)} if getattr(request, "request_id", "") else {}
                log.info("refused", call=method.__name__, reason=error.reason.value, why=error.text, **asked)
            await abort(context, error)

    return call


def stream(
    method: Callable[[Any, Any, Any], Awaitable[None]],
) -> Callable[[Any, Any, grpc.aio.ServicerContext[Any, Any]], Any]:
    """The same for a handler that writes a stream of answers to its context.

    gRPC takes generators too, and the generated stubs know only those; one in another costs a hit more than its answer.
    """
    return unary(method)


class Gate:
    """Counts calls under way over both sockets; above the limit OVERLOADED."""

    def __init__(self, limit: int, refused: Callable[[], None] = lambda: None) -> None:
        """``refused`` is called for each call that is one too many."""
        self._limit = limit
        self._refused = refused
        self.under_way = 0

    def __enter__(self) -> None:
        """One call begins. Raises CacheError(OVERLOADED)."""
        if self.under_way >= self._limit:
            self._refused()
            raise CacheError(
                Reason.OVERLOADED,
                f"{self.under_way} calls are under way, server.max_streams is {self._limit}",
                metadata={"limit": self._limit},
            )
        self.under_way += 1

    def __exit__(self, *_: object) -> None:
        self.under_way -= 1

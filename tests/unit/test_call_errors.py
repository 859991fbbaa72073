"""What a call's error is to its caller, and to whoever reads the log."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from grpc._cython import cygrpc
from modelcached.errors import CacheError, Reason
from modelcached.service.status import Gate, unary
from structlog.testing import capture_logs


class Service:
    def __init__(self, error: BaseException) -> None:
        self.gate = Gate(8)
        self._error = error

    @unary
    async def call(self, _request: object, _context: Any) -> None:
        raise self._error


class Context:
    """Ends a call as gRPC does."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    async def abort(self, code: grpc.StatusCode, _message: str, **_: object) -> None:
        self.code = code
        raise grpc.aio.AbortError


async def end(error: BaseException) -> tuple[Any, type[BaseException], list[str]]:
    context, service = Context(), Service(error)
    with capture_logs() as lines, pytest.raises(BaseException) as caught:
        await service.call(None, context)
    assert service.gate.under_way == 0
    return context.code, caught.type, [line["event"] for line in lines]


async def test_a_caller_that_went_while_it_was_told_something_is_no_error() -> None:
    assert await end(cygrpc.ExecuteBatchError("execute_batch")) == (None, asyncio.CancelledError, [])


async def test_a_refusal_is_told_and_logged() -> None:
    told = await end(CacheError(Reason.IN_USE, "it is in use"))
    assert told == (grpc.StatusCode.FAILED_PRECONDITION, grpc.aio.AbortError, ["refused"])


async def test_a_refusal_that_stands_in_the_log_is_not_logged_again() -> None:
    error = CacheError(Reason.IN_USE, "it is in use")
    error.is_logged = True
    assert await end(error) == (grpc.StatusCode.FAILED_PRECONDITION, grpc.aio.AbortError, [])


@pytest.mark.parametrize("reason", [Reason.OVERLOADED, Reason.SHUTTING_DOWN])
async def test_what_meets_all_calls_at_once_is_not_logged_for_each(reason: Reason) -> None:
    assert (await end(CacheError(reason, "all of them")))[2] == []


async def test_what_nobody_expected_is_told_and_logged() -> None:
    told = await end(KeyError("x"))
    assert told == (grpc.StatusCode.INTERNAL, grpc.aio.AbortError, ["unexpected error in a call"])

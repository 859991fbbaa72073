"""Asking for a model until it is there: through a daemon that is not up yet, restarts, or is full for now."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import grpc

from modelcache.client import Client
from modelcache.connection import explain_unreachable
from modelcache.errors import ModelCacheError
from modelcache.interruption import Interruption
from modelcache.reasons import EXIT_TEMPORARY, Reason
from modelcache.report import Reporter
from modelcache.units import format_duration
from modelcache.v1 import cache_pb2

FIRST_PAUSE_SECONDS = 0.1
MOST_PAUSE_SECONDS = 1.0
"""Between two tries to reach the daemon. The channel has a pause of its own; a try within it costs nothing."""

RETRY_PAUSE_SECONDS = 5.0
"""With --retry, where the daemon names no delay."""

_WORTH_RETRYING = frozenset({Reason.OVERLOADED, Reason.RATE_LIMITED, Reason.NO_SPACE_NOW})


class TimedOutError(Exception):
    """The time that the caller gave is over; the message says what for."""

    exit_status = EXIT_TEMPORARY
    label = "TIMEOUT"


class Patience:
    """How long to go on, and what for. ``clock`` is monotonic seconds."""

    def __init__(
        self, timeout_seconds: float | None, *, retry: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._retry = retry
        self._clock = clock
        self._deadline = None if timeout_seconds is None else clock() + timeout_seconds
        self._pause = FIRST_PAUSE_SECONDS

    @property
    def seconds_left(self) -> float | None:
        """None without a limit, else zero or more."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    @property
    def is_over(self) -> bool:
        """The limit is reached."""
        return self.seconds_left == 0.0

    def heard(self) -> None:
        """The daemon answered: the next search for it begins with short pauses again."""
        self._pause = FIRST_PAUSE_SECONDS

    def pause_after(self, error: ModelCacheError) -> float | None:
        """Seconds to wait before asking again; None when the error is final."""
        if error.connection_lost:
            pause, self._pause = self._pause, min(MOST_PAUSE_SECONDS, self._pause * 2)
            return pause
        if self._retry and (error.retry_delay is not None or error.reason in _WORTH_RETRYING):
            delay = error.retry_delay.total_seconds() if error.retry_delay is not None else 0.0
            return max(FIRST_PAUSE_SECONDS, delay) if delay else RETRY_PAUSE_SECONDS
        return None

    def timed_out(self, doing: str) -> TimedOutError:
        """The error that says what was waited for."""
        limit = format_duration(timedelta(seconds=self._timeout_seconds or 0))
        return TimedOutError(f"timed out after {limit}, waiting for: {doing}")


def ensure_ready(
    client: Client,
    request: cache_pb2.EnsureModelRequest,
    patience: Patience,
    reporter: Reporter,
    interruption: Interruption,
) -> cache_pb2.Ready:
    """Asks, shows progress, and asks again after a lost connection. Raises ModelCacheError, TimedOutError, Stopped."""
    while True:
        try:
            return _ask_once(client, request, patience, reporter, interruption)
        except ModelCacheError as error:
            interruption.check()
            doing = reporter.doing
            if patience.is_over or (
                error.code is grpc.StatusCode.DEADLINE_EXCEEDED and patience.seconds_left is not None
            ):
                raise patience.timed_out(doing) from error
            pause = patience.pause_after(error)
            if pause is None:
                raise
            reporter.waiting(_waits_for(client.address, error))
        left = patience.seconds_left
        interruption.sleep(pause if left is None else min(pause, left))
        interruption.check()
        if patience.is_over:
            raise patience.timed_out(reporter.doing)


def _ask_once(
    client: Client,
    request: cache_pb2.EnsureModelRequest,
    patience: Patience,
    reporter: Reporter,
    interruption: Interruption,
) -> cache_pb2.Ready:
    stream = client.ensure_request(request, timeout_seconds=patience.seconds_left)
    with interruption.watching(stream):
        for event in stream:
            patience.heard()
            if isinstance(event, cache_pb2.Ready):
                return event
            reporter.progress(event)
    raise ModelCacheError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "the daemon ended the stream without an answer")


def _waits_for(address: str, error: ModelCacheError) -> str:
    if not error.connection_lost:
        return f"to ask again: {error.text}"
    if error.reason:
        return f"the daemon at {address} to come back ({error.message})"
    return f"the daemon at {address} ({explain_unreachable(address, error.message)})"

"""How a request stands, told to its caller while it is under way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, TypeVar

from modelcached.cache import Watch
from modelcached.cache.requests import Phase, Progress
from modelcached.service import translate

T = TypeVar("T")

_UNCHANGED_SECONDS = 5.0
"""So that a caller can tell a daemon that waits (a silent Hub) from one that hangs."""

PROGRESS_SECONDS = 0.5
"""How often a stream looks at its request; a reader that is slower sees fewer steps."""
FIRST_SECONDS = 0.1
"""When it looks for the first time."""


class Telling:
    """Begins to tell whom a request makes wait. The event loop's alone."""

    def __init__(self) -> None:
        self._young: deque[tuple[float, _Teller]] = deque()
        """Not looked at yet, and when they are to be; oldest first."""

    async def told(
        self, watch: Watch, request_id: str, write: Callable[[Any], Awaitable[None]], request: Awaitable[T]
    ) -> T:
        """The request's answer; meanwhile ``write`` is told how it stands."""
        teller = _Teller(watch, request_id, write)
        self._begin_later(teller)
        try:
            answer = await request
        except BaseException:
            await teller.cancel()
            raise
        await teller.end()
        return answer

    def _begin_later(self, teller: _Teller) -> None:
        # A hit takes milliseconds, many at once some tens: only what takes longer has steps. One timer for all, for
        # each of its own stays among the event loop's until its time, and is compared with others meanwhile.
        loop = asyncio.get_running_loop()
        due = loop.time() + FIRST_SECONDS
        if not self._young:
            self._set_timer(loop, due)
        self._young.append((due, teller))

    def _begin_due(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._young and (self._young[0][1].over or self._young[0][0] <= now):
            self._young.popleft()[1].begin()
        if self._young:
            self._set_timer(loop, self._young[0][0])

    def _set_timer(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        # In no request's context: it is for all of them.
        loop.call_at(due, self._begin_due, context=Context())


class _Teller:
    """Tells a caller how its request stands: now and again, at the least when something changed."""

    def __init__(self, watch: Watch, request_id: str, write: Callable[[Any], Awaitable[None]]) -> None:
        self._watch = watch
        self._request_id = request_id
        self._write = write
        self.over = False
        self._telling: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """From now on, unless its request is over."""
        if self.over:
            return
        self._watch.step_back()
        self._ended = asyncio.Event()
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
        self.over = True
        if self._telling is not None:
            self._ended.set()
            await self._telling
            end = self._watch.progress()
            ready = Progress(Phase.READY, end.bytes_total, end.bytes_total, 0, end.waiters)
            await self._write(translate.progress_message(ready, self._request_id))

    async def cancel(self) -> None:
        """The request has none: it failed, or its caller has gone."""
        self.over = True
        if self._telling is not None:
            self._ended.set()
            await asyncio.gather(self._telling, return_exceptions=True)

"""Several endpoints that have the same: who is asked next, who rests because it failed lately, who wants no request.

An endpoint that fails is not asked first for a while: 5 s, then twice as long whenever it fails its next trial, up
to five minutes. When its rest is over one caller tries it; the others go on elsewhere until it has answered. What an
endpoint asks for with 429 or Retry-After is another matter: nobody asks it before that is over.

Questions and bytes have a health each: the Hub limits its API and its resolvers apart
(https://huggingface.co/docs/hub/rate-limits), and either may fail alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from modelcached.errors import Reason
from modelcached.sources.faults import TransientError

log = structlog.get_logger()

FIRST_REST = timedelta(seconds=5)
MOST_REST = timedelta(minutes=5)
LEAST_PAUSE = timedelta(seconds=1)
"""After a 429 that names no time."""


@dataclass(slots=True)
class _Health:
    trials: int = 0
    """Failed in a row, a rest apart."""
    rests_until: float = 0.0
    closed_until: float = 0.0

    def rest(self, now: float) -> float:
        self.trials += 1
        seconds = min(MOST_REST.total_seconds(), FIRST_REST.total_seconds() * 2.0 ** min(self.trials - 1, 16))
        self.rests_until = now + seconds
        return seconds


class Endpoints:
    """In order of preference, for one kind of request. Thread-safe."""

    def __init__(self, names: Sequence[str], kind: str, now: Callable[[], float] = time.monotonic) -> None:
        """``kind`` is for the log: what is asked of them."""
        self.names = tuple(name.rstrip("/") for name in names)
        self._kind = kind
        self._now = now
        self._health = {name: _Health() for name in self.names}
        self._lock = threading.Lock()

    @property
    def first(self) -> str:
        """The one that the token belongs to, and whose refusal is final."""
        return self.names[0]

    def choose(self, among: Collection[str]) -> str:
        """Who is asked next, of those (at least one): the first that does not rest, else whose rest is over first.

        Choosing one whose rest is over makes the caller the one who tries it.
        """
        with self._lock:
            now = self._now()
            ordered = [name for name in self.names if name in among]
            for name in ordered:
                health = self._health[name]
                if now >= max(health.rests_until, health.closed_until):
                    if health.trials and len(ordered) > 1:
                        health.rest(now)
                    return name
            return min(ordered, key=lambda name: max(self._health[name].rests_until, self._health[name].closed_until))

    def failed(self, name: str, error: TransientError) -> None:
        """It gave no answer, or wants to be left alone."""
        with self._lock:
            now, health = self._now(), self._health[name]
            pause = error.retry_after or (LEAST_PAUSE if error.reason is Reason.RATE_LIMITED else timedelta(0))
            pause = min(pause, MOST_REST)
            closed = now < health.closed_until
            health.closed_until = max(health.closed_until, now + pause.total_seconds())
            # One of many that were under way, or its trial, makes it no worse.
            rests = 0.0 if now < health.rests_until else health.rest(now)
        if pause and not closed:
            log.warning("endpoint wants no request", endpoint=name, kind=self._kind, seconds=pause.total_seconds())
        if rests and len(self.names) > 1:
            log.warning("endpoint rests", endpoint=name, kind=self._kind, seconds=rests, why=error.message)

    def answered(self, name: str) -> None:
        """It works, whatever it said."""
        with self._lock:
            health = self._health[name]
            recovered, health.trials, health.rests_until = health.trials > 0, 0, 0.0
        if recovered and len(self.names) > 1:
            log.info("endpoint answers again", endpoint=name, kind=self._kind)

    def rested(self, among: Collection[str]) -> bool:
        """Whether one of those can be asked at once."""
        with self._lock:
            now = self._now()
            return any(now >= max(self._health[n].rests_until, self._health[n].closed_until) for n in among)

    def seconds_closed(self, among: Collection[str]) -> float:
        """How long none of those (at least one) wants a request; 0 when one may be asked."""
        with self._lock:
            now = self._now()
            return max(0.0, min(self._health[name].closed_until for name in among) - now)

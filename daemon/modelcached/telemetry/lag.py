"""How late the event loop is: all decisions are made on it, so whoever waits for one waits at least so long."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Gauge, Histogram

PERIOD_SECONDS = 0.05
WINDOW_SECONDS = 60.0
# Fine where our promise lies: 99.9 % under 50 ms while a transfer runs.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


class LoopLag:
    """A timer on a fixed schedule, and how late it fired each time. The event loop's alone.

    A loop that was busy for a second has missed twenty turns, and each counts with its own
    lateness: counted as one, the worst second of an hour would vanish from every percentile.
    """

    def __init__(self, registry: CollectorRegistry, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._window_began = loop.time()
        self._most = self._most_before = 0.0
        self._seconds = Histogram(
            "modelcached_event_loop_lag_seconds",
            f"How late a timer of the event loop fired that is due every {PERIOD_SECONDS * 1e3:.0f} ms",
            buckets=_SECONDS,
            registry=registry,
        )
        maximum = Gauge(
            "modelcached_event_loop_lag_max_seconds",
            f"The longest event loop lag of the last {WINDOW_SECONDS:.0f} to {2 * WINDOW_SECONDS:.0f} seconds; "
            "nobody's scrape resets it",
            registry=registry,
        )
        maximum.set_function(self._maximum)

    def start(self) -> None:
        """From now on, until ``stop``."""
        self._due = self._window_began = self._loop.time()
        self._next()

    def stop(self) -> None:
        """Leaves no timer behind."""
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        self._due += PERIOD_SECONDS
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._turn_window(now)
        self._most = max(self._most, now - self._due)
        while self._due + PERIOD_SECONDS <= now:
            self._seconds.observe(now - self._due)
            self._due += PERIOD_SECONDS
        self._seconds.observe(max(0.0, now - self._due))  # the clock's resolution lets it fire a little early
        self._next()

    def _turn_window(self, now: float) -> None:
        if now - self._window_began >= WINDOW_SECONDS:
            self._most_before, self._most, self._window_began = self._most, 0.0, now

    def _maximum(self) -> float:
        """From the scrape's thread: two plain loads."""
        return max(self._most, self._most_before)

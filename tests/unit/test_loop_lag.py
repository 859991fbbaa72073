"""The event loop's lag is measured as those who wait for it feel it, and its maximum outlives a scrape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from modelcached.telemetry import lag as module
from modelcached.telemetry.lag import PERIOD_SECONDS, WINDOW_SECONDS, LoopLag
from prometheus_client import CollectorRegistry

LAG = "modelcached_event_loop_lag_seconds"
BLOCKED_SECONDS = 0.4


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    value = registry.get_sample_value(name, labels)
    assert value is not None
    return value


def later_than(registry: CollectorRegistry, seconds: str) -> float:
    """Turns that came later than a bucket's upper end."""
    return sample(registry, f"{LAG}_count") - sample(registry, f"{LAG}_bucket", le=seconds)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a counter has no event of its own
            await asyncio.sleep(PERIOD_SECONDS / 5)


async def test_a_blocked_loop_is_seen_in_the_histogram_and_in_the_maximum() -> None:
    registry = CollectorRegistry()
    lag = LoopLag(registry, asyncio.get_running_loop())
    lag.start()
    await until(lambda: sample(registry, f"{LAG}_count") >= 2)
    before = later_than(registry, "0.3")
    time.sleep(BLOCKED_SECONDS)  # noqa: ASYNC251 - this is what is measured
    await until(lambda: later_than(registry, "0.3") > before)
    assert later_than(registry, "0.05") >= 5, "every turn that was missed counts with its own lateness"
    assert sample(registry, f"{LAG}_sum") > BLOCKED_SECONDS
    most = sample(registry, "modelcached_event_loop_lag_max_seconds")
    assert BLOCKED_SECONDS - PERIOD_SECONDS <= most < 10
    assert sample(registry, "modelcached_event_loop_lag_max_seconds") == most, "a look does not take it away"
    lag.stop()
    count = sample(registry, f"{LAG}_count")
    await asyncio.sleep(2 * PERIOD_SECONDS)
    assert sample(registry, f"{LAG}_count") == count


class TimedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock the test moves; its timers are fired by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_a_maximum_stands_for_one_window_and_the_next(windows: int) -> None:
    loop = TimedLoop()
    registry = CollectorRegistry()
    lag = LoopLag(registry, loop)
    try:
        lag.start()
        loop.now = 0.85  # due at 0.05
        lag._look()
        for window in range(1, windows + 1):
            loop.now = 1 + window * module.WINDOW_SECONDS
            lag._due = loop.now
            lag._look()
        most = sample(registry, "modelcached_event_loop_lag_max_seconds")
        assert most == pytest.approx(0.8 if windows == 1 else 0.0)
        assert WINDOW_SECONDS >= 60, "a scrape a minute sees every maximum"
    finally:
        lag.stop()
        loop.close()

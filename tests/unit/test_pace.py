"""The node's rate holds over all threads, follows what it is set to at once, and keeps nobody who is to end."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from modelcached.transfer import pace as module
from modelcached.transfer.pace import RateLimiter

from tests.node.daemon import in_threads

KIB, MIB = 1 << 10, 1 << 20
SECONDS = 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that only sleeping moves."""
    made = SimpleNamespace(now=1000.0)

    def sleep(seconds: float) -> None:
        assert seconds > 0
        made.now += seconds

    made.sleep = sleep
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_one_piece_is_the_most_that_goes_beyond_the_rate(clock: SimpleNamespace) -> None:
    limiter = RateLimiter(MIB)
    for _ in range(64):
        limiter.take(256 * KIB, clock.sleep)
    assert clock.now == pytest.approx(1000 + (16 * MIB - 256 * KIB) / MIB)


def test_what_was_not_used_is_not_saved_up(clock: SimpleNamespace) -> None:
    limiter = RateLimiter(MIB)
    limiter.take(KIB, clock.sleep)
    clock.now += 3600
    began = clock.now
    for _ in range(8):
        limiter.take(MIB, clock.sleep)
    assert clock.now - began == pytest.approx(7)


def test_what_is_owed_is_paid_at_the_rate_in_force(clock: SimpleNamespace) -> None:
    limiter = RateLimiter(KIB)
    limiter.take(MIB, clock.sleep)
    limiter.bytes_per_second = MIB
    began = clock.now
    limiter.take(1, clock.sleep)
    assert clock.now - began == pytest.approx(1)
    limiter.take(MIB, clock.sleep)
    limiter.bytes_per_second = MIB // 4
    began = clock.now
    limiter.take(1, clock.sleep)
    assert clock.now - began == pytest.approx(4)


def test_without_a_limit_nobody_waits(clock: SimpleNamespace) -> None:
    limiter = RateLimiter(0)
    for _ in range(8):
        limiter.take(MIB, clock.sleep)
    limiter.bytes_per_second = 1
    limiter.take(MIB, clock.sleep)
    assert clock.now == 1000, "what came without a limit need not be paid for under the next"


def test_the_rate_is_that_of_all_threads_together() -> None:
    limiter, pieces, rate = RateLimiter(8 * MIB), 8, 8 * MIB
    began = time.monotonic()

    def take(_number: int) -> None:
        for _ in range(pieces):
            limiter.take(128 * KIB)

    in_threads(8, take)
    seconds = time.monotonic() - began
    assert seconds >= (8 * pieces - 1) * 128 * KIB / rate
    assert seconds < SECONDS


def test_a_thread_that_waits_sees_another_rate() -> None:
    limiter = RateLimiter(1)
    limiter.take(MIB)  # two weeks
    waiting = threading.Thread(target=limiter.take, args=(1,), daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    limiter.bytes_per_second = 0
    waiting.join(SECONDS)
    assert not waiting.is_alive()


def test_a_wait_that_is_ended_is_over_at_once() -> None:
    limiter, ended = RateLimiter(1), threading.Event()
    limiter.take(MIB)
    waiting = threading.Thread(target=limiter.take, args=(1, ended.wait), daemon=True)
    waiting.start()
    ended.set()
    waiting.join(SECONDS)
    assert not waiting.is_alive()

"""When upstream wants to be asked again, in all the ways in which it says so."""

from __future__ import annotations

import email.utils
import time
from datetime import timedelta

import pytest
from modelcached.errors import Reason
from modelcached.sources.faults import TransientError, retry_after


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 0 "}, 0),
        ({"RETRY-AFTER": "1.5"}, 1.5),
        ({"RateLimit": '"api";r=0;t=42'}, 42),
        ({"ratelimit": '"resolvers";r=0;t=3'}, 3),
        ({"Retry-After": "7", "RateLimit": '"api";r=0;t=42'}, 7),
        ({"Retry-After": "soon", "RateLimit": '"api";r=0;t=42'}, 42),
        ({"Retry-After": email.utils.formatdate(0, usegmt=True)}, 0),
    ],
)
def test_a_wish_is_read(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == timedelta(seconds=seconds)


@pytest.mark.parametrize("headers", [{}, {"Retry-After": ""}, {"Retry-After": "-5"}, {"RateLimit": '"api";r=3'}])
def test_no_wish_is_none(headers: dict[str, str]) -> None:
    assert retry_after(headers) is None


def test_a_date_is_counted_from_now() -> None:
    wish = retry_after({"Retry-After": email.utils.formatdate(time.time() + 100, usegmt=True)})
    assert wish is not None
    assert 97 <= wish.total_seconds() <= 100


@pytest.mark.parametrize("reason", [Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_STALLED, Reason.RATE_LIMITED], ids=str)
def test_a_caller_is_always_told_when_to_come_again(reason: Reason) -> None:
    told = TransientError(reason, "why").final()
    assert told.retry_delay is not None
    assert told.retry_delay > timedelta(0)
    asked = TransientError(reason, "why", retry_after=timedelta(seconds=77)).final()
    assert asked.retry_delay == timedelta(seconds=77)

"""Times as the contract says them."""

from __future__ import annotations

import pytest
from modelcached.service.translate import timestamp


@pytest.mark.parametrize("seconds", [0.0, 1.75, 1_790_000_000.25, -1.5])
def test_a_time_keeps_its_parts_of_a_second(seconds: float) -> None:
    stamp = timestamp(seconds)
    assert stamp is not None
    assert stamp.ToNanoseconds() / 1e9 == pytest.approx(seconds, abs=1e-6)


def test_no_time_is_none() -> None:
    assert timestamp(None) is None

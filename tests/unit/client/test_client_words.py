"""Sizes, durations and progress, as people read them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from modelcache.progress import bar, describe, percent
from modelcache.units import format_duration, format_size, parse_duration, printable
from modelcache.v1 import cache_pb2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h 30m", 5400), ("250ms", 0.25), ("0.5s", 0.5), (" 1d ", 86400)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", " ", "10", "s", "-5s", "5 parsecs", "1h30", "0s", "9" * 40 + "w", "1e5s"])
def test_other_durations_are_errors_that_name_them(text):
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize("seconds", [1, 59, 60, 61, 3599, 3600, 86399, 86400, 10**6, 10**9])
def test_a_duration_that_was_written_can_be_read(seconds):
    read = parse_duration(format_duration(timedelta(seconds=seconds)))
    assert timedelta(seconds=seconds) * 0.9 <= read <= timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (15_200_000_000, "15.2 GB"),
        (10**12, "1.00 TB"),
    ],
)
def test_sizes_are_in_powers_of_1000(size, text):
    assert format_size(size) == text


def test_percent_is_100_only_when_all_is_there():
    assert (percent(999, 1000), percent(1000, 1000), percent(0, 0)) == (99, 100, 0)


@pytest.mark.parametrize("columns", [20, 40, 80, 300])
@pytest.mark.parametrize("total", [0, 1, 15_200_000_000, 2**63])
@pytest.mark.parametrize("phase", [0, cache_pb2.PHASE_DOWNLOADING, 99])
@pytest.mark.parametrize("eta", [None, Duration(seconds=10**9)])
def test_a_bar_never_leaves_its_line(columns, total, phase, eta):
    for done in (0, total // 3, total, total * 2 % 2**63):
        progress = cache_pb2.Progress(
            phase=phase,
            bytes_total=total,
            bytes_done=done,
            bytes_per_second=2**40,
            eta=eta,
            waiters=5000,
            detail="waits\nfor " + "x" * 300,
        )
        line = bar(progress, columns)
        assert len(line) < columns
        assert "\n" not in line + describe(progress)


def test_a_description_leaves_out_what_is_not_known():
    assert describe(cache_pb2.Progress(phase=cache_pb2.PHASE_RESOLVING)) == "resolving"
    full = cache_pb2.Progress(
        phase=cache_pb2.PHASE_DOWNLOADING,
        bytes_done=3_200_000_000,
        bytes_total=15_200_000_000,
        bytes_per_second=412_000_000,
        eta=Duration(seconds=29),
        waiters=8,
    )
    assert describe(full) == "downloading 3.2 GB of 15.2 GB (21 %), 412.0 MB/s, 29s left, 8 waiting"


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\rb", "a\x9bb", "a\u202eb", "a\u2028b"])
def test_nothing_that_a_terminal_obeys_is_printable(text):
    assert printable(text) in {"a b", "a [2Jb"}

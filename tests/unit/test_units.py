"""Sizes and durations as people write and read them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from modelcached.units import MAX_SIZE, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500GB", 500 * 1000**3),
        ("465GiB", 465 * 1024**3),
        ("1.5 TB", 1_500_000_000_000),
        (" 64mib ", 64 * 1024**2),
        ("4096B", 4096),
        ("0", 0),
        ("0B", 0),
        ("9007199254740993B", 2**53 + 1),  # exact where a float is not
        (f"{MAX_SIZE}B", MAX_SIZE),
    ],
)
def test_a_size_is_a_number_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "500", "5 0GB", "-1GB", "1e3GB", "500GBs", "50%", "1,5GB", "0x10B", "1 GB 2 MB", ".5GB", "nanGB"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write a number with a unit") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [f"{MAX_SIZE + 1}B", "9" * 400 + ".0GB", "99999999PB"])
def test_a_size_beyond_any_disk_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="larger than any disk"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90s", timedelta(seconds=90)),
        ("10m", timedelta(minutes=10)),
        ("1h30m", timedelta(hours=1, minutes=30)),
        (" 1h 30m ", timedelta(hours=1, minutes=30)),
        ("250ms", timedelta(milliseconds=250)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(days=14)),
        ("1.5s", timedelta(seconds=1.5)),
        ("0s", timedelta(0)),
    ],
)
def test_a_duration_is_numbers_with_units(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize("text", ["", " ", "10", "m", "-1s", "1h30", "10 minutes", "1y", "10m foo", "1S"])
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: write a number with a unit") as caught:
        parse_duration(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["999999999999d", "9" * 400 + "s"])
def test_a_duration_beyond_the_calendar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="too long for a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (15_234_000_000, "15.2 GB"),
        (1_234_000_000_000, "1.23 TB"),
        (5_000_000_000_000_000, "5000.00 TB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_a_size_is_shown_in_powers_of_1000(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.4, "0s"), (42, "42s"), (60, "1m"), (3900, "1h 5m"), (90_061, "1d 1h"), (3601, "1h 1s")],
)
def test_a_duration_is_shown_in_two_units_at_the_most(seconds: float, text: str) -> None:
    assert format_duration(timedelta(seconds=seconds)) == text

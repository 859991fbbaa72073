"""Sizes and durations as people write them."""

from __future__ import annotations

import re
from datetime import timedelta

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MAX_SIZE = 2**63 - 1
"""What a file's size can be at the most."""

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_DURATION_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])\s*")


def parse_size(text: str) -> int:
    """Bytes in ``"500GB"`` (powers of 1000), ``"465GiB"`` (powers of 1024), ``"4096B"`` or ``"0"``.

    Raises ValueError that names the text.
    """
    match = _SIZE.fullmatch(text)
    unitless = match is not None and not match[2] and float(match[1]) != 0  # "5" is more likely a slip than five bytes
    if match is None or unitless or match[2].lower() not in _SIZE_UNITS:
        msg = f"{text!r} is not a size: write a number with a unit, such as 500GB or 465GiB"
        raise ValueError(msg)
    unit = _SIZE_UNITS[match[2].lower()]
    size = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit  # exact above 2**53
    if size > MAX_SIZE:
        msg = f"{text!r} is larger than any disk"
        raise ValueError(msg)
    return int(size)


def parse_duration(text: str) -> timedelta:
    """The time in ``"10m"``, ``"90s"``, ``"1h30m"``, ``"250ms"`` or ``"7d"``.

    Raises ValueError that names the text.
    """
    stripped = text.strip()
    seconds, position = 0.0, 0
    while match := _DURATION_PART.match(stripped, position):
        seconds += float(match[1]) * _DURATION_UNITS[match[2]]
        position = match.end()
    if not stripped or position != len(stripped):
        msg = f"{text!r} is not a duration: write a number with a unit, such as 90s, 10m or 1h30m"
        raise ValueError(msg)
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        msg = f"{text!r} is too long for a duration"
        raise ValueError(msg) from None


def format_size(size_bytes: int) -> str:
    """``"15.2 GB"``: powers of 1000, as disks and the Hub count."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if round(abs(value), 1) < 1000:  # 999,960 bytes are 1.0 MB, not 1000.0 kB
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def format_duration(duration: timedelta) -> str:
    """``"1h 5m"``, ``"42s"``: two units at the most."""
    seconds = round(duration.total_seconds())
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"

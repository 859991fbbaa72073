"""Sizes, rates and durations as people read and write them.

The daemon has its own (modelcached.units): the client imports nothing of it.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])\s*")
_UNIT_BYTES = {"B": 1} | {
    f"{prefix}{suffix}B": base**power
    for power, prefix in enumerate("kMGT", 1)
    for base, suffix in ((1000, ""), (1024, "i"))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def parse_duration(text: str) -> timedelta:
    """The time in ``"90s"``, ``"10m"``, ``"1h30m"``, ``"250ms"`` or ``"7d"``; always more than zero.

    Raises ValueError that names the text.
    """
    stripped, position, seconds = text.strip(), 0, 0.0
    while match := _DURATION_PART.match(stripped, position):
        seconds += float(match[1]) * _UNIT_SECONDS[match[2]]
        position = match.end()
    if position != len(stripped) or seconds <= 0:
        raise ValueError(f"{text!r} is not a duration: write a number with a unit, such as 90s, 10m or 1h30m")
    try:
        return timedelta(seconds=seconds)
    except OverflowError:
        raise ValueError(f"{text!r} is too long for a duration") from None


def parse_size(text: str) -> int:
    """The bytes in ``"200GB"``, ``"1.5TB"`` or ``"64MiB"``. Raises ValueError that names the text."""
    units = {unit.lower(): size for unit, size in _UNIT_BYTES.items()}
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not a size: write a number with a unit, such as 200GB or 64MiB")
    return int(float(match[1]) * units[match[2].lower()])


def format_duration(duration: timedelta) -> str:
    """``"1h 5m"``, ``"42s"``: two units at the most; below a second ``"0s"``."""
    seconds, parts = max(0, round(duration.total_seconds())), []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def format_size(size_bytes: float) -> str:
    """``"15.2 GB"``: powers of 1000, as disks and the Hub count."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        # Rounding comes first: 999,960 bytes is 1.0 MB, not 1000.0 kB.
        if round(abs(value), 1) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def format_rate(bytes_per_second: float) -> str:
    """``"412.0 MB/s"``."""
    return f"{format_size(bytes_per_second)}/s"


def format_age(moment: datetime | None, now: datetime | None = None) -> str:
    """``"3h 5m"`` since an aware moment; ``"never"`` for none."""
    if moment is None:
        return "never"
    return format_duration((now or datetime.now(UTC)) - moment)


def printable(text: str) -> str:
    """The text on one line, with nothing in it that a terminal would obey.

    Messages carry names and words from upstream; none of them may move a cursor or forge a log line.
    """
    return (text if text.isprintable() else _CONTROL.sub(" ", text)).strip()

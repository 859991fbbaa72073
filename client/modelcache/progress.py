"""Progress in words and as a bar: pure text from a Progress message."""

from __future__ import annotations

from modelcache.units import format_duration, format_rate, format_size, printable
from modelcache.v1 import cache_pb2

_PHASES = {
    cache_pb2.PHASE_QUEUED: "queued",
    cache_pb2.PHASE_RESOLVING: "resolving",
    cache_pb2.PHASE_RESERVING: "reserving space",
    cache_pb2.PHASE_DOWNLOADING: "downloading",
    cache_pb2.PHASE_VERIFYING: "verifying",
    cache_pb2.PHASE_PUBLISHING: "publishing",
    cache_pb2.PHASE_READY: "ready",
}
_LEAST_BAR = 10


def phase_name(progress: cache_pb2.Progress) -> str:
    """The phase in a word or two; a phase of a newer daemon is "working"."""
    return _PHASES.get(progress.phase, "working")


def percent(done: int, total: int) -> int:
    """0 to 100, and 100 only when all is there."""
    return min(100, done * 100 // total) if total else 0


def describe(progress: cache_pb2.Progress) -> str:
    """``"downloading 3.2 GB of 15.2 GB (21 %), 412.0 MB/s, 29s left, 8 waiting"``, leaving out what is not known."""
    parts = [phase_name(progress)]
    if progress.bytes_total:
        done, total = progress.bytes_done, progress.bytes_total
        parts[0] += f" {format_size(done)} of {format_size(total)} ({percent(done, total)} %)"
    parts += _pace(progress)
    if progress.detail:
        parts.append(printable(progress.detail))
    return ", ".join(parts)


def bar(progress: cache_pb2.Progress, columns: int) -> str:
    """One line of a terminal, never wider than its columns."""
    if not progress.bytes_total:
        return describe(progress)[: columns - 1]
    done, total = progress.bytes_done, progress.bytes_total
    before = f"{phase_name(progress)} "
    after = ", ".join([f" {percent(done, total):3d} %  {format_size(done)} of {format_size(total)}", *_pace(progress)])
    width = columns - 1 - len(before) - len(after) - 2
    if width < _LEAST_BAR:
        return (before + after.strip())[: columns - 1]
    filled = min(width, width * done // total)
    return f"{before}[{'#' * filled}{'-' * (width - filled)}]{after}"


def _pace(progress: cache_pb2.Progress) -> list[str]:
    parts = []
    if progress.bytes_per_second:
        parts.append(format_rate(progress.bytes_per_second))
    if progress.HasField("eta"):
        parts.append(f"{format_duration(progress.eta.ToTimedelta())} left")
    if progress.waiters > 1:
        parts.append(f"{progress.waiters} waiting")
    return parts

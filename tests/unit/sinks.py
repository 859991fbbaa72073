"""Sinks that collect, for both ways in which a source hands bytes on."""

from __future__ import annotations

import os
from collections.abc import Callable

from modelcached.sources.sink import FileSink, Sink

WAYS = ("through memory", "through a pipe")


def sink_over(way: str, take: Callable[[memoryview, int], None]) -> Sink:
    """One that takes what comes, and makes the source go that way where it can."""
    if way == WAYS[0]:
        return take

    def splice(pipe: int, size_bytes: int, offset: int) -> None:
        while size_bytes:
            got = os.read(pipe, size_bytes)
            take(memoryview(got), offset)
            size_bytes, offset = size_bytes - len(got), offset + len(got)

    return FileSink(take, splice)

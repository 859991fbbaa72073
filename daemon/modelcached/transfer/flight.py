"""One running transfer of one blob, however many requests wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from modelcached.errors import CacheError
from modelcached.ledger.space import Reservation
from modelcached.model import Digest, RepoId
from modelcached.sources.abort import Abort
from modelcached.sources.origin import Origin
from modelcached.store.journal import Ranges
from modelcached.store.partials import Partial
from modelcached.store.taking import Taken

STEP_BYTES = 2 << 20
"""A range counts as done in steps of this: at most that is lost a connection when the daemon is killed."""

SMALL_BYTES = 1 << 20
"""Up to this a file is fetched into memory: a journal would cost more than fetching it again."""


LEAD_BYTES = 192 << 20
"""How far fetching may be ahead of hashing. Beyond that movers take turns from the hash threads, and at the end one
core hashes what both could have: 1 s of 3 on 2 GiB from loopback. A part for each connection fits in."""


class Stage(enum.IntEnum):
    """Where a flight is."""

    QUEUED = 0
    DOWNLOADING = 1
    VERIFYING = 2
    PUBLISHING = 3
    DONE = 4


@dataclass(slots=True)
class Part:
    """A range of a flight, on its way to or in a mover."""

    start: int
    end: int
    written: int
    """How far the mover has come; a plain store from its thread, only ever shown."""

    @classmethod
    def of(cls, start: int, end: int) -> Part:
        """A part of which nothing is there."""
        return cls(start, end, start)


@dataclass(slots=True, eq=False)
class Flight:
    """State on the event loop; movers report to it."""

    digest: Digest
    size_bytes: int
    repo_id: RepoId
    """Whose blobs/ it is published into; others link from there."""
    origins: Sequence[Origin]
    """In order of preference."""
    number: int
    done: asyncio.Future[os.stat_result]
    batch: int = 0
    """Flights that were started together share it: their files are fetched side by side."""
    urgent: int = 0
    """Requests that somebody waits for; 0 is background."""
    interest: int = 0
    """Requests that want it, waited for or not; at 0 it is ended, its progress kept."""
    parked: int = 0
    """Of the requests that want it, those whose turn it is not."""
    stage: Stage = Stage.QUEUED
    fetched: Counter[str] = field(default_factory=Counter)
    """Bytes taken by this flight, repeats included, by the origin's label."""
    ranges: Ranges = field(default_factory=Ranges)
    pending: deque[Part] = field(default_factory=deque)
    active: dict[int, Part] = field(default_factory=dict)
    aborts: set[Abort] = field(default_factory=set)
    hashed: int = 0
    """Up to here it is hashed."""
    partial: Partial | None = None
    taken: Taken | None = None
    """Instead of a partial: it lay on this machine already."""
    small_sink: Callable[[memoryview, int], None] | None = None
    """Where a file that fits in memory goes; it has no partial."""
    task: asyncio.Task[None] | None = None
    level: bool = True
    """Hashing has been level with fetching. While it makes up for what an earlier try left, it holds nothing up."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever ranges grew, or a part ended."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when running fetches are to end: wakes those that wait before a retry."""
    failure: Exception | None = None
    began_at: float = field(default_factory=time.monotonic)
    first_byte_at: float | None = None
    """Monotonic; a plain store from a mover's thread."""
    reservation: Reservation | None = None
    """Its own bytes, promised and not yet on the disk; given back when it has ended."""
    log_context: Mapping[str, Any] = field(default_factory=structlog.contextvars.get_contextvars)
    """The request that started it, for the log lines of whoever works on it."""

    @property
    def origin(self) -> Origin:
        """The one in use."""
        return self.origins[0]

    def also_from(self, origins: Sequence[Origin]) -> None:
        """Who joins it knows other places too; they matter where it would fail with the folder that it came from."""
        if all(origin.label == "local" for origin in self.origins):
            self.origins = [*self.origins, *(origin for origin in origins if origin.label != "local")]

    @property
    def is_parked(self) -> bool:
        """Nobody who wants it has a turn: no part of it is begun."""
        return 0 < self.interest <= self.parked

    @property
    def has_work(self) -> bool:
        """A part that a mover should take now."""
        ahead = self.level and self.ranges.prefix - self.hashed > LEAD_BYTES
        return bool(self.pending) and not ahead and not self.is_parked

    @property
    def done_bytes(self) -> int:
        """On disk so far, not necessarily verified."""
        if self.stage >= Stage.PUBLISHING:
            return self.size_bytes
        under_way = sum(part.written - part.start for part in self.active.values())
        return min(self.size_bytes, self.ranges.total + under_way)

    def plan(self) -> None:
        """Cuts what is missing into parts that suit the origin; hashing begins at the beginning."""
        self.pending.clear()
        self.hashed, self.level = 0, self.ranges.prefix == 0
        size = self.origin.part_bytes
        for start, end in self.ranges.missing(self.size_bytes):
            self.pending.extend(Part.of(position, min(position + size, end)) for position in range(start, end, size))

    def advance(self, part: Part, start: int, end: int) -> None:
        """A step of a part is written and journalled."""
        self.ranges.add(start, end)
        self.fetched[self.origin.label] += end - start
        part.start = end
        self.moved.set()

    def hash_reached(self, end: int) -> None:
        """The digest covers [0, end)."""
        self.hashed = end
        self.level = self.level or self.ranges.prefix - end < LEAD_BYTES // 2

    def abort(self) -> None:
        """Ends all running fetches; what is on disk stays."""
        self.pending.clear()
        self.ended.set()
        for abort in list(self.aborts):
            abort.set()
        self.moved.set()

    @property
    def ending(self) -> bool:
        """It was cancelled or has failed for good, and only winds down: nobody should join it."""
        return isinstance(self.failure, CacheError)

    def next_origin(self) -> None:
        """The one in use will not do; what it has brought stays."""
        self.origin.forget()
        self.origins = self.origins[1:]
        self.clear_failure()

    def clear_failure(self) -> None:
        """Another try begins, unless the flight was ended for good while the last one wound down."""
        if self.ending:
            assert self.failure is not None
            raise self.failure
        self.failure = None
        self.ended.clear()

    async def nap(self, seconds: float) -> None:
        """Waits, but not beyond the flight's end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)

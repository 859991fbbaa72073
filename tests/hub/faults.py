"""Faults a test can switch on: what goes wrong, where, how often; and how often it did.

Two moments exist. Before the answer: STATUS, SILENT, and RESET/CLOSE without a position. In the body: all
others. A body fault is only used up by an answer that has a body it can act on: the 302 of an LFS file
never consumes one, nor does a HEAD, nor a full GET one that needs a Range.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Literal

RequestKind = Literal["api", "resolve", "cdn", "token", "reconstruction", "xorb"]
Where = Literal["api", "resolve", "cdn", "token", "reconstruction", "xorb", "any"]


class FaultKind(Enum):
    """What goes wrong."""

    STATUS = "status"
    """Answer with `status` (and Retry-After, RateLimit, X-Error-Code, headers, body) instead of the truth."""
    RESET = "reset"
    """RST (SO_LINGER 0): before the headers, or at the position given in the body."""
    CLOSE = "close"
    """Clean FIN too early: before the headers, or at the position given in the body."""
    SILENT = "silent"
    """Accept the request and send nothing until the client goes or the Hub stops."""
    STALL = "stall"
    """Send the body up to the position (default: half), then nothing, with the connection open."""
    TRICKLE = "trickle"
    """From the position on (default: the first byte) one byte every `seconds_per_byte`."""
    WRONG_BYTES = "wrong_bytes"
    """Right size, every byte from the position on (default: the first) inverted."""
    FLIPPED_BYTE = "flipped_byte"
    """Right size, the one byte at the position (default: the middle) inverted."""
    SHORT_BODY = "short_body"
    """A complete answer that is too short: Content-Length says so too (default: one byte less)."""
    LONG_BODY = "long_body"
    """`extra_bytes` zero bytes more than the entry's size, and Content-Length says so too."""
    FULL_FOR_RANGE = "full_for_range"
    """200 with the whole body where 206 was asked for."""
    WRONG_CONTENT_RANGE = "wrong_content_range"
    """206 for a range one byte beside the one asked for; Content-Range says so honestly."""
    ETAG_CHANGE = "etag_change"
    """Another ETag than before, from file offset `at_byte` on if given, else for the whole file."""
    EXPIRE_URL = "expire_url"
    """This signed URL is dead from now on (403); fresh ones work. With a position the body ends there first."""
    SHORT_PLAN = "short_plan"
    """A reconstruction that names only the first half of its terms: the stream ends early and clean."""


class Moment(Enum):
    """When in an answer's life a fault acts; at most one fault acts per moment."""

    BEFORE = "before the headers, instead of the answer"
    ETAG = "while the headers are made"
    PLAN = "while a reconstruction is made"
    BODY = "in the body"


_BEFORE_UNLESS_POSITIONED = frozenset({FaultKind.RESET, FaultKind.CLOSE, FaultKind.EXPIRE_URL})
_WHILE_MADE = {FaultKind.ETAG_CHANGE: Moment.ETAG, FaultKind.SHORT_PLAN: Moment.PLAN}
_RANGED_ONLY = frozenset({FaultKind.FULL_FOR_RANGE, FaultKind.WRONG_CONTENT_RANGE})


@dataclass
class Fault:
    """One thing that goes wrong for the requests it matches.

    `path` and `repo` are globs; for the API the path is the route's name (info, tree, refs, auth-check,
    paths-info, commits, whoami-v2; xet-read-token is a "token"). Positions (`at_byte`, or `at_fraction` in
    0..1) count within the response's body, not within the file, save for ETAG_CHANGE; `at_file_byte` is a
    position within the file, and concerns only answers that hold that byte (TRICKLE: or later ones). Of a
    file's xorbs those before `from_xorb` pass. The first `after_requests` matching requests pass, and all until
    the fault `after` has fired; then it fires `times` times (None: for ever), each with `probability` (seeded).
    """

    kind: FaultKind
    where: Where = "any"
    path: str = "*"
    repo: str = "*"
    method: str | None = None
    times: int | None = None
    after_requests: int = 0
    after: Fault | None = None
    probability: float = 1.0
    seed: int = 0
    at_byte: int | None = None
    at_fraction: float | None = None
    at_file_byte: int | None = None
    from_xorb: int = 0
    status: int = 503
    retry_after: float | None = None
    rate_limit_reset: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    extra_bytes: int = 1024
    seconds_per_byte: float = 1.0
    fired: int = field(default=0, init=False)
    seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    @property
    def has_position(self) -> bool:
        return any(at is not None for at in (self.at_byte, self.at_fraction, self.at_file_byte))

    def position(self, length: int, default: int, start: int = 0) -> int:
        """The byte of a body of `length` bytes, the file's from `start` on, at which it acts, clipped to the body."""
        if self.at_file_byte is not None:
            return min(max(self.at_file_byte - start, 0), length)
        if self.at_byte is not None:
            return min(self.at_byte, length)
        return int(length * self.at_fraction) if self.at_fraction is not None else min(default, length)

    @property
    def moment(self) -> Moment:
        if self.kind in (FaultKind.STATUS, FaultKind.SILENT):
            return Moment.BEFORE
        if self.kind in _WHILE_MADE:
            return _WHILE_MADE[self.kind]
        return Moment.BEFORE if self.kind in _BEFORE_UNLESS_POSITIONED and not self.has_position else Moment.BODY

    def matches(self, request: FaultTarget) -> bool:
        if self.where not in ("any", request.kind) or self.method not in (None, request.method):
            return False
        named = fnmatchcase(request.path, self.path) and fnmatchcase(request.repo, self.repo)
        if not named or (request.xorb is not None and request.xorb < self.from_xorb):
            return False
        if self.at_file_byte is not None and not request.holds(self.at_file_byte):
            return self.kind is FaultKind.TRICKLE and request.range_start > self.at_file_byte
        if self.kind is FaultKind.ETAG_CHANGE and self.at_byte is not None:
            return request.range_start >= self.at_byte
        if self.kind is FaultKind.EXPIRE_URL:
            return request.kind in ("cdn", "xorb")
        return request.ranged or self.kind not in _RANGED_ONLY


@dataclass(frozen=True)
class FaultTarget:
    """What a fault can see of a request; `path` is a file's path, or the name of an API route."""

    kind: RequestKind
    method: str
    repo: str
    path: str
    ranged: bool = False
    range_start: int = 0
    range_end: int | None = None
    """The first byte that is not asked for; None: the file's end."""
    xorb: int | None = None
    """Which of the file's xorbs it is, from 0; None: it is none."""

    def holds(self, file_byte: int) -> bool:
        """Whether the answer is to hold that byte of the file."""
        return self.range_start <= file_byte and (self.range_end is None or file_byte < self.range_end)


class FaultBoard:
    """The faults switched on, asked in the order they were added. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        with self._lock:
            self._faults = [other for other in self._faults if other is not fault]

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def remaining(self) -> list[Fault]:
        """The faults that can still fire."""
        with self._lock:
            return [fault for fault in self._faults if fault.times is None or fault.fired < fault.times]

    def take(self, target: FaultTarget, moment: Moment) -> Fault | None:
        """The first fault of this moment that fires for this request. Each one asked has then seen it."""
        with self._lock:
            for fault in self._faults:
                if fault.moment is not moment or not fault.matches(target):
                    continue
                if fault.after is not None and fault.after.fired == 0:
                    continue
                fault.seen += 1
                if fault.seen <= fault.after_requests or (fault.times is not None and fault.fired >= fault.times):
                    continue
                if fault._random.random() >= fault.probability:
                    continue
                fault.fired += 1
                return fault
            return None

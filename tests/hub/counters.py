"""What the test Hub was asked for and what it sent, exact while transfers still run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fnmatch import fnmatchcase

from .faults import RequestKind

_CONTENT: frozenset[RequestKind] = frozenset({"resolve", "cdn", "xorb"})


@dataclass(frozen=True)
class RequestRecord:
    """One request as it stands now.

    `kind` tells the port too: "cdn" came in at the second address, "reconstruction" and "xorb" at the third,
    the others at the first.
    `file` is a path in the repo, or the API route's name. `status` is None until headers are sent;
    `bytes_sent` counts body bytes given to the kernel. Header names are lower case.
    """

    number: int
    kind: RequestKind
    port: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    repo: str
    file: str
    range: str | None
    status: int | None = None
    bytes_sent: int = 0
    finished: bool = False
    at: float = field(default_factory=time.monotonic)
    """When it was read; time.monotonic()."""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def is_content(self) -> bool:
        """Whether its body was content of a repo's file (with 8 bytes a chunk of 64 KiB in a xorb), not an error
        page or a redirect."""
        return self.method == "GET" and self.kind in _CONTENT and self.status in (200, 206)


@dataclass
class Progress:
    """How much of a step the kernel took, in bytes; set by whoever sends."""

    sent: int = 0


@dataclass(frozen=True)
class FileTotals:
    """Requests and body bytes of one file (or API route) by one kind of request."""

    repo: str
    file: str
    kind: RequestKind
    requests: int
    body_bytes: int


class Counters:
    """Every request since the last reset. Thread-safe; changes wake those who wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: dict[int, RequestRecord] = {}
        self._next_number = 0

    def begin(self, record: RequestRecord) -> int:
        """Keep a request that has just been read; returns the number to report progress under."""
        with self._changed:
            number = self._next_number
            self._next_number += 1
            self._records[number] = replace(record, number=number)
            self._changed.notify_all()
            return number

    def answered(self, number: int, status: int) -> None:
        """Called before the headers go, so that whoever has read them finds them counted."""
        self._update(number, lambda record: replace(record, status=status))

    @contextmanager
    def sending(self, number: int, byte_count: int) -> Iterator[Progress]:
        """Count bytes just before they go, and correct that by what the kernel took.

        Counted afterwards, a client that has read everything could find the last bytes missing here. So a
        count is exact for what has arrived, and ahead by at most the one step that is being sent.
        """
        progress = Progress()
        self._add_bytes(number, byte_count)
        try:
            yield progress
        finally:
            if progress.sent != byte_count:
                self._add_bytes(number, progress.sent - byte_count)

    def finish(self, number: int) -> None:
        self._update(number, lambda record: replace(record, finished=True))

    def requests(self) -> list[RequestRecord]:
        with self._changed:
            return list(self._records.values())

    def reset(self) -> None:
        """Forget everything; requests still under way are not counted any further."""
        with self._changed:
            self._records.clear()
            self._changed.notify_all()

    def count(
        self,
        *,
        kind: RequestKind | None = None,
        method: str | None = None,
        path_glob: str = "*",
        repo: str | None = None,
        status: int | None = None,
    ) -> int:
        """How many requests match; `path_glob` is matched against the file (or route) and the URL's path."""
        return sum(
            1
            for record in self.requests()
            if kind in (None, record.kind)
            and method in (None, record.method)
            and repo in (None, record.repo)
            and status in (None, record.status)
            and (fnmatchcase(record.file, path_glob) or fnmatchcase(record.path, path_glob))
        )

    def body_bytes(self, repo: str, path: str) -> int:
        """Content bytes of one file sent by GETs, direct, through the CDN, or in xorbs."""
        return sum(
            record.bytes_sent
            for record in self.requests()
            if record.is_content and record.repo == repo and record.file == path
        )

    def totals(self) -> list[FileTotals]:
        table: dict[tuple[str, str, RequestKind], tuple[int, int]] = {}
        for record in self.requests():
            key = (record.repo, record.file, record.kind)
            requests, sent = table.get(key, (0, 0))
            table[key] = (requests + 1, sent + record.bytes_sent)
        return [FileTotals(*key, *value) for key, value in sorted(table.items())]

    def wait_until(self, condition: Callable[[], bool], timeout: timedelta) -> bool:
        """Wait until the condition holds, asked after every change; False when the time is over."""
        deadline = time.monotonic() + timeout.total_seconds()
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def _add_bytes(self, number: int, byte_count: int) -> None:
        self._update(number, lambda record: replace(record, bytes_sent=record.bytes_sent + byte_count))

    def _update(self, number: int, change: Callable[[RequestRecord], RequestRecord]) -> None:
        with self._changed:
            record = self._records.get(number)
            if record is not None:
                self._records[number] = change(record)
                self._changed.notify_all()

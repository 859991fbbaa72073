"""One place that one blob's bytes can be read from, whatever kind of place it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from modelcached.errors import Reason
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.sources.http import CHUNK_BYTES, HttpSource, RemoteFile

Sink = Callable[[memoryview, int], None]


RANGE_BYTES = 16 << 20
"""One request over HTTP."""


class OriginFailedError(Exception):
    """This origin will not do, however often it is tried; the next one may."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Origin(Protocol):
    """Ranges of one blob."""

    @property
    def label(self) -> str:
        """For metrics and history: hub, xet, local."""
        ...

    @property
    def part_bytes(self) -> int:
        """How much it likes to be asked for at a time."""
        ...

    @property
    def at_once(self) -> int | None:
        """How many fetches from origins of its label may run on the node; None where only connections count."""
        ...

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """See HttpSource.fetch; OriginFailedError besides."""
        ...

    def forget(self) -> None:
        """The content was wrong, or all is done: nothing learnt about it holds."""
        ...


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """A file of the Hub, or of a mirror."""

    source: HttpSource
    file: RemoteFile

    @property
    def label(self) -> str:
        """Where the bytes are counted."""
        return "hub"

    @property
    def part_bytes(self) -> int:
        """So much at a time."""
        return RANGE_BYTES

    @property
    def at_once(self) -> int | None:
        """As many as there are connections."""
        return None

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """Over HTTP."""
        self.source.fetch(self.file, start, end, sink, abort)

    def forget(self) -> None:
        """The next request asks for a new address."""
        self.source.forget(self.file)

    def __str__(self) -> str:
        return str(self.file)


@dataclass(frozen=True, slots=True)
class LocalOrigin:
    """A file on this machine that somebody else may write: copied and verified, never linked."""

    path: str

    @property
    def label(self) -> str:
        """Where the bytes are counted."""
        return "local"

    @property
    def part_bytes(self) -> int:
        """So much at a time."""
        return RANGE_BYTES

    @property
    def at_once(self) -> int | None:
        """As many as there are connections."""
        return None

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """Reads the file."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                buffer = memoryview(bytearray(4 * CHUNK_BYTES))
                position = start
                while position < end:
                    if abort.is_set:
                        raise AbortedError
                    count = file.readinto(buffer[: min(len(buffer), end - position)]) or 0
                    if count == 0:
                        raise TransientError(Reason.DIGEST_MISMATCH, f"{self.path} is shorter than {end} bytes")
                    sink(buffer[:count], position)
                    position += count
        except OSError as error:
            raise TransientError(
                Reason.DIGEST_MISMATCH, f"{self.path} cannot be read: {error.strerror or os.strerror(error.errno or 0)}"
            ) from error

    def forget(self) -> None:
        """Nothing is learnt about a file."""

    def __str__(self) -> str:
        return self.path

"""One place that one blob's bytes can be read from, whatever kind of place it is."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modelcached.errors import CacheError, Reason
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.body import CHUNK_BYTES
from modelcached.sources.endpoints import Endpoints
from modelcached.sources.faults import REFUSALS, TransientError
from modelcached.sources.http import HttpSource, RemoteFile
from modelcached.sources.sink import Sink

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

    @property
    def content_tries(self) -> int:
        """How often it may deliver a whole file of wrong bytes."""
        ...

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """See HttpSource.fetch; OriginFailedError besides."""
        ...

    def forget(self) -> None:
        """The content was wrong, or all is done: nothing learnt about it holds."""
        ...


@dataclass(slots=True, eq=False)
class HubOrigin:
    """A file of the Hub, from whichever of its endpoints does best."""

    source: HttpSource
    endpoints: Endpoints
    files: Mapping[str, RemoteFile]
    """The file by endpoint."""
    _refused: set[str] = field(default_factory=set)
    """Mirrors that do not have it, or not for us; what the first endpoint refuses is refused."""
    _left: dict[int, str] = field(default_factory=dict)
    """By a range's end: who failed it last."""
    _alone: str = ""
    """Once the content was wrong, one endpoint brings all of it, as long as it does not fail, and is to blame."""
    _blamed: set[str] = field(default_factory=set)

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

    @property
    def content_tries(self) -> int:
        """From all together, then from each endpoint alone."""
        return 1 + len(self.files)

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """From an endpoint that does not rest, and for a range that has failed from another one if there is one."""
        while True:
            among = self._among()
            endpoint = self._next(among, end)
            try:
                self.source.fetch(self.files[endpoint], start, end, sink, abort)
            except TransientError as error:
                self._left[end] = endpoint
                self.endpoints.failed(endpoint, error)
                if error.reason is Reason.RATE_LIMITED and not self.endpoints.seconds_closed(among):
                    continue  # another one does not mind
                if len(self.files) == 1:
                    raise
                why = f"{error.message} (from {endpoint})"
                raise TransientError(error.reason, why, retry_after=error.retry_after) from error
            except CacheError as error:
                if endpoint == self.endpoints.first or error.reason not in REFUSALS:
                    raise
                self._refused.add(endpoint)
            else:
                self._left.pop(end, None)
                self.endpoints.answered(endpoint)
                return

    def forget(self) -> None:
        """Another address, another version, another endpoint."""
        if self._alone:
            self._blamed.add(self._alone)
        self._alone = self.endpoints.choose(self._among())
        for file in self.files.values():
            self.source.forget(file)

    def _among(self) -> set[str]:
        """Who may be asked."""
        fit = self.files.keys() - self._refused
        return fit - self._blamed or fit

    def _next(self, among: set[str], end: int) -> str:
        if self._alone:
            if self._alone not in among or not self.endpoints.rested({self._alone}):
                self._alone = self.endpoints.choose(among)
            return self._alone
        return self.endpoints.choose(among - {self._left.get(end, "")} or among)

    def __str__(self) -> str:
        return str(self.files[self.endpoints.first])


@dataclass(frozen=True, slots=True)
class LocalOrigin:
    """A file on this machine, which somebody else may write."""

    path: str
    moves: bool = False
    """Whoever asked for it gives it away: it may be taken over as it is."""

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

    @property
    def content_tries(self) -> int:
        """It will not be another file the next time."""
        return 1

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """Reads the file. Raises OriginFailedError where it cannot be read, is no file, or is too short."""
        try:
            # O_NONBLOCK: whoever wrote it may have put a FIFO there, on which nobody must wait.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OriginFailedError(f"{self.path} is no file")
                file.seek(start)
                buffer = memoryview(bytearray(CHUNK_BYTES))
                position = start
                while position < end:
                    if abort.is_set:
                        raise AbortedError
                    count = file.readinto(buffer[: min(len(buffer), end - position)]) or 0
                    if count == 0:
                        raise OriginFailedError(f"{self.path} is shorter than {end} bytes")
                    sink(buffer[:count], position)
                    position += count
        except OSError as error:
            told = error.strerror or os.strerror(error.errno or 0)
            raise OriginFailedError(f"{self.path} cannot be read: {told}") from error

    def forget(self) -> None:
        """Nothing is learnt about a file."""

    def __str__(self) -> str:
        return self.path

"""Between a source and the file: what each piece waits for, is written by, and is journalled after."""

from __future__ import annotations

import time
from collections.abc import Callable

from modelcached.precedence import Precedence
from modelcached.sources.abort import Abort
from modelcached.sources.sink import FileSink, Sink
from modelcached.store.disk import storage_error
from modelcached.transfer.flight import STEP_BYTES, Flight, Part
from modelcached.transfer.pace import RateLimiter


class Arrivals:
    """What one fetch brings, on its way into the flight's file, or into memory. Its mover thread's alone."""

    def __init__(
        self,
        flight: Flight,
        part: Part,
        abort: Abort,
        limiter: RateLimiter,
        precedence: Precedence,
        advance: Callable[[int, int], None],
    ) -> None:
        """``advance`` hears of what is in the journal."""
        self._flight = flight
        # Taken now, for the flight may be over, or begin anew, before its last mover has ended.
        self._partial = flight.partial
        self._write = flight.small_sink if flight.partial is None else flight.partial.write
        self._part = part
        self._abort = abort
        self._limiter = limiter
        self._precedence = precedence
        self._advance = advance
        self._marked = part.start

    @property
    def sink(self) -> Sink:
        """Where the fetch hands on."""
        return self._from_memory if self._partial is None else FileSink(self._from_memory, self._from_pipe)

    def mark(self, end: int) -> None:
        """All up to there is written."""
        if self._partial is not None and end > self._marked:
            self._partial.mark(self._marked, end)
            self._advance(self._marked, end)
            self._marked = end

    def _from_memory(self, view: memoryview, offset: int) -> None:
        write = self._write
        assert write is not None
        self._take(len(view), offset, lambda: write(view, offset))

    def _from_pipe(self, pipe: int, size_bytes: int, offset: int) -> None:
        partial = self._partial
        assert partial is not None
        self._take(size_bytes, offset, lambda: partial.write_from_pipe(pipe, size_bytes, offset))

    def _take(self, size_bytes: int, offset: int, write: Callable[[], None]) -> None:
        end = offset + size_bytes
        if self._flight.first_byte_at is None:
            self._flight.first_byte_at = time.monotonic()
        self._limiter.take(size_bytes, self._abort.wait)
        self._precedence.let_pass()
        try:
            write()
            if end - self._marked >= STEP_BYTES or end == self._part.end:
                self.mark(end)
        except OSError as error:
            raise storage_error(error, "writing") from error
        self._part.written = end

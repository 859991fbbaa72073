"""How long one part of a transfer is tried for, and how long after each failure."""

from __future__ import annotations

import random
import time

from modelcached.sources.faults import TransientError
from modelcached.transfer.flight import Part

_PROGRESS_BYTES = 64 << 10
"""Less is none: a peer that brings a byte a try is not to be tried for ever."""
_FIRST_BACKOFF_SECONDS = 0.25
_MOST_BACKOFF_SECONDS = 15.0


class Patience:
    """How long one part is tried for: its clock and its backoff begin anew whenever it makes progress."""

    def __init__(self, seconds: float, part: Part) -> None:
        self._seconds = seconds
        self._part = part
        self._reached = part.start
        self._since = time.monotonic()
        self._failures = 0
        self._over = False
        self.pause = 0.0
        """Before the next try; seconds."""

    @property
    def seconds_left(self) -> float:
        """Zero or less: another try would be beyond it."""
        return self._seconds - (time.monotonic() - self._since)

    @property
    def is_over(self) -> bool:
        """The last failure is the part's end."""
        return self._over or self.seconds_left <= 0

    def failed(self, error: TransientError) -> None:
        """One try more without an end."""
        if self._part.start - self._reached >= _PROGRESS_BYTES:
            self._reached, self._since, self._failures = self._part.start, time.monotonic(), 0
        if error.retry_after is not None:
            self.pause = error.retry_after.total_seconds()
            if self.pause > self.seconds_left:
                self.give_up()  # it is told to the caller instead
        else:
            most = min(_MOST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(self._failures, 16))
            self.pause = min(random.uniform(0, most), max(0.0, self.seconds_left))  # noqa: S311 - full jitter
        self._failures += 1

    def give_up(self) -> None:
        """No further try."""
        self._over = True

    def told(self, error: TransientError) -> TransientError:
        """The last failure, with the limit that ended the tries."""
        limit = f"transfer.retry_timeout is {self._seconds:g} s"
        why = f"no progress, {limit}"
        if error.retry_after is not None:
            why = f"it wants no request for {error.retry_after.total_seconds():g} s, {limit}"
        return TransientError(error.reason, f"{error.message}; {why}", retry_after=error.retry_after)

"""The daemon's one exception for what it refuses or cannot do.

Raised where the fact is known, carried upward unchanged, mapped to a gRPC
status in one place (service/status.py). The table of reasons is the clients'
too, and lives in modelcache.reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from modelcache.reasons import TABLE, Code, Entry, Reason

__all__ = ["CacheError", "Code", "Entry", "Reason"]


class CacheError(Exception):
    """A refusal or failure that explains itself (invariant 7).

    ``message`` is a whole sentence without a full stop: what was wrong, with
    which value, whose limit. What to do is added: ``mend``, else the table's.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        retry_delay: timedelta | None = None,
        mend: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.mend = mend or TABLE[reason].mend
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        if mend:  # else a client would add the table's
            self.metadata["mend"] = mend
        self.retry_delay = retry_delay
        self.is_logged = False
        """It stands in the log by now, with what it was about."""

    @property
    def entry(self) -> Entry:
        """The table's row for this reason."""
        return TABLE[self.reason]

    @property
    def text(self) -> str:
        """The same words for the log, the status detail and the client's exit."""
        return f"{self.message}; {self.mend}"

"""What a failure means for a flight, and what its waiters are told."""

from __future__ import annotations

import asyncio

import structlog

from modelcached.errors import CacheError, Reason
from modelcached.sources.faults import TransientError
from modelcached.sources.origin import OriginFailedError
from modelcached.store.disk import storage_error
from modelcached.transfer.flight import Flight

log = structlog.get_logger()


class ContentError(Exception):
    """The whole file must be fetched again: what there is cannot be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def verdict(flight: Flight, error: Exception) -> Exception:
    """What a failed part means for its flight: another try, another origin, or the end."""
    if isinstance(error, (ContentError, OriginFailedError)):
        return error
    if isinstance(error, TransientError) and len(flight.origins) > 1:
        return OriginFailedError(error.message)
    return explained(error)


def explained(error: BaseException) -> CacheError:
    """What the waiters are told."""
    if isinstance(error, CacheError):
        return error
    if isinstance(error, TransientError):
        return error.final()
    if isinstance(error, ContentError):
        return CacheError(Reason.DIGEST_MISMATCH, error.message)
    if isinstance(error, OSError):
        return storage_error(error, "transferring")
    if isinstance(error, asyncio.CancelledError):
        return CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; progress is kept")
    log.error("flight failed unexpectedly", exc_info=error)
    return CacheError(Reason.INTERNAL, f"{type(error).__name__}: {error}")

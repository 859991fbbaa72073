"""Work that a cancelled caller must not leave half done: what changes the disk, belief and account together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger()


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Runs it to its end. Who is cancelled meanwhile ends behind it, not within it; how often does not matter."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.warning("failed behind a caller that had gone", why=repr(failure))
    raise cancelled

"""Going on where the disk was full in the middle of something."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from modelcached.errors import CacheError
from modelcached.store.disk import means_full

T = TypeVar("T")
MakeRoom = Callable[[int], Awaitable[bool]]
"""Is asked for bytes; says whether it is worth another try."""


async def with_room(work: Callable[[], Awaitable[T]], wanted_bytes: int, make_room: MakeRoom) -> T:
    """Does the work, again after each time that the disk was full and room could be made. Raises what it raises."""
    while True:
        try:
            return await work()
        except (OSError, CacheError) as error:
            if not means_full(error) or not await make_room(wanted_bytes):
                raise

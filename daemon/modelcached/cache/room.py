"""Something has ended that may make room: a lease, a pin, a promise, a file."""

from __future__ import annotations

import asyncio


class Room:
    """The event loop's alone."""

    def __init__(self) -> None:
        self.next = asyncio.Event()
        """The next time that there may be more. Take it before looking, then wait for it: nothing is missed."""

    def tell(self) -> None:
        """There may be more."""
        before, self.next = self.next, asyncio.Event()
        before.set()

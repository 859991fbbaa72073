"""Those who wait for one assembly, each with a patience of its own."""

from __future__ import annotations

import asyncio
import time

from modelcached.cache.shortage import NoRoomError


class Caller:
    """One of them."""

    def __init__(self, until: float) -> None:
        self.until = until
        """How long it lets others make room, where there is none; monotonic, and long ago for not at all."""
        self.refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends with the refusal that it did not want to wait on for."""
        self._began = time.monotonic()

    def tell(self, refusal: NoRoomError) -> bool:
        """There is no room now; whether the caller waits on."""
        now = time.monotonic()
        if now < self.until:
            return True
        if not self.refused.done():
            waited = f"; waited {now - self._began:.0f} s for others to make room" if self.until else ""
            told = NoRoomError(refusal.reason, f"{refusal.message}{waited}", metadata=refusal.metadata)
            self.refused.set_exception(told)
            self.refused.exception()  # seen: the caller may have gone
        return False

"""hub/ must stay the directory that workloads have mounted: their mounts hold its inode, not its name.

Where another directory has taken its name, what is published there is seen by new pods only, and what old pods
see no daemon keeps any more. That is not to be covered up: nothing is served until nobody is known to use the
old one, which is when no lease is left.
"""

from __future__ import annotations

import enum
import os
import time

import structlog

from modelcached.cache.core import Core
from modelcached.ledger.database import hub_identity
from modelcached.store.mounts import PROC, Holder, Identity, holders, identity

log = structlog.get_logger()

_NAME_SECONDS = 10.0
"""How often those who have the old directory are looked for: a look through all of /proc."""
_NAMED = 10
"""So many of them, and of the leases, are named; a status is for people."""


class HubSight(enum.Enum):
    """What a look at hub/ found."""

    OURS = "ours"
    NEW = "new"
    """Ours from now on, or again: nothing that was believed of it counts."""
    LOST = "lost"
    """Missing, or another directory than leased workloads have mounted."""


class HubKeeper:
    """Remembers which directory hub/ is. The event loop's alone."""

    def __init__(self, core: Core, remembered: str, proc: str = PROC) -> None:
        """``remembered``: what an earlier daemon kept (``hub_identity``). Another boot has no mounts of before.

        A cache that was copied to another path is no replaced one: its old readers have theirs, which nobody touches.
        """
        self._core = core
        self._proc = proc
        boot_id, device, inode, born, path = (*remembered.split(" ", 4), "", "", "", "", "")[:5]
        same = boot_id == core.clock.boot_id and path == core.layout.hub
        self._own = Identity.parse(f"{device} {inode} {born}") if same else None
        self._descriptor = -1  # keeps the inode's number from being given to another directory
        self._told = ""
        self._named_at = float("-inf")
        self._holders: list[Holder] = []

    async def look(self) -> HubSight:
        """Is it the one? Sets ``core.hub_trouble``, which refuses requests, and tells operators."""
        core = self._core
        try:
            now = await core.pools.on_disk(identity, core.layout.hub)
        except OSError as error:
            return await self._lose("unseen", f"{core.layout.hub} cannot be looked at: {error}")
        if now is None:
            return await self._lose("missing", f"{core.layout.hub} is missing, and is not made anew while we run")
        # Requests under way believe in what lies in the old one; they end by being refused.
        if self._own is not None and now != self._own and (core.use.leases or core.use.holding()):
            return await self._lose("replaced", f"{core.layout.hub} is another directory than it was")
        if now != self._own or self._descriptor < 0:
            await self._accept(now)
            if self._own is not None and now != self._own:
                log.warning("hub/ is another directory than it was, and no lease is left: taken as it is")
                self._told = self._told or "replaced"
            self._own = now
        if not self._told:
            return HubSight.OURS
        self._told, self._named_at = "", float("-inf")
        core.hub_trouble = ""
        core.degraded.pop("hub", None)
        log.info("hub/ is as it should be again", directory=core.layout.hub)
        return HubSight.NEW

    async def _accept(self, now: Identity) -> None:
        core = self._core
        self.close()
        self._descriptor = await core.pools.on_disk(
            os.open, core.layout.hub, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        core.hub_at = (now.device, now.inode)
        core.database.write_later(hub_identity(f"{core.clock.boot_id} {now} {core.layout.hub}"))

    async def _lose(self, kind: str, what: str) -> HubSight:
        core = self._core
        if time.monotonic() - self._named_at >= _NAME_SECONDS or self._told != kind:
            self._named_at = time.monotonic()
            self._holders = []
            if self._own is not None:
                near = core.layout.cache_dir
                self._holders = await core.pools.on_disk(holders, self._own, near, self._proc)
        leases = sorted(
            f"{lease} on {', '.join(sorted(str(model.snapshot) for model in lease.models))}"
            for lease in core.use.leases.values()
        )
        text = what
        if self._holders:
            text += f"; the old one is mounted by {_several(list(map(str, self._holders)))}"
        if leases:
            text += f"; leased: {_several(leases)}"
        text += "; those readers see the old one until they are restarted, and nothing is served meanwhile"
        core.hub_trouble = core.degraded["hub"] = text
        if self._told != kind:
            self._told = kind
            log.error("hub/ is not the directory that workloads have mounted", why=text)
        return HubSight.LOST

    def close(self) -> None:
        """Lets go of the directory."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _several(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

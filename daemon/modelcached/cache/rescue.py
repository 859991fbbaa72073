"""When the disk is full although the account says that it is not.

Others write to the filesystem too, and a quota shows no less space than there is. What is under way is not failed
for it as long as something else may go.
"""

from __future__ import annotations

import structlog

from modelcached.cache import eviction
from modelcached.cache.core import SET_ASIDE_INODES, Core
from modelcached.cache.leftovers import drop_leftovers
from modelcached.ledger.space import Amount

log = structlog.get_logger()


async def make_room(core: Core, wanted_bytes: int) -> bool:
    """Evicts for what met a full disk; whether there may be more now. Never True for ever: each time costs a model.

    Whoever failed beside it at the same time shares what it made.
    """
    before = core.rescues
    async with core.admission:
        if core.rescues != before:
            return True
        disk, wanted = await core.filesystem(), Amount(wanted_bytes)
        if disk.free_inodes is not None and disk.free_inodes < SET_ASIDE_INODES:
            wanted = Amount(0, SET_ASIDE_INODES)  # of those there are too few: bytes are none of its troubles
        if core.evictions:
            ends = await core.until_evicted(core.evictions.values())
            if any(isinstance(end, int) for end in ends):
                core.rescues += 1
                return True
        if not await drop_leftovers(core, wanted, expired_only=True):
            victims, frees = eviction.plan(core, wanted)
            log.warning(
                "the disk is full while something is under way, evicting for it",
                wanted_bytes=wanted.size_bytes,
                wanted_inodes=wanted.inodes,
                frees_bytes=frees.size_bytes,
                models=[str(victim.id) for victim in victims],
            )
            ends = await core.until_evicted(eviction.condemn(core, [victim.id for victim in victims], "full"))
            if not any(isinstance(end, int) for end in ends):
                return False
        core.rescues += 1
        return True

"""What may be had for a model that nobody waits for, the model list's: nothing that pods use, or will use again.

So it has free room, as far as that does not make the watermarks evict for it, and what nobody needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.ledger.space import Amount
from modelcached.store.index import Snapshot
from modelcached.store.measure import Filesystem


def room_on(core: Core, disk: Filesystem) -> Amount:
    """What can still be promised to it."""
    space, room = core.space, core.room_on(disk)
    high = int(space.limits.budget_bytes * core.config.cache.high_watermark)
    return replace(room, size_bytes=min(room.size_bytes, high - space.used_bytes - space.reserved_bytes))


def evictable(core: Core) -> Iterator[Snapshot]:
    """What may go for it now: what this daemon fetched and no request ever asked for, and what was superseded."""
    refs = core.refs()
    for snapshot in eviction.evictable(core):
        unasked = snapshot.id not in core.use.usage and snapshot.record is not None
        if unasked or core.use.superseded(snapshot.id, refs):
            yield snapshot

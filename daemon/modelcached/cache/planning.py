"""What making models whole would take, by the reckoning that admits them; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.cache.requests import Evicted, Fit, Plan, PlannedModel
from modelcached.cache.shortage import NoRoomError, check_ever_fits, refusal
from modelcached.cache.sizes import INODES_OF_FLIGHT, blob_bytes, overhead, selection_bytes
from modelcached.cache.want import Want, missing, names_of
from modelcached.errors import CacheError
from modelcached.ledger.space import NOTHING, Amount
from modelcached.model import Digest


def to_reserve(
    core: Core,
    wants: Sequence[Want],
    comes: Callable[[Digest], bool],
    resumable: Mapping[Digest, int],
    *,
    publishes: bool = True,
) -> Amount:
    """What a request needs beyond what it has: its missing blobs, links, records.

    ``comes``: a blob is on its way already, or a link away. ``resumable``: blocks that an earlier try left.
    """
    fetch: dict[Digest, int] = {}
    paths, folders = 0, 0
    for want in wants:
        fetch |= {d: entry.size_bytes for d, entry in missing(core, want).items() if not comes(d)}
        if publishes and not want.is_shown(core):
            paths += len(want.record.paths | want.selection.paths)
            folders += len({path.rpartition("/")[0] for path in want.selection.paths})
    blobs = sum(max(0, blob_bytes(size) - resumable.get(digest, 0)) for digest, size in fetch.items())
    if not paths and not fetch:
        return NOTHING
    return Amount(blobs, INODES_OF_FLIGHT * len(fetch)) + overhead(paths, folders)


async def plan(core: Core, wants: Sequence[Want], is_flying: Callable[[Digest], bool]) -> Plan:
    """Whether they fit together, and what would go for them. Nothing is promised: another may be faster."""
    lacking = {digest for want in wants for digest in missing(core, want)}
    resumable = await core.pools.on_disk(core.partials.allocated_bytes, lacking)
    disk = await core.filesystem()

    def comes(digest: Digest) -> bool:
        return is_flying(digest) or bool(core.index.donors(digest))

    with core.use.hold([want.snapshot for want in wants], names_of(wants)):  # what it has itself does not go for it
        needed, room = to_reserve(core, wants, comes, resumable), core.room_on(disk)
        victims, frees = ([], NOTHING) if room.covers(needed) else eviction.plan(core, needed - room)
    holder = ", ".join(str(want.snapshot) for want in wants)
    fit, why = Fit.NOW, ""
    if needed == NOTHING:
        fit = Fit.CACHED
    elif not room.covers(needed):
        fit = Fit.AFTER_EVICTION
        try:
            check_ever_fits(core, sum(selection_bytes(list(want.entries.values())) for want in wants), holder)
            if not frees.covers(needed - room):
                raise refusal(core, needed, disk, frees, holder)
        except CacheError as error:
            fit, why = (Fit.NOT_NOW if isinstance(error, NoRoomError) else Fit.NEVER), error.message
    return Plan(
        tuple(_planned(core, want, comes) for want in wants),
        fit,
        needed.size_bytes,
        room.size_bytes,
        tuple(Evicted(v.id, v.freed_bytes) for v in victims) if fit is Fit.AFTER_EVICTION else (),
        why,
    )


def _planned(core: Core, want: Want, comes: Callable[[Digest], bool]) -> PlannedModel:
    fetched = sum(entry.size_bytes for digest, entry in missing(core, want).items() if not comes(digest))
    return PlannedModel(want.snapshot, want.revision, want.selection, want.bytes_total, fetched)

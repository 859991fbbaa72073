"""Showing a snapshot whose blobs are all there: in the order in which a kill in between does no harm."""

from __future__ import annotations

from dataclasses import replace

from modelcached.cache.core import Core
from modelcached.cache.pointing import point
from modelcached.cache.verification import ADOPTED
from modelcached.cache.want import Want, missing
from modelcached.errors import CacheError, Reason
from modelcached.model import Revision, Selection, SnapshotId
from modelcached.store.index import Snapshot, SnapshotState
from modelcached.store.scan import snapshot_links


async def publish(core: Core, want: Want, adopted: Selection | None, revisions: set[Revision]) -> None:
    """Snapshot, record, listing, refs.

    ``adopted``: what else of it was found right. Raises CacheError where a blob, or hub/ itself, vanished meanwhile.
    """
    snapshot_id = want.snapshot
    async with core.publishing(snapshot_id):
        await core.pools.on_disk(core.check_hub_on_disk)  # its blobs lie in the one that was there when it began
        snapshot = core.index.snapshot(snapshot_id)
        record = snapshot.record if snapshot is not None and snapshot.record is not None else want.record
        if record.manifest.local:  # the want's is that, or the Hub's word by now
            record = replace(record, manifest=want.record.manifest)
        repo = core.index.repo(snapshot_id.repo_id)
        blobs, files = repo.blobs, record.manifest.files
        if lacking := missing(core, want):
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"{len(lacking)} blobs of {snapshot_id} vanished while it was being published",
                metadata={"digest": next(iter(lacking)).hex},
            )
        # Selections that lost a blob meanwhile (somebody removed it) are complete no longer.
        selections = {
            name: selection
            for name, selection in record.selections.items()
            if all(
                path in files and (blob := blobs.get(files[path].digest)) is not None and blob.verified
                for path in selection.paths
            )
        }
        selections[want.selection.profile] = want.selection
        if adopted is not None:  # less what has been found missing since
            found = frozenset(path for path in adopted.paths if path in files and files[path].digest in blobs)
            selections[ADOPTED] = replace(adopted, paths=found)
        readers = tuple(sorted({*record.readers, *want.record.readers}))
        record = replace(record, selections=selections, readers=readers)
        links = {path: files[path].digest for path in record.paths}
        stamps = {digest: blobs[digest].stamp for digest in links.values()}
        record = replace(record, stamps=stamps)
        complete = record.is_whole
        leased = bool(core.use.leases_on(snapshot_id, core.refs()))
        if not complete:
            await core.pools.on_disk(core.snapshots.remove_tree_file, snapshot_id)
        try:
            trashed = await core.pools.on_disk(core.snapshots.publish, snapshot_id, links, may_gap=not leased)
        finally:
            await _believe_what_shows(core, snapshot_id)
        try:
            await core.pools.on_disk(core.manifests.write, record)
            repo = core.index.repo(snapshot_id.repo_id)
            repo.snapshots[snapshot_id.commit] = Snapshot(snapshot_id, links, record, SnapshotState.READY)
            if complete:
                await core.pools.on_disk(core.snapshots.write_tree, record.manifest)
        finally:
            if trashed is not None:
                await core.pools.on_disk(core.disk.remove_tree, trashed)
    for revision in sorted(revisions):
        await point(core, snapshot_id.repo_id, revision, snapshot_id.commit)


async def _believe_what_shows(core: Core, snapshot_id: SnapshotId) -> None:
    """What readers see is known from now on, also where the record cannot be written: its blobs are nobody's orphans.

    Until there is a new record the old one holds for what it names, and a snapshot without one is not served.
    """
    links = await core.pools.on_disk(snapshot_links, core.layout, snapshot_id)
    if links is None:
        return
    repo = core.index.repo(snapshot_id.repo_id)
    before = repo.snapshots.get(snapshot_id.commit)
    record, state = (before.record, before.state) if before is not None else (None, SnapshotState.UNVERIFIED)
    repo.snapshots[snapshot_id.commit] = Snapshot(snapshot_id, links, record, state)

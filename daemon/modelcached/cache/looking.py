"""A look at the disk for a request: whether all that it wants is there, as it was verified. What a hit is made of."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from modelcached.cache.core import Core
from modelcached.cache.want import Want
from modelcached.model import as_commit
from modelcached.store.disk import storage_error
from modelcached.store.index import SnapshotState
from modelcached.store.manifests import BlobStamp
from modelcached.store.scan import snapshot_stamps


@dataclass(frozen=True, slots=True)
class Sight:
    """What a look at the disk found of a want."""

    whole: bool
    """The selection is complete and on disk, by belief and by stat through every link: a hit."""
    named: bool
    """The branch or tag that it was asked by points to it, by belief and by its file."""


class Looking:
    """Looks at the disk for requests. The event loop's alone.

    A look begins after the request that it is for; whoever asks for the same until it begins shares it. Many threads
    that stat the same files for many callers would do nothing but wait for each other's GIL.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._waiting: dict[object, asyncio.Task[Sight]] = {}
        self._running: dict[object, asyncio.Task[Sight]] = {}

    async def look(self, want: Want) -> Sight:
        """One turn in a disk thread, for this is what a hit waits for. Raises CacheError(STORAGE_ERROR)."""
        key = (want.snapshot, want.selection, want.revision)
        task = self._waiting.get(key)
        if task is None:
            task = self._waiting[key] = asyncio.create_task(self._in_turn(key, want))
        return await asyncio.shield(task)  # others share it

    async def _in_turn(self, key: object, want: Want) -> Sight:
        if (before := self._running.get(key)) is not None:
            await asyncio.wait({before})
        task = self._running[key] = self._waiting.pop(key)
        try:
            return await self._see(want)
        finally:
            if self._running.get(key) is task:
                del self._running[key]

    async def _see(self, want: Want) -> Sight:
        core = self._core
        commit, snapshot = want.snapshot.commit, core.index.snapshot(want.snapshot)
        if snapshot is None or snapshot.state is not SnapshotState.READY or snapshot.record is None:
            return Sight(whole=False, named=False)
        if want.selection.profile not in snapshot.record.selections:
            return Sight(whole=False, named=False)
        repo = core.index.repo(want.snapshot.repo_id)
        links = {path: entry.digest for path, entry in want.entries.items()}
        has_name = as_commit(want.revision) is None and repo.refs.get(want.revision) == commit

        def see() -> tuple[dict[str, os.stat_result | None], bool]:
            core.check_hub_on_disk()
            stamps = snapshot_stamps(core.layout, want.snapshot, links)
            return stamps, has_name and core.snapshots.says(want.snapshot.repo_id, want.revision, commit)

        try:
            found, named = await core.pools.on_disk(see)
        except OSError as error:  # what cannot be seen is not gone: neither a hit nor something to fetch
            raise storage_error(error, f"looking at {want.snapshot}") from error
        whole = all(
            (blob := repo.blobs.get(entry.digest)) is not None
            and blob.verified
            and (status := found[path]) is not None
            and BlobStamp.of(status) == blob.stamp
            for path, entry in want.entries.items()
        )
        return Sight(whole=whole, named=named and repo.refs.get(want.revision) == commit)

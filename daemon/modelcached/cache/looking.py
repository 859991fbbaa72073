"""A look at the disk for a request: whether all that it wants is there, as it was verified. What a hit is made of."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass

from modelcached.cache.core import Core
from modelcached.cache.want import Want
from modelcached.store.disk import storage_error
from modelcached.store.index import Repo, SnapshotState
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

    A look begins after the request that it is for; who asks for the same while one is under way shares the next. Many
    threads that stat the same files for many callers would do nothing but wait for each other's GIL.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._under_way: dict[object, asyncio.Task[None] | None] = {}
        """None where one request looks for itself: a task of its own would cost it more than the look."""
        self._sharing: dict[object, tuple[Want, list[asyncio.Future[Sight]]]] = {}
        """Who waits for the next, and what the first of them wants: it was asked for after the look under way."""

    async def look(self, want: Want) -> Sight:
        """One turn in a disk thread, for this is what a hit waits for. Raises CacheError(STORAGE_ERROR)."""
        key = (want.snapshot, want.selection.profile, want.selection.paths, want.revision)
        if key in self._under_way:
            seen: asyncio.Future[Sight] = asyncio.get_running_loop().create_future()
            self._sharing.setdefault(key, (want, []))[1].append(seen)
            return await seen
        self._under_way[key] = None
        try:
            return await self._see(want)
        finally:
            self._next(key)

    def _next(self, key: object) -> None:
        if key in self._sharing:
            self._under_way[key] = asyncio.create_task(self._look_for_all(key))
        else:
            del self._under_way[key]

    async def _look_for_all(self, key: object) -> None:
        want, sharing = self._sharing.pop(key)
        try:
            sight = await self._see(want)
        except BaseException as error:  # noqa: BLE001 - it is theirs
            for seen in sharing:
                if not seen.done():
                    seen.set_exception(error)
        else:
            for seen in sharing:
                if not seen.done():
                    seen.set_result(sight)
        finally:
            self._next(key)

    async def _see(self, want: Want) -> Sight:
        core = self._core
        commit, snapshot = want.snapshot.commit, core.index.snapshot(want.snapshot)
        if snapshot is None or snapshot.state is not SnapshotState.READY or snapshot.record is None:
            return Sight(whole=False, named=False)
        if want.selection.profile not in snapshot.record.selections:
            return Sight(whole=False, named=False)
        repo = core.index.repo(want.snapshot.repo_id)
        has_name = repo.refs.get(want.revision) == commit

        def see() -> tuple[dict[str, os.stat_result | None], bool]:
            core.check_hub_on_disk()
            stamps = snapshot_stamps(core.layout, want.snapshot, want.links)
            return stamps, has_name and core.snapshots.says(want.snapshot.repo_id, want.revision, commit)

        try:
            found, named = await core.pools.on_disk(see)
        except OSError as error:  # what cannot be seen is not gone: neither a hit nor something to fetch
            raise storage_error(error, f"looking at {want.snapshot}") from error
        whole = _is_whole(want, repo, found)
        return Sight(whole=whole, named=named and repo.refs.get(want.revision) == commit)


def _is_whole(want: Want, repo: Repo, found: Mapping[str, os.stat_result | None]) -> bool:
    for path, digest in want.links.items():
        blob, status = repo.blobs.get(digest), found[path]
        if blob is None or not blob.verified or status is None or BlobStamp.of(status) != blob.stamp:
            return False
    return True

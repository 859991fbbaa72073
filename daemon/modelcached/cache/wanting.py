"""From what was asked to the files that answer it: policy, commit, manifest, access, selection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from modelcached.cache import policy
from modelcached.cache.assemblies import Assemblies, Watch
from modelcached.cache.core import Core
from modelcached.cache.requests import ModelRequest, Phase
from modelcached.cache.want import Want
from modelcached.catalog import Catalog, fingerprint
from modelcached.model import Manifest, RepoId, Revision, Selection, SnapshotId
from modelcached.profiles import index_file, select
from modelcached.store.manifests import Record

ACCESS_TTL_SECONDS = 300.0
"""How long the Hub's word that a token may read a restricted repository is believed without asking again."""

_RECENT_WANTS = 64


class Wanting:
    """The event loop's alone."""

    def __init__(self, core: Core, catalog: Catalog, assemblies: Assemblies) -> None:
        self._core = core
        self._catalog = catalog
        self._assemblies = assemblies
        self._access: dict[tuple[RepoId, str], float] = {}
        self._recent: dict[tuple[SnapshotId, str, Revision], Want] = {}

    async def wants(self, models: Sequence[ModelRequest], token: str | None, watch: Watch) -> tuple[Want, ...]:
        """Base and adapters at once: a Hub that is silent about all of them is waited for once.

        Raises CacheError.
        """
        if len(models) == 1:
            return (await self._want(models[0], token, watch),)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._want(model, token, watch)) for model in models]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first that was refused; the others were cancelled
        return tuple(task.result() for task in tasks)

    async def _want(self, model: ModelRequest, token: str | None, watch: Watch) -> Want:
        """Repository and revision down to commit, manifest and selection."""
        policy.check_repository(self._core.config.policy, model.repo_id)
        watch.enter(Phase.RESOLVING, f"{model.repo_id}@{model.revision}")
        repo = self._core.index.repos.get(model.repo_id)  # a name alone must leave nothing behind
        cached = repo.refs.get(model.revision) if repo is not None else None
        if cached is not None and self._core.index.snapshot(SnapshotId(model.repo_id, cached)) is None:
            cached = None
        answer = await self._catalog.resolve(model.repo_id, model.revision, token, cached)
        snapshot = SnapshotId(model.repo_id, answer.commit)
        while (eviction_task := self._core.evictions.get(snapshot)) is not None:
            await self._core.until_evicted([eviction_task])
        known = self._core.index.snapshot(snapshot)
        record = known.record if known is not None else None
        if record is None:
            record = await self._catalog.manifest(snapshot, token, restricted=answer.restricted)
        if record.manifest.restricted:
            record = await self._check_access(record, token, hub_is_silent=answer.stale)
        selection = record.selections.get(model.profile.canonical)
        if selection is None:
            selection = await self._select(model, record.manifest, token, watch)
        policy.check_files(self._core.config.policy, model.repo_id, selection)
        return self._known(Want(record, selection, model.revision, answer.stale))

    def _known(self, want: Want) -> Want:
        """The same want as the last time, with all that was derived from it."""
        key = (want.snapshot, want.selection.profile, want.revision)
        before = self._recent.pop(key, None)
        if (
            before is None
            or before.record is not want.record
            or before.selection is not want.selection
            or before.stale != want.stale
        ):
            before = want
        self._recent[key] = before  # the youngest is last
        if len(self._recent) > _RECENT_WANTS:
            del self._recent[next(iter(self._recent))]
        return before

    async def _check_access(self, record: Record, token: str | None, *, hub_is_silent: bool) -> Record:
        """Who may read a restricted repository is the Hub's to say, hit or not; its last word holds in its silence."""
        repo_id, who = record.manifest.repo_id, fingerprint(token)
        checked = self._access.get((repo_id, who))
        if checked is not None and time.monotonic() - checked < ACCESS_TTL_SECONDS:
            return record
        known = who in record.readers
        if known and hub_is_silent:
            return record
        if not await self._catalog.check_access(repo_id, token, known=known):
            return record
        self._access[repo_id, who] = time.monotonic()
        return replace(record, readers=tuple(sorted({*record.readers, who})))

    async def _select(self, model: ModelRequest, manifest: Manifest, token: str | None, watch: Watch) -> Selection:
        """Applies the profile; a repository in shards has an index that must be read first."""
        entry = index_file(model.profile, manifest)
        content: bytes | None = None
        if entry is not None:
            watch.enter(Phase.RESOLVING, f"{model.repo_id}: {entry.path}")
            only = Selection(f"file={entry.path}", "none", frozenset({entry.path}))
            want = Want(Record(manifest), only, model.revision, stale=True)
            content = await self._assemblies.fetch_one(want, token, watch)
        # A hundred thousand paths against patterns take most of a second: not on the event loop.
        return await self._core.pools.on_disk(select, model.profile, manifest, content)

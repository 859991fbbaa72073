"""From what was asked to the files that answer it: policy, commit, manifest, access, selection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from modelcached.cache import policy
from modelcached.cache.assemblies import Assemblies, Watch
from modelcached.cache.core import Core
from modelcached.cache.importing import Import
from modelcached.cache.requests import ModelRequest, Phase
from modelcached.cache.want import Want
from modelcached.catalog import Catalog, fingerprint
from modelcached.model import Manifest, RepoId, Revision, Selection, SnapshotId, as_commit
from modelcached.profiles import index_file, select
from modelcached.sources.folder import Folder, look
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

    async def wants(
        self, models: Sequence[ModelRequest], token: str | None, watch: Watch, folder: Import | None = None
    ) -> tuple[Want, ...]:
        """Base and adapters at once: a Hub that is silent about all of them is waited for once.

        ``folder``: where the model is to be taken from. Raises CacheError.
        """
        if len(models) == 1:
            return (await self._want(models[0], token, watch, folder),)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._want(model, token, watch)) for model in models]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first that was refused; the others were cancelled
        return tuple(task.result() for task in tasks)

    async def _want(self, model: ModelRequest, token: str | None, watch: Watch, source: Import | None = None) -> Want:
        """Repository and revision down to commit, manifest and selection.

        In the Hub's silence what is cached stands in for its word, else what a directory of this machine says.
        """
        policy.check_repository(self._core.config.policy, model.repo_id)
        watch.enter(Phase.RESOLVING, f"{model.repo_id}@{model.revision}")
        repo = self._core.index.repos.get(model.repo_id)  # a name alone must leave nothing behind
        cached = repo.refs.get(model.revision) if repo is not None else None
        if cached is not None and self._core.index.snapshot(SnapshotId(model.repo_id, cached)) is None:
            cached = None
        folder = await self._folder(model, source) if cached is None and not self._is_recorded(model) else None
        told = folder.commit if folder is not None else None
        answer = await self._catalog.resolve(model.repo_id, model.revision, token, cached or told)
        if cached is None and answer.stale:
            answer = replace(answer, stale=False)  # the directory's word is all that there is, and its name is given
        if as_commit(model.revision) is None and not answer.stale:
            self._core.branches.heard(model.repo_id, model.revision, answer.commit, answer.told_at)
        snapshot = SnapshotId(model.repo_id, answer.commit)
        while (eviction_task := self._core.evictions.get(snapshot)) is not None:
            await self._core.until_evicted([eviction_task])
        known = self._core.index.snapshot(snapshot)
        record = known.record if known is not None else None
        known_to_hub = record is not None and not record.manifest.local
        if record is None or not (known_to_hub or model.profile.canonical in record.selections):
            record = await self._manifest(snapshot, token, answer.restricted, record, folder)
        if record.manifest.restricted:
            record = await self._check_access(record, token, hub_is_silent=answer.stale)
        selection = record.selections.get(model.profile.canonical)
        if selection is None:
            selection = await self._select(model, record.manifest, token, watch, source)
        policy.check_files(self._core.config.policy, model.repo_id, selection)
        return self._known(snapshot, Want(record, selection, model.revision, answer.stale))

    def _is_recorded(self, model: ModelRequest) -> bool:
        """It is asked for by its commit, and what that holds is known: nobody needs to look anywhere."""
        commit = as_commit(model.revision)
        known = self._core.index.snapshot(SnapshotId(model.repo_id, commit)) if commit is not None else None
        return known is not None and known.record is not None

    async def _folder(self, model: ModelRequest, source: Import | None) -> Folder | None:
        """The first on this machine that says that it is that model."""
        if source is not None:
            return source.folder
        directories = self._core.config.sources.directories
        if not directories:
            return None
        found = await self._core.pools.on_disk(look, directories, model.repo_id, model.revision)
        return next((folder for folder in found if folder.commit is not None), None)

    async def _manifest(
        self,
        snapshot: SnapshotId,
        token: str | None,
        restricted: bool | None,
        known: Record | None,
        folder: Folder | None,
    ) -> Record:
        """What the commit holds: our record, the Hub's listing, or what is said of it on this machine."""
        local = known.manifest if known is not None else None
        if local is None and folder is not None and folder.commit == snapshot.commit:
            local = await self._core.pools.on_disk(folder.says, snapshot.repo_id)
        record = await self._catalog.manifest(snapshot, token, restricted=restricted, local=local)
        return replace(known, manifest=record.manifest) if known is not None else record

    def _known(self, snapshot: SnapshotId, want: Want) -> Want:
        """The same want as the last time, with all that was derived from it."""
        key = (snapshot, want.selection.profile, want.revision)
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

    async def _select(
        self, model: ModelRequest, manifest: Manifest, token: str | None, watch: Watch, source: Import | None
    ) -> Selection:
        """Applies the profile; a repository in shards has an index that must be read first."""
        entry = index_file(model.profile, manifest)
        content: bytes | None = None
        if entry is not None:
            watch.enter(Phase.RESOLVING, f"{model.repo_id}: {entry.path}")
            only = Selection(f"file={entry.path}", "none", frozenset({entry.path}))
            want = Want(Record(manifest), only, model.revision, stale=True)
            content = await self._assemblies.fetch_one(want, token, watch, source)
        # A hundred thousand paths against patterns take most of a second: not on the event loop.
        return await self._core.pools.on_disk(select, model.profile, manifest, content)

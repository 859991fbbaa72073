"""The heart: ensure, get, list, lease, evict, pin, cancel, status. Read ``Cache.ensure`` from the top.

State lives on the event loop and is changed only there; threads move, hash and
unlink, and report back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import structlog

from modelcached.cache import eviction, policy
from modelcached.cache.admission import pinned_and_leased
from modelcached.cache.assembly import Assembly, Tally, Want, is_whole
from modelcached.cache.core import Core
from modelcached.cache.requests import (
    CachedModel,
    EnsureRequest,
    Evicted,
    LeaseWish,
    ModelRequest,
    Outcome,
    Phase,
    Progress,
    Ready,
    ReadyModel,
    Status,
    Transfer,
)
from modelcached.catalog import Catalog, fingerprint
from modelcached.errors import CacheError, Reason
from modelcached.events import RequestEnded
from modelcached.ledger.leases import Lease, LeasedModel, LeaseKind
from modelcached.model import Commit, Manifest, RepoId, Revision, Selection, SnapshotId, as_commit
from modelcached.profiles import index_file, select
from modelcached.sources.http import HttpSource
from modelcached.sources.hub import read_token
from modelcached.store.index import Snapshot, SnapshotState
from modelcached.store.manifests import Record
from modelcached.store.scan import free_bytes
from modelcached.transfer.flights import Flights

log = structlog.get_logger()

ACCESS_TTL_SECONDS = 300.0
"""How long the Hub's word that a token may read a restricted repository is believed without asking again."""


class Watch:
    """One caller's view of its request: phase and progress at any moment, however slowly it looks."""

    def __init__(self) -> None:
        self._phase = Phase.QUEUED
        self._detail = ""
        self._assembly: Assembly | None = None
        self._waiters: Callable[[Assembly], int] = lambda _: 1

    def enter(self, phase: Phase, detail: str = "") -> None:
        """The request goes on to the next phase."""
        self._phase, self._detail, self._assembly = phase, detail, None

    def follow(self, assembly: Assembly, waiters: Callable[[Assembly], int]) -> None:
        """From now on the assembly's progress is this request's."""
        self._assembly, self._waiters = assembly, waiters

    def progress(self) -> Progress:
        """Now."""
        if self._assembly is not None:
            return self._assembly.progress(self._waiters(self._assembly))
        return Progress(self._phase, detail=self._detail)


class Cache:
    """The event loop's alone."""

    def __init__(
        self,
        core: Core,
        catalog: Catalog,
        flights: Flights,
        source: HttpSource,
        *,
        endpoint: str,
        own_pod_uid: str = "",
    ) -> None:
        self.core = core
        self.catalog = catalog
        self.flights = flights
        self._source = source
        self._endpoint = endpoint
        self._own_pod_uid = own_pod_uid
        self._assemblies: dict[object, Assembly] = {}
        self._released: dict[str, asyncio.Event] = {}
        self._access: dict[tuple[RepoId, str], float] = {}
        self._under_way: set[asyncio.Timeout] = set()
        self.stopping = False

    # Ensure

    async def ensure(self, request: EnsureRequest, watch: Watch, pod_seen: Callable[[str], bool]) -> Ready:
        """Makes the models whole on this node and leases them. Cancelling stops the wait, not the work.

        Raises CacheError.
        """
        began = time.monotonic()
        outcome, reason = "error", Reason.INTERNAL.value
        try:
            async with self._unless_stopped():
                ready = await self._ensure(request, watch, pod_seen)
            outcomes = [model.outcome for model in ready.models]
            worst = next(o for o in (Outcome.DOWNLOADED, Outcome.JOINED, Outcome.HIT) if o in outcomes)
            outcome, reason = worst.value, ""
        except asyncio.CancelledError:
            outcome, reason = "cancelled", ""
            raise
        except CacheError as error:
            reason = error.reason.value
            raise
        finally:
            seconds = time.monotonic() - began
            self.core.observe(RequestEnded(outcome, reason, seconds))
            models = [f"{model.repo_id}@{model.revision}" for model in request.models]
            level = "debug" if outcome == "hit" else "info"
            getattr(log, level)("ensured", models=models, outcome=outcome, reason=reason, seconds=round(seconds, 3))
        return ready

    @asynccontextmanager
    async def _unless_stopped(self) -> AsyncIterator[None]:
        """Whatever the request waits for, a silent Hub too: when the daemon stops, its caller is told."""
        try:
            async with asyncio.timeout(None) as scope:
                self._under_way.add(scope)
                try:
                    yield
                finally:
                    self._under_way.discard(scope)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; ask again when it is back") from error

    async def _ensure(self, request: EnsureRequest, watch: Watch, pod_seen: Callable[[str], bool]) -> Ready:
        if self.stopping:
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
        watch.enter(Phase.RESOLVING)
        token = request.token or read_token(self.core.config.hub.token_file)
        wants = await self._wants(request, token, watch)
        snapshots = [want.snapshot for want in wants]
        with self.core.use.hold(snapshots, {name for want in wants for name in want.names}):
            tallies: dict[SnapshotId, Tally] = {}
            if not all([await is_whole(self.core, want) for want in wants]):
                tallies = await self._assemble(wants, token, watch)
            for want in wants:
                if as_commit(want.revision) is None and not want.stale:
                    await self.core.point(want.snapshot.repo_id, want.revision, want.snapshot.commit)
                self.core.use.touch(want.snapshot)
            lease = await self._lease(wants, request.lease, pod_seen)
        return Ready(
            tuple(self._ready(want, tallies.get(want.snapshot)) for want in wants), lease, self.core.layout.hub
        )

    async def _wants(self, request: EnsureRequest, token: str | None, watch: Watch) -> tuple[Want, ...]:
        """Base and adapters at once: a Hub that is silent about all of them is waited for once."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._want(model, token, watch)) for model in request.models]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # the first that was refused; the others were cancelled
        return tuple(task.result() for task in tasks)

    async def _want(self, model: ModelRequest, token: str | None, watch: Watch) -> Want:
        """Repository and revision down to commit, manifest and selection."""
        policy.check_repository(self.core.config.policy, model.repo_id)
        watch.enter(Phase.RESOLVING, f"{model.repo_id}@{model.revision}")
        repo = self.core.index.repos.get(model.repo_id)  # a name alone must leave nothing behind
        cached = repo.refs.get(model.revision) if repo is not None else None
        if cached is not None and self.core.index.snapshot(SnapshotId(model.repo_id, cached)) is None:
            cached = None
        answer = await self.catalog.resolve(model.repo_id, model.revision, token, cached)
        snapshot = SnapshotId(model.repo_id, answer.commit)
        while (eviction_task := self.core.evictions.get(snapshot)) is not None:
            await asyncio.wait({eviction_task})
        known = self.core.index.snapshot(snapshot)
        record = known.record if known is not None else None
        if record is None:
            record = await self.catalog.manifest(snapshot, token, restricted=answer.restricted)
        if record.manifest.restricted:
            record = await self._check_access(record, token, hub_is_silent=answer.stale)
        selection = record.selections.get(model.profile.canonical)
        if selection is None:
            selection = await self._select(model, record.manifest, token, watch)
        policy.check_files(self.core.config.policy, model.repo_id, selection)
        return Want(record, selection, model.revision, answer.stale)

    async def _check_access(self, record: Record, token: str | None, *, hub_is_silent: bool) -> Record:
        """Who may read a restricted repository is the Hub's to say, hit or not; its last word holds in its silence."""
        repo_id, who = record.manifest.repo_id, fingerprint(token)
        checked = self._access.get((repo_id, who))
        if checked is not None and time.monotonic() - checked < ACCESS_TTL_SECONDS:
            return record
        known = who in record.readers
        if known and hub_is_silent:
            return record
        if not await self.catalog.check_access(repo_id, token, known=known):
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
            content = await self._fetch_one(want, token)
        # A hundred thousand paths against patterns take most of a second: not on the event loop.
        return await self.core.pools.on_disk(select, model.profile, manifest, content)

    async def _fetch_one(self, want: Want, token: str | None) -> bytes:
        """A single file's verified content; its blob stays for the snapshot that will want it."""
        (entry,) = want.entries.values()
        with self.core.use.hold((), want.names):
            assembly = self._assembly((want,), token, publish=False)
            with assembly.waiting():
                assert assembly.task is not None
                await asyncio.shield(assembly.task)
            path = self.core.layout.blob(want.snapshot.repo_id, entry.digest)

            def read() -> bytes:
                with open(path, "rb") as file:
                    return file.read()

            return await self.core.pools.on_disk(read)

    # Assemblies

    def _assembly(self, wants: tuple[Want, ...], token: str | None, *, publish: bool = True) -> Assembly:
        """The one running request for exactly these selections, started when there is none."""
        key = tuple((want.snapshot, want.selection.profile) for want in wants)
        assembly = self._assemblies.get(key)
        if assembly is None:
            assembly = Assembly(self.core, self.flights, self._source, self._endpoint, wants, token, publishes=publish)
            self._assemblies[key] = assembly
            assembly.task = asyncio.create_task(assembly.run(), name=f"assemble {assembly.holder}")

            def over(task: asyncio.Task[None]) -> None:
                del self._assemblies[key]
                if not task.cancelled() and (error := task.exception()) is not None and assembly.waiters == 0:
                    log.warning("background assembly failed", model=assembly.holder, why=str(error))

            assembly.task.add_done_callback(over)
        else:
            assembly.also_point(wants)
        return assembly

    async def _assemble(self, wants: tuple[Want, ...], token: str | None, watch: Watch) -> dict[SnapshotId, Tally]:
        before = self._assemblies.get(tuple((want.snapshot, want.selection.profile) for want in wants))
        assembly = self._assembly(wants, token)
        watch.follow(assembly, self.waiters)
        with assembly.waiting():
            assert assembly.task is not None
            await asyncio.shield(assembly.task)  # the wait can be cancelled, the work goes on
        if before is assembly:
            return {
                snapshot: Tally(0, tally.linked_bytes, 0, tally.started + tally.joined)
                for snapshot, tally in assembly.tallies.items()
            }
        return assembly.tallies

    def waiters(self, assembly: Assembly) -> int:
        """Callers that wait for any of the same transfers."""
        return sum(
            other.waiters
            for other in self._assemblies.values()
            if other is assembly or other.joined.keys() & assembly.joined.keys()
        )

    def _ready(self, want: Want, tally: Tally | None) -> ReadyModel:
        outcome = Outcome.HIT
        if tally is not None and tally.started:
            outcome = Outcome.DOWNLOADED
        elif tally is not None and tally.joined:
            outcome = Outcome.JOINED
        return ReadyModel(
            want.snapshot,
            want.revision,
            self.core.layout.snapshot_path(want.snapshot),
            want.selection,
            outcome,
            want.bytes_total,
            tally.fetched_bytes if tally else 0,
            tally.linked_bytes if tally else 0,
            want.stale,
        )

    # Leases

    async def _lease(self, wants: Sequence[Want], wish: LeaseWish, pod_seen: Callable[[str], bool]) -> Lease:
        """The strongest proof of use that the caller can give; in state.db before the answer leaves."""
        models = tuple(LeasedModel(want.snapshot, "" if as_commit(want.revision) else want.revision) for want in wants)
        section = self.core.config.leases
        kind, ttl = LeaseKind.TTL, min(wish.ttl or section.ttl, section.ttl)
        seconds: float | None = ttl.total_seconds()
        visible: bool = await self.core.pools.on_disk(pod_seen, wish.pod_uid) if wish.pod_uid else False
        if wish.stream:
            kind, seconds = LeaseKind.STREAM, None
        elif visible:
            kind = LeaseKind.POD
            seconds = section.max_pod_lease.total_seconds() if section.max_pod_lease else None
        pod_uid = wish.pod_uid if kind is LeaseKind.POD else ""
        holder = wish.holder or (f"pod {wish.pod_uid}" if wish.pod_uid else "")
        lease, statements = self.core.use.lease(kind, holder, models, ttl_seconds=seconds, pod_uid=pod_uid)
        await self.core.commit(*statements)
        return lease

    async def renew_lease(self, lease_id: str) -> Lease:
        """Raises CacheError(LEASE_NOT_FOUND)."""
        lease = self.core.use.renew(lease_id)
        if lease is None:
            raise CacheError(Reason.LEASE_NOT_FOUND, f"there is no lease {lease_id!r}")
        return lease

    async def release_leases(self, lease_ids: Sequence[str]) -> list[str]:
        """Ends them; those that there were."""
        there = [lease_id for lease_id in lease_ids if lease_id in self.core.use.leases]
        statements = [statement for lease_id in there for statement in self.core.use.drop(lease_id)]
        for lease_id in there:
            if (waiting := self._released.pop(lease_id, None)) is not None:
                waiting.set()
        if not any(lease.kind is LeaseKind.RECOVERED for lease in self.core.use.leases.values()):
            self.core.degraded.pop("recovered", None)
        await self.core.commit(*statements)
        return there

    @asynccontextmanager
    async def held(self, lease_id: str) -> AsyncIterator[Lease]:
        """A HoldModel stream: the lease lives as long as it does."""
        lease = self.core.use.leases.get(lease_id)
        if lease is None:
            raise CacheError(Reason.LEASE_NOT_FOUND, f"there is no lease {lease_id!r}")
        with self.core.use.stream(lease_id):
            yield lease

    async def until_released(self, lease_id: str) -> None:
        """Until somebody ends the lease; a HoldModel stream waits here."""
        if lease_id in self.core.use.leases:
            await self._released.setdefault(lease_id, asyncio.Event()).wait()

    # Looking

    def find(self, repo_id: RepoId, revision: Revision) -> Snapshot:
        """A cached snapshot by branch, tag or commit. Raises CacheError(MODEL_NOT_CACHED)."""
        repo = self.core.index.repos.get(repo_id)
        commit: Commit | None = as_commit(revision) or (repo.refs.get(revision) if repo else None)
        snapshot = repo.snapshots.get(commit) if repo and commit else None
        if snapshot is None or snapshot.state is SnapshotState.CONDEMNED:
            raise CacheError(Reason.MODEL_NOT_CACHED, f"{repo_id}@{revision} is not in the cache")
        return snapshot

    async def get(self, model: ModelRequest) -> CachedModel:
        """From the cache alone. Raises CacheError(MODEL_NOT_CACHED) unless the profile is complete and on disk."""
        snapshot = self.find(model.repo_id, model.revision)
        selection = snapshot.record.selections.get(model.profile.canonical) if snapshot.record else None
        if selection is None or snapshot.record is None:
            raise CacheError(
                Reason.MODEL_NOT_CACHED,
                f"{model.repo_id}@{model.revision} is in the cache, but not whole for {model.profile.canonical}",
            )
        if not await is_whole(self.core, Want(snapshot.record, selection, model.revision, stale=False)):
            raise CacheError(Reason.MODEL_NOT_CACHED, f"{snapshot.id} lost files on disk; ensure it to heal it")
        return self.describe([snapshot])[0]

    def describe(self, snapshots: Sequence[Snapshot]) -> list[CachedModel]:
        """As they are listed."""
        core, refs, books = self.core, self.core.refs(), eviction.shares(self.core)
        listed = []
        for snapshot in snapshots:
            repo = core.index.repo(snapshot.id.repo_id)
            blobs = [repo.blobs[digest] for digest in snapshot.digests if digest in repo.blobs]
            usage = core.use.usage.get(snapshot.id)
            listed.append(
                CachedModel(
                    snapshot.id,
                    core.layout.snapshot_path(snapshot.id),
                    tuple(core.index.revisions(snapshot.id)),
                    tuple(sorted(snapshot.record.selections)) if snapshot.record else (),
                    sum({blob.stamp.inode: blob.allocated_bytes for blob in blobs}.values()),
                    books.alone(eviction.candidate(snapshot)),
                    usage.used_at if usage else None,
                    bool(core.use.pins_on(snapshot.id, refs)),
                    tuple(lease.id for lease in core.use.leases_on(snapshot.id, refs)),
                    snapshot.state,
                )
            )
        return listed

    def page(self, after: SnapshotId | None, size: int) -> tuple[list[CachedModel], SnapshotId | None]:
        """The next snapshots in order of repository and commit, and where the page after begins."""
        ordered = sorted(self.core.index.snapshots(), key=lambda snapshot: snapshot.id)
        rest = [snapshot for snapshot in ordered if after is None or snapshot.id > after]
        chosen = rest[:size]
        return self.describe(chosen), chosen[-1].id if len(rest) > size else None

    def transfers(self) -> tuple[Transfer, ...]:
        """What is on its way."""
        return tuple(
            Transfer(a.wants[0].snapshot, a.progress(self.waiters(a)), background=a.waiters == 0)
            for a in self._assemblies.values()
            if a.publishes
        )

    async def status(self) -> Status:
        """The disk's truth at this moment."""
        core = self.core
        await core.measure("private", "root", "manifests")  # what grows by itself
        free, total = await core.pools.on_disk(free_bytes, core.layout.cache_dir)
        pinned, leased = pinned_and_leased(core)
        space = core.space
        return Status(
            budget_bytes=space.limits.budget_bytes,
            used_bytes=space.used_bytes,
            reserved_bytes=space.reserved_bytes,
            partial_bytes=space.area_bytes("partial"),
            trash_bytes=space.area_bytes("trash"),
            quarantine_bytes=space.area_bytes("quarantine"),
            pinned_bytes=pinned,
            leased_bytes=leased,
            filesystem_free_bytes=free,
            filesystem_total_bytes=total,
            min_free_bytes=space.limits.min_free_bytes,
            models=sum(1 for _ in core.index.snapshots()),
            leases=len(core.use.leases),
            transfers=self.transfers(),
            hub_dir=core.layout.hub,
            degraded=tuple(core.degraded.values()),
        )

    # Deciding

    def named(self, repo_id: RepoId, revision: Revision | None) -> list[SnapshotId]:
        """What an operator means: one snapshot, or every cached commit. Raises CacheError(MODEL_NOT_CACHED)."""
        if revision is not None:
            return [self.find(repo_id, revision).id]
        repo = self.core.index.repos.get(repo_id)
        found = sorted(s.id for s in repo.snapshots.values()) if repo else []
        if not found:
            raise CacheError(Reason.MODEL_NOT_CACHED, f"{repo_id} is not in the cache")
        return found

    async def evict(self, snapshots: Sequence[SnapshotId], *, dry_run: bool) -> list[Evicted]:
        """All or, with IN_USE, none."""
        eviction.check(self.core, snapshots)
        planned = eviction.plan_of(self.core, snapshots)
        if dry_run:
            return [Evicted(victim.id, victim.freed_bytes) for victim in planned]
        tasks = eviction.condemn(self.core, snapshots, "operator")
        freed = await asyncio.gather(*tasks)
        for snapshot in snapshots:
            self.catalog.expire(snapshot.repo_id)
        return [Evicted(victim.id, size) for victim, size in zip(planned, freed, strict=True)]

    async def pin(self, repo_id: RepoId, revision: Revision) -> list[CachedModel]:
        """Raises CacheError(MODEL_NOT_CACHED): what is not there cannot be kept."""
        snapshot = self.find(repo_id, revision)
        await self.core.commit(self.core.use.pin(repo_id, revision))
        return self.describe([snapshot])

    async def unpin(self, repo_id: RepoId, revision: Revision) -> None:
        """Raises CacheError(PIN_NOT_FOUND)."""
        statement = self.core.use.unpin(repo_id, revision)
        if statement is None:
            raise CacheError(Reason.PIN_NOT_FOUND, f"{repo_id}@{revision} is not pinned by that name")
        await self.core.commit(statement)

    def cancel(self, repo_id: RepoId, commit: Commit | None) -> int:
        """Ends running transfers of a model; how many."""
        why = CacheError(Reason.TRANSFER_CANCELLED, f"the transfer of {repo_id} was cancelled by an operator")
        cancelled = 0
        for assembly in self._assemblies.values():
            if any(w.snapshot.repo_id == repo_id and commit in (None, w.snapshot.commit) for w in assembly.wants):
                cancelled += 1
                for flight in assembly.joined.values():
                    self.flights.cancel(flight, why)
        return cancelled

    async def stop(self, patience: timedelta) -> None:
        """Ends all requests, keeping what they have."""
        self.stopping = True
        for waiting in self._released.values():
            waiting.set()
        tasks = [assembly.task for assembly in self._assemblies.values() if assembly.task is not None]
        await self.flights.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=patience.total_seconds())
            for task in late:
                task.cancel()
        for scope in list(self._under_way):
            scope.reschedule(asyncio.get_running_loop().time())

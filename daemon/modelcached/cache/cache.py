"""The heart. Read ``Cache.ensure`` from the top; each step has a module of its own.

wanting.py       what was asked, down to files (want.py)
looking.py       whether all of it is on the disk: a hit
assemblies.py    one running assembly for each set of files; assembly.py makes it whole:
verification.py  what is on the disk is believed once it was hashed
linking.py       what another repository has
turns.py         its turn to download
admission.py     space for it (sizes.py), as planning.py reckons it, or why there is none (shortage.py)
eviction.py      taking others off the disk
publication.py   showing it
background.py    what may be had for a model that nobody waits for
leasing.py       the proof of use that goes with the answer
prewarm.py       reading ahead what was asked for, when the answer has left
scrub.py         reading again what lies there; audit.py does when an operator says so
importing.py     a model that lies in another folder already
leftovers.py     what a request leaves that did not come to its end; garbage.py shows it, and all else that is no model
pacer.py         how fast space is given back that nobody waits for
shelf.py         looking, for lists and for people

State lives on the event loop and is changed only there; threads move, hash and
unlink, and report back.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import structlog

from modelcached.cache import eviction
from modelcached.cache.assemblies import Assemblies, Watch
from modelcached.cache.assembly import Tally
from modelcached.cache.audit import Audit
from modelcached.cache.core import Core
from modelcached.cache.importing import Import, Removed, check_elsewhere, remove_taken
from modelcached.cache.leasing import Leasing
from modelcached.cache.leftovers import drop_in_vain
from modelcached.cache.looking import Looking
from modelcached.cache.planning import plan
from modelcached.cache.pointing import point
from modelcached.cache.prewarm import Prewarmer
from modelcached.cache.requests import (
    CachedModel,
    EnsureRequest,
    Evicted,
    ModelRequest,
    Outcome,
    Phase,
    Plan,
    Ready,
    ReadyModel,
    Status,
    Transfer,
)
from modelcached.cache.scrub import Scrubber
from modelcached.cache.shelf import Shelf
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.cache.want import Want, missing, names_of
from modelcached.cache.wanting import Wanting
from modelcached.catalog import Catalog
from modelcached.errors import CacheError, Code, Reason
from modelcached.events import OperatorActed, RequestEnded
from modelcached.ledger.checks import Checks
from modelcached.ledger.use import Pin, PinOwner
from modelcached.model import Commit, FileEntry, RepoId, Revision, SnapshotId
from modelcached.sources import folder
from modelcached.sources.upstream import Upstream
from modelcached.transfer.flights import Flights

log = structlog.get_logger()

_CALLERS_OWN = (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.CANCELLED)
"""Told for information; for the rest the node, its disk or its network is to blame."""


class Cache:
    """The event loop's alone."""

    def __init__(
        self,
        core: Core,
        catalog: Catalog,
        flights: Flights,
        upstream: Upstream,
        checks: Checks,
        available_bytes: Callable[[], int],
    ) -> None:
        """``available_bytes``: of memory, for the page cache; called in a disk thread."""
        self.core = core
        self._catalog = catalog
        self._assemblies = Assemblies(core, flights, upstream)
        self._wanting = Wanting(core, catalog, self._assemblies)
        self._prewarmer = Prewarmer(core.pools, lambda: core.config.cache, available_bytes)
        self.leasing = Leasing(core)
        self._looking = Looking(core)
        self.scrubber = Scrubber(core, self._assemblies, checks)
        self.audit = Audit(core, self._assemblies, checks)
        self.shelf = Shelf(core, self._assemblies, self._looking, self.scrubber)
        self._under_way: set[asyncio.Timeout] = set()
        self.stopping = False

    # Ensure

    async def ensure(
        self,
        request: EnsureRequest,
        watch: Watch,
        pod_seen: Callable[[str], bool],
        source: Import | None = None,
    ) -> Ready:
        """Makes the models whole on this node and leases them. Cancelling stops the wait, not the work.

        ``source``: where they are taken from instead of upstream. Raises CacheError.
        """
        began = time.monotonic()
        outcome, reason, message, why, serious = "error", Reason.INTERNAL.value, "", "", True
        try:
            ready = await self._unless_stopped(self._ensure(request, watch, pod_seen, source))
            outcomes = [model.outcome for model in ready.models]
            worst = next(o for o in (Outcome.DOWNLOADED, Outcome.JOINED, Outcome.HIT) if o in outcomes)
            outcome, reason, serious = worst.value, "", False
        except asyncio.CancelledError:
            outcome, reason, serious = "cancelled", "", False
            raise
        except CacheError as error:
            reason, message, why = error.reason.value, error.message, error.text
            if error.reason is Reason.TOKEN_REJECTED and request.token is None:
                self.core.own_token.rejected(error)  # a transfer's answer: the next request does without
            error.is_logged = True
            own = error.entry.code in _CALLERS_OWN or (error.reason is Reason.TOKEN_REJECTED and request.token)
            serious = not own and error.reason is not Reason.SHUTTING_DOWN
            raise
        finally:
            seconds = time.monotonic() - began
            models = tuple(f"{model.repo_id}@{model.revision}" for model in request.models)
            holder = request.lease.who
            # Neither disk nor network: the folder lies.
            if source is not None and reason == Reason.DIGEST_MISMATCH.value:
                reason = Reason.INVALID_REQUEST.value
            self.core.observe(RequestEnded(outcome, reason, seconds, models, holder, request.request_id, message))
            tell = log.debug if outcome == "hit" else log.warning if serious else log.info
            tell(
                "ensured",
                models=models,
                outcome=outcome,
                reason=reason,
                why=why,
                holder=holder,
                seconds=round(seconds, 3),
            )
        return ready

    async def _unless_stopped(self, request: Coroutine[Any, Any, Ready]) -> Ready:
        """Whatever the request waits for, a silent Hub too: when the daemon stops, its caller is told."""
        scope = asyncio.timeout(None)
        self._under_way.add(scope)
        try:
            async with scope:
                return await request
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping; ask again when it is back") from error
        finally:
            self._under_way.discard(scope)

    async def _ensure(
        self, request: EnsureRequest, watch: Watch, pod_seen: Callable[[str], bool], source: Import | None
    ) -> Ready:
        if self.stopping:
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
        self.core.check_hub()
        watch.enter(Phase.RESOLVING)
        if request.wait_for_space:
            watch.for_space_until = time.monotonic() + request.wait_for_space.total_seconds()
        token = request.token or self.core.own_token.secret()
        wants = await self._wanting.wants(request.models, token, watch, source)
        with self._holding(wants):
            tallies = await self._make_whole(wants, token, watch, source)
            lease = await self.leasing.grant(wants, request.lease, pod_seen)
        if request.prewarm or (request.prewarm is None and self.core.config.cache.prewarm):
            self._prewarm(wants)
        return Ready(
            tuple(self._ready(want, tallies.get(want.snapshot)) for want in wants), lease, self.core.layout.hub
        )

    @contextmanager
    def _holding(self, wants: Sequence[Want]) -> Iterator[None]:
        """Nothing of it goes meanwhile. Where it comes to nothing, no link and no empty directory is left of it."""
        try:
            with self.core.use.hold([want.snapshot for want in wants], names_of(wants)):
                yield
        except (CacheError, asyncio.CancelledError):  # what is still being made whole is held by that
            drop_in_vain(self.core, names_of(wants))
            raise

    async def _make_whole(
        self, wants: tuple[Want, ...], token: str | None, watch: Watch, source: Import | None = None
    ) -> dict[SnapshotId, Tally]:
        """What is not on the disk, and their names; what each was made from, where it was not all there."""
        tallies: dict[SnapshotId, Tally] = {}
        sights = [await self._looking.look(want) for want in wants]
        hit = all(sight.whole for sight in sights)
        if not hit:
            if source is not None:
                lacking = [entry for want in wants for entry in missing(self.core, want).values()]
                await self.core.pools.on_disk(folder.check, source.folder, lacking)
            tallies = await self._assemblies.make_whole(wants, token, watch, source)
            await self.core.pools.on_disk(self.core.check_hub_on_disk)  # that may have taken hours
        for want, sight in zip(wants, sights, strict=True):
            if want.by_name and not want.stale and not (hit and sight.named):
                await point(self.core, want.snapshot.repo_id, want.revision, want.snapshot.commit)
        return tallies

    async def import_model(
        self, request: EnsureRequest, watch: Watch, pod_seen: Callable[[str], bool]
    ) -> tuple[Ready, Removed]:
        """As ``ensure``, from ``request.folder``; what was removed there. Raises CacheError."""
        (model,) = request.models
        found = await self.core.pools.on_disk(folder.find, request.folder, model.repo_id, model.revision)
        await self.core.pools.on_disk(check_elsewhere, found, self.core.layout.cache_dir)
        if found.commit is not None:  # what it holds is that, whatever the branch means by now
            request = replace(request, models=(replace(model, revision=Revision(found.commit)),))
        source = Import(found, moves=request.moves)
        ready = await self.ensure(request, watch, pod_seen, source)
        if not request.moves:
            return ready, Removed(0, ())
        (made,) = ready.models
        snapshot = self.core.index.snapshot(made.snapshot)
        if snapshot is None or snapshot.record is None:
            return ready, Removed(0, tuple(sorted(made.selection.paths)))
        taken = [snapshot.record.manifest.files[path] for path in sorted(made.selection.paths)]
        return ready, await uninterrupted(self._remove_taken(found, made.snapshot, taken))

    async def _remove_taken(self, found: folder.Folder, snapshot: SnapshotId, files: list[FileEntry]) -> Removed:
        with self.core.use.hold([snapshot], frozenset()):
            removed = await self.core.pools.on_hash(
                remove_taken,
                self.core.disk,
                found,
                files,
                functools.partial(self.core.layout.blob, snapshot.repo_id),
                self.core.pools.stopping,
            )
        await self.core.measure_after(snapshot.repo_id)  # whose links were the folder's too
        return removed

    async def keep(self, model: ModelRequest, watch: Watch) -> None:
        """For the model list: makes the model whole behind all who wait, and pins what it means now.

        No lease, and no use: nobody asked for it. Cancelling ends the work too, unless somebody did. Raises CacheError.
        """
        if self.stopping:
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
        token = self.core.own_token.secret()
        wants = await self._wanting.wants((model,), token, watch)
        with self._holding(wants):
            await self._make_whole(wants, token, watch)
            await self.pin(model.repo_id, model.revision, PinOwner.LIST)

    def _prewarm(self, wants: Sequence[Want]) -> None:
        """In the order of paths, which is that of shards."""
        for want in wants:
            entries = (want.entries[path] for path in sorted(want.entries))
            blobs = (self.core.layout.blob(want.snapshot.repo_id, entry.digest) for entry in entries)
            self._prewarmer.ask(want.snapshot, blobs)

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

    # Deciding

    async def evict(self, snapshots: Sequence[SnapshotId], *, dry_run: bool) -> list[Evicted]:
        """All or, with IN_USE, none."""
        there = [snapshot.id for snapshot in eviction.check(self.core, snapshots)]
        planned = eviction.plan_of(self.core, there)
        if dry_run:
            return [Evicted(victim.id, victim.freed_bytes) for victim in planned]
        freed = await self.core.until_evicted(eviction.condemn(self.core, there, "operator"))
        for snapshot in there:
            self._catalog.expire(snapshot.repo_id)
        evicted = []
        for victim, size in zip(planned, freed, strict=True):
            if isinstance(size, BaseException):
                raise size
            evicted.append(Evicted(victim.id, size))
        return evicted

    async def plan(self, models: tuple[ModelRequest, ...]) -> Plan:
        """What making them whole together would take. Asks the Hub as a request would. Raises CacheError."""
        wants = await self._wanting.wants(models, self.core.own_token.secret(), Watch())
        return await plan(self.core, wants, self._assemblies.flies)

    async def pin(self, repo_id: RepoId, revision: Revision, owner: PinOwner = PinOwner.OPERATOR) -> list[CachedModel]:
        """Raises CacheError(MODEL_NOT_CACHED): what is not there cannot be kept."""
        snapshot, pin = self.shelf.find(repo_id, revision), Pin(repo_id, revision, owner)
        was_pinned = pin in self.core.use.pins
        try:
            await self.core.commit(self.core.use.pin(pin))
        except CacheError:
            if not was_pinned:
                self.core.use.unpin(pin)
            raise
        if owner is PinOwner.OPERATOR:
            self.core.observe(OperatorActed("pinned", f"{repo_id}@{revision}"))
        return self.shelf.describe([snapshot])

    async def unpin(self, repo_id: RepoId, revision: Revision) -> bool:
        """Takes an operator's pin away; whether the model list has one of its own. Raises CacheError(PIN_NOT_FOUND)."""
        listed = Pin(repo_id, revision, PinOwner.LIST) in self.core.use.pins
        if await self.drop_pin(Pin(repo_id, revision)):
            self.core.observe(OperatorActed("unpinned", f"{repo_id}@{revision}"))
            return listed
        if listed:
            raise CacheError(
                Reason.PIN_NOT_FOUND,
                f"{repo_id}@{revision} is pinned by the model list, by nobody else",
                mend="remove its line there (models.file)",
            )
        raise CacheError(Reason.PIN_NOT_FOUND, f"{repo_id}@{revision} is not pinned by that name")

    async def drop_pin(self, pin: Pin) -> bool:
        """Whether there was one; it stays where state.db cannot be written (CacheError)."""
        statement = self.core.use.unpin(pin)
        if statement is None:
            return False
        try:
            await self.core.commit(statement)
        except CacheError:
            self.core.use.pin(pin)
            raise
        return True

    def cancel(self, repo_id: RepoId, commit: Commit | None) -> int:
        """Ends running transfers of a model; how many."""
        ended = self._assemblies.cancel(repo_id, commit)
        if ended:
            self.core.observe(OperatorActed("cancelled", f"{repo_id}@{commit}" if commit else repo_id))
        return ended

    async def release(self, lease_ids: Sequence[str]) -> list[str]:
        """Ends leases for an operator; those that there were."""
        ending = {lease_id: self.core.use.leases.get(lease_id) for lease_id in lease_ids}
        released = await self.leasing.release(lease_ids)
        for lease_id in released:
            lease = ending[lease_id]
            if lease is not None:
                first = lease.models[0].snapshot
                self.core.observe(OperatorActed("released", f"{first.repo_id}@{first.commit}", str(lease)))
        return released

    def transfers(self) -> tuple[Transfer, ...]:
        """What is on its way."""
        return self._assemblies.transfers()

    async def status(self) -> Status:
        """The disk's truth at this moment."""
        return await self.shelf.status()

    async def stop(self, patience: timedelta) -> None:
        """Ends all requests, keeping what they have."""
        self.stopping = True
        self.leasing.stop()
        self.scrubber.stop()
        await self._prewarmer.stop()
        await self._assemblies.stop(patience)
        await self.core.until_evicted(self.core.evictions.values())
        await self.core.tidied_up()
        for scope in list(self._under_way):
            scope.reschedule(asyncio.get_running_loop().time())

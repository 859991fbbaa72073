"""All running assemblies: one for each set of selections, joined by whoever asks for the same meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import structlog

from modelcached.cache.assembly import Assembly, Tally
from modelcached.cache.core import Core
from modelcached.cache.importing import Import
from modelcached.cache.requests import Phase, Progress, Transfer
from modelcached.cache.want import Want
from modelcached.errors import CacheError, Reason
from modelcached.model import Commit, Digest, RepoId, SnapshotId
from modelcached.precedence import Answer
from modelcached.sources.upstream import Upstream
from modelcached.store.disk import storage_error
from modelcached.transfer.flights import Flights

log = structlog.get_logger()


class Watch:
    """One caller's view of its request: phase and progress at any moment, however slowly it looks."""

    def __init__(self, *, background: bool = False, with_files: bool = False, answer: Answer | None = None) -> None:
        """``answer``: what goes before bytes as long as it may be a hit."""
        self.background = background
        """Nobody waits: the model list wants it, behind all who do."""
        self._with_files = with_files
        self._answer = answer
        self.for_space_until = 0.0
        """How long its caller waits for space where there is none; monotonic."""
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
        self.step_back()

    def step_back(self) -> None:
        """It is answered, or no hit: bytes need not wait for it, which may be its own."""
        if self._answer is not None:
            self._answer.end()

    @property
    def working(self) -> bool:
        """What was asked for is not all there: it is being made whole."""
        return self._assembly is not None

    def progress(self) -> Progress:
        """Now."""
        if self._assembly is not None:
            progress = self._assembly.progress(self._waiters(self._assembly))
            return replace(progress, files=self._assembly.under_way()) if self._with_files else progress
        return Progress(self._phase, detail=self._detail)


def _key(wants: tuple[Want, ...], folder: Import | None) -> object:
    """Who asks for the same shares one; who takes it from a folder fails for reasons that are nobody else's."""
    return (folder, *((want.snapshot, want.selection.profile) for want in wants))


async def _wait(assembly: Assembly, watch: Watch) -> None:
    await (assembly.attend() if watch.background else assembly.wait(watch.for_space_until))


class Assemblies:
    """The event loop's alone."""

    def __init__(self, core: Core, flights: Flights, upstream: Upstream) -> None:
        self._core = core
        self._flights = flights
        self._upstream = upstream
        self._running: dict[object, Assembly] = {}

    def _join(
        self, wants: tuple[Want, ...], token: str | None, *, publish: bool = True, folder: Import | None = None
    ) -> Assembly:
        """The one running request for exactly these selections, started when there is none."""
        key = _key(wants, folder)
        assembly = self._running.get(key)
        if assembly is None or assembly.ending or assembly.failing:
            assembly = Assembly(self._core, self._flights, self._upstream, wants, token, publish, folder)
            self._running[key] = assembly
            assembly.task = asyncio.create_task(assembly.run(), name=f"assemble {assembly.holder}")

            def over(task: asyncio.Task[None]) -> None:
                if self._running.get(key) is assembly:
                    del self._running[key]
                error = None if task.cancelled() else task.exception()
                if error is None and not task.cancelled() and (done := assembly.fetched()) is not None:
                    self._core.observe(done)
                if error is not None and not (assembly.waiters or assembly.attended or assembly.ending):
                    own_end = isinstance(error, CacheError) and error.reason is Reason.SHUTTING_DOWN
                    tell = log.debug if own_end else log.warning
                    tell("a download that nobody waits for failed", model=assembly.holder, why=str(error))

            assembly.task.add_done_callback(over)
        else:
            assembly.also_point(wants)
        return assembly

    @property
    def flying(self) -> int:
        """Blobs in flight."""
        return len(self._flights.all())

    def flies(self, digest: Digest) -> bool:
        """A blob is on its way."""
        return self._flights.has(digest)

    def begin(self, wants: tuple[Want, ...], token: str | None) -> None:
        """In the background: nobody waits for it, and a failure is only logged."""
        self._join(wants, token)

    async def make_whole(
        self, wants: tuple[Want, ...], token: str | None, watch: Watch, folder: Import | None = None
    ) -> dict[SnapshotId, Tally]:
        """Waits until every selection is published; what each was made from. Raises CacheError.

        ``folder``: where what is missing is taken from instead of upstream, unless it is on its way already.
        Cancelling stops the wait alone.
        """
        before = self._running.get(_key(wants, folder))
        assembly = self._join(wants, token, folder=folder)
        watch.follow(assembly, self.waiters)
        await _wait(assembly, watch)
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
            for other in self._running.values()
            if other is assembly or other.joined.keys() & assembly.joined.keys()
        )

    async def fetch_one(self, want: Want, token: str | None, watch: Watch, folder: Import | None = None) -> bytes:
        """A single file's verified content; its blob stays for the snapshot that will want it."""
        (entry,) = want.entries.values()
        with self._core.use.hold((), want.names):
            assembly = self._join((want,), token, publish=False, folder=folder)
            await _wait(assembly, watch)
            path = self._core.layout.blob(want.snapshot.repo_id, entry.digest)

            def read() -> bytes:
                with open(path, "rb") as file:
                    return file.read()

            try:
                return await self._core.pools.on_disk(read)
            except OSError as error:
                raise storage_error(error, f"reading {entry.path} of {want.snapshot}") from error

    def transfers(self) -> tuple[Transfer, ...]:
        """What is on its way."""
        return tuple(
            Transfer(a.wants[0].snapshot, a.progress(self.waiters(a)), background=a.waiters == 0)
            for a in self._running.values()
            if a.publishes
        )

    def cancel(self, repo_id: RepoId, commit: Commit | None) -> int:
        """Ends running transfers of a model; how many."""
        why = CacheError(Reason.TRANSFER_CANCELLED, f"the transfer of {repo_id} was cancelled by an operator")
        return sum(
            assembly.end(why)
            for assembly in list(self._running.values())
            if any(w.snapshot.repo_id == repo_id and commit in (None, w.snapshot.commit) for w in assembly.wants)
        )

    async def stop(self, patience: timedelta) -> None:
        """Ends all of them, keeping what they have."""
        tasks = [assembly.task for assembly in self._running.values() if assembly.task is not None]
        self._core.turns.stop()
        self._core.room.tell()
        await self._flights.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=patience.total_seconds())
            for task in late:
                task.cancel()

"""Making a request's snapshots whole: look, verify, link, reserve, fetch, publish.

An assembly outlives its callers: when all have gone its flights go on at
background priority, for the next pod restart will want them. Whoever asks for
the same meanwhile joins it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import structlog

from modelcached.cache.admission import admit
from modelcached.cache.callers import Caller
from modelcached.cache.core import Core
from modelcached.cache.importing import Import
from modelcached.cache.leftovers import drop_in_vain
from modelcached.cache.linking import link
from modelcached.cache.planning import to_reserve
from modelcached.cache.publication import publish
from modelcached.cache.requests import FileProgress, Phase, Progress
from modelcached.cache.rescue import make_room
from modelcached.cache.shortage import NoRoomError, check_ever_fits
from modelcached.cache.sizes import INODES_OF_FLIGHT, blob_bytes, overhead, selection_bytes
from modelcached.cache.turns import PASSING_BYTES, Turn
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.cache.verification import verify_found
from modelcached.cache.want import Want, missing, names_of
from modelcached.errors import CacheError, Reason
from modelcached.events import ModelsFetched
from modelcached.ledger.space import Amount, Reservation
from modelcached.ledger.victims import Name
from modelcached.model import Digest, FileEntry, Revision, Selection, SnapshotId, as_commit
from modelcached.sources.folder import look
from modelcached.sources.origin import LocalOrigin, Origin
from modelcached.sources.upstream import Upstream
from modelcached.store.disk import storage_error
from modelcached.transfer.flight import Flight, Stage
from modelcached.transfer.flights import Flights
from modelcached.transfer.full_disk import with_room

log = structlog.get_logger()

_RATE_WINDOW_SECONDS = 5.0
_NAMED_FILES = 16
"""More bars than that no screen has."""
_ROOM_SECONDS = 0.1
"""Leases end in heaps: who waits for space tries once for all that ended together."""


@dataclass(slots=True)
class Tally:
    """What one repository's snapshot was made from."""

    fetched_bytes: int = 0
    linked_bytes: int = 0
    started: int = 0
    joined: int = 0


@dataclass(slots=True, eq=False)
class Assembly:
    """One running request for one set of snapshots."""

    core: Core
    flights: Flights
    upstream: Upstream
    wants: tuple[Want, ...]
    token: str | None = field(repr=False)
    publishes: bool = True
    """False for a single file that is only to be read."""
    folder: Import | None = None
    """Where what is missing is taken from instead of upstream."""
    phase: Phase = Phase.QUEUED
    detail: str = ""
    waiters: int = 0
    attended: int = 0
    """Who wants it behind all who wait: the model list."""
    asked: bool = False
    """Somebody waited for it once: it goes on when they have gone, for the next pod restart will want it."""
    failing: bool = False
    """It has failed and only counts what it leaves: nobody should join it, for it would be told of that failure."""
    refusal: NoRoomError | None = None
    """While it waits for space."""
    tallies: dict[SnapshotId, Tally] = field(default_factory=dict)
    joined: dict[Digest, Flight] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    turn: Turn | None = None
    """From when it is in line until it has fetched."""
    _took_off_at: float = 0.0
    """When it had its turn and its space, monotonic; 0 before."""
    _lacks_bytes: int | None = None
    """Known to be missing, before flights say so; None while nobody has looked."""
    _callers: list[Caller] = field(default_factory=list)
    _parks: bool = False
    _points: dict[SnapshotId, set[Revision]] = field(default_factory=dict)
    _work: asyncio.Task[None] | None = None
    _ended_by: CacheError | None = None
    _resumable: dict[Digest, int] = field(default_factory=dict)
    _adopted: dict[SnapshotId, Selection] = field(default_factory=dict)
    _local: dict[tuple[SnapshotId, Digest], LocalOrigin] = field(default_factory=dict)
    """Files of this machine that may be what is missing."""
    _samples: list[tuple[float, int]] = field(default_factory=list)
    _donated: set[Name] = field(default_factory=set)
    """What lands in other repositories' names, for requests that came first, and is linked from there."""

    @property
    def holder(self) -> str:
        """For messages: the base model and how many adapters."""
        base = str(self.wants[0].snapshot)
        return base if len(self.wants) == 1 else f"{base} with {len(self.wants) - 1} adapters"

    def __post_init__(self) -> None:
        """The first caller's revisions; more may be added while it runs."""
        for want in self.wants:
            self.also_point((want,))

    # Callers

    def also_point(self, wants: tuple[Want, ...]) -> None:
        """A caller asks for the same commit by another branch or tag."""
        for want in wants:
            if as_commit(want.revision) is None and not want.stale:
                self._points.setdefault(want.snapshot, set()).add(want.revision)

    async def wait(self, for_space_until: float) -> None:
        """A caller waits for all of it: its turn and its flights come before background work.

        Where the last one goes before anything was begun, so does the assembly. ``for_space_until`` (monotonic):
        how long this caller lets others make room where there is none. Raises what ended the assembly, or the
        refusal that it did not want to wait on for. The wait can be cancelled, the work goes on.
        """
        assert self.task is not None
        caller = Caller(for_space_until)
        if self.refusal is not None and not self.refusal.modest:
            caller.tell(self.refusal)
        with self._waiting(caller):
            await asyncio.wait({self.task, caller.refused}, return_when=asyncio.FIRST_COMPLETED)
            if caller.refused.done():
                caller.refused.result()
            await asyncio.shield(self.task)

    async def attend(self) -> None:
        """As ``wait``, but behind all who do: neither its turn nor its flights hurry, and it takes modestly (admit).

        Where that wait is cancelled, and nobody ever asked for it, it ends, keeping what it has.
        """
        assert self.task is not None
        self.attended += 1
        try:
            await asyncio.shield(self.task)
        finally:
            self.attended -= 1
            if not self.task.done() and not self.waiters and not self.attended and (self._in_line or not self.asked):
                self.end(CacheError(Reason.TRANSFER_CANCELLED, f"the model list wants {self.holder} no more"))

    @contextmanager
    def _waiting(self, caller: Caller) -> Iterator[None]:
        self.waiters += 1
        self.asked = True
        self._callers.append(caller)
        if self.waiters == 1:
            self._hurry(1)
        try:
            yield
        finally:
            self.waiters -= 1
            self._callers.remove(caller)
            if self.waiters == 0:
                self._hurry(-1)
                if self._in_line and not self.attended:
                    self.end(CacheError(Reason.TRANSFER_CANCELLED, f"nobody waits for {self.holder} any more"))

    @property
    def _modest(self) -> bool:
        return self.attended > 0 and self.waiters == 0

    def _hurry(self, more: int) -> None:
        for flight in self.joined.values():
            self.flights.hurry(flight, more)
        if self.turn is not None:
            self.core.turns.hurry(self.turn, urgent=more > 0)

    def progress(self, waiters: int) -> Progress:
        """At this moment."""
        total = sum(want.bytes_total for want in self.wants)
        if self._lacks_bytes is None:
            return Progress(self.phase, total, 0, 0, waiters, self.detail)
        lacking = sum(flight.size_bytes for flight in self.joined.values()) or self._lacks_bytes
        done = total - lacking + sum(flight.done_bytes for flight in self.joined.values())
        phase, detail = self.phase, self.detail
        if phase is Phase.DOWNLOADING and all(f.stage >= Stage.VERIFYING for f in self.joined.values()):
            phase = Phase.VERIFYING
        elif self.turn is not None and not self.turn.held:
            phase, detail = Phase.QUEUED, self.core.turns.detail(self.turn)
        return Progress(phase, total, max(0, min(total, done)), self._rate(done), waiters, detail)

    def under_way(self) -> tuple[FileProgress, ...]:
        """The files that are being fetched or verified at this moment, by path; no more than _NAMED_FILES."""
        moving = {d: f for d, f in self.joined.items() if Stage.DOWNLOADING <= f.stage <= Stage.VERIFYING}
        if not moving:
            return ()
        found: dict[Digest, FileProgress] = {}
        for want in self.wants:
            for path, entry in want.entries.items():
                flight = moving.get(entry.digest)
                if flight is not None and entry.digest not in found:
                    repo_id = want.snapshot.repo_id
                    found[entry.digest] = FileProgress(repo_id, path, flight.size_bytes, flight.done_bytes)
                if len(found) == len(moving):
                    break
        return tuple(sorted(found.values(), key=lambda file: (file.repo_id, file.path))[:_NAMED_FILES])

    def _rate(self, done: int) -> int:
        now = time.monotonic()
        self._samples = [(at, size) for at, size in self._samples if now - at <= _RATE_WINDOW_SECONDS]
        if not self._samples or now - self._samples[-1][0] >= 0.2:
            self._samples.append((now, done))
        at, size = self._samples[0]
        return max(0, int((done - size) / (now - at))) if now - at >= 0.2 else 0

    # The work

    async def run(self) -> None:
        """Returns when every selection is published; raises CacheError."""
        self._work = asyncio.create_task(self._run(), name=f"work on {self.holder}")
        try:
            await self._work
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            drop_in_vain(self.core, self._names())  # unless somebody waits, who does that
            raise self._ended_by from None
        except CacheError:
            drop_in_vain(self.core, self._names())
            raise
        else:
            drop_in_vain(self.core, self._donated)  # of what has been evicted there meanwhile

    def _names(self) -> frozenset[Name]:
        return names_of(self.wants) | self._donated

    def end(self, why: CacheError) -> bool:
        """Ends it for all who wait; what others want too goes on. False when it is too late: it is being published."""
        if self._work is None or self.phase >= Phase.PUBLISHING:
            return False
        self._ended_by = why
        self._work.cancel()
        return True

    def fetched(self) -> ModelsFetched | None:
        """What it brought, when it is over; None where nothing was missing."""
        brought = [tally for tally in self.tallies.values() if tally.started or tally.linked_bytes]
        if not self.publishes or not brought:
            return None
        return ModelsFetched(
            tuple(f"{want.snapshot.repo_id}@{want.snapshot.commit}" for want in self.wants),
            sum(tally.fetched_bytes for tally in brought),
            sum(tally.linked_bytes for tally in brought),
            time.monotonic() - self.started_at,
            self._took_off_at - self.started_at if self._took_off_at else 0.0,
            background=not self.waiters,
        )

    @property
    def ending(self) -> bool:
        """It was ended and only winds down: nobody should join it."""
        return self._ended_by is not None

    async def _run(self) -> None:
        reservation: Reservation | None = None
        with contextlib.ExitStack() as held:
            held.enter_context(self.core.use.hold((want.snapshot for want in self.wants), names_of(self.wants)))
            try:
                self.phase = Phase.RESERVING
                for want in self.wants:
                    self.tallies[want.snapshot] = Tally()
                    await self.core.settled(want.snapshot.repo_id)
                    await self.core.pools.on_disk(self.core.layout.check_repo, want.snapshot.repo_id)
                    await self._verify(want)
                    await self._link(want)
                    await self._look_around(want)
                whole = sum(selection_bytes(list(want.entries.values())) for want in self.wants)
                while reservation is None:
                    may_change = self.core.room.next
                    async with self._its_turn(whole):
                        try:
                            reservation = await admit(
                                self.core, whole, self._look, self._need, self.holder, lambda: self._modest
                            )
                        except NoRoomError as error:
                            refusal = error
                        else:
                            self._took_off_at = time.monotonic()
                            self._take_off(reservation)
                            held.enter_context(self.core.use.hold((), frozenset(self._donated)))
                            self.phase = Phase.DOWNLOADING
                            self._tell_of_begin()
                            await self._land()
                    if reservation is None and self._modest == refusal.modest:
                        await self._step_aside(refusal, may_change)
                while any([await self._link(want) for want in self.wants]):
                    pass
                self.phase = Phase.PUBLISHING
                for want in self.wants if self.publishes else ():
                    await self._publish(want)
                self.phase = Phase.READY
            except OSError as error:
                raise storage_error(error, f"assembling {self.holder}") from error
            finally:
                self.failing = self.phase is not Phase.READY
                for flight in self.joined.values():
                    self.flights.leave(flight)
                self.core.forget_mended()
                try:  # what was promised for links and records is counted before the promise ends
                    repos = (want.snapshot.repo_id for want in self.wants)
                    await uninterrupted(self.core.measure_after(*repos))
                finally:
                    if reservation is not None:
                        reservation.release()

    async def _publish(self, want: Want) -> None:
        adopted, points = self._adopted.get(want.snapshot), self._points.get(want.snapshot, set())
        wanted = overhead(len(want.entries), len(want.entries)).size_bytes
        show = functools.partial(publish, self.core, want, adopted, points)
        await with_room(show, wanted, functools.partial(make_room, self.core))

    def _tell_of_begin(self) -> None:
        started = sum(tally.started for tally in self.tallies.values())
        if started and self.publishes:
            log.info(
                "fetching",
                model=self.holder,
                files=started,
                bytes=sum(flight.size_bytes for flight in self.joined.values()),
                kept_bytes=sum(self._resumable.values()),
                waiters=self.waiters,
            )

    async def _verify(self, want: Want) -> None:
        def tell(detail: str) -> None:
            self.phase, self.detail = Phase.VERIFYING, detail

        if (adopted := await verify_found(self.core, want, tell)) is not None:
            self._adopted[want.snapshot] = adopted
        self.phase, self.detail = Phase.RESERVING, ""

    async def _link(self, want: Want) -> bool:
        """Takes what another repository of the cache has; False if there was nothing to try."""

        def linked(digest: Digest, entry: FileEntry) -> None:
            if digest not in self.joined:
                self.tallies[want.snapshot].linked_bytes += entry.size_bytes

        return await link(self.core, want, linked)

    async def _look_around(self, want: Want) -> None:
        """In the folder that is imported, or in directories of this machine before upstream is asked."""
        lacking, directories = missing(self.core, want), self.core.config.sources.directories
        if not lacking or (self.folder is None and not directories):
            return

        def find() -> dict[tuple[SnapshotId, Digest], LocalOrigin]:
            repo_id, commit = want.snapshot
            folders = [self.folder.folder] if self.folder else look(directories, repo_id, Revision(commit))
            moves, found = self.folder is not None and self.folder.moves, {}
            for digest, entry in lacking.items():
                for folder in folders:
                    if (path := folder.locate(entry)) is not None:
                        found[want.snapshot, digest] = LocalOrigin(path, moves=moves and folder.holds(path))
                        break
            return found

        self._local |= await self.core.pools.on_disk(find)

    # Its turn

    @asynccontextmanager
    async def _its_turn(self, whole_bytes: int) -> AsyncIterator[None]:
        """In line, before any space is promised, until it may fetch; or little is missing, for others fetched it."""
        turns = self.core.turns
        self._lacks_bytes = self._missing_bytes()
        if self._lacks_bytes <= PASSING_BYTES:
            yield
            return
        self.turn = turns.enter(self._park, urgent=self.waiters > 0)
        try:
            await self._stand_in_line(self.turn, whole_bytes)
            if not self.turn.held:
                self._leave_line()
            yield
        finally:
            self._leave_line()

    def _leave_line(self) -> None:
        turn, self.turn = self.turn, None
        if turn is not None:
            self._park()
            self.core.turns.leave(turn)

    async def _stand_in_line(self, turn: Turn, whole_bytes: int) -> None:
        turns, lacked = self.core.turns, {want.snapshot: missing(self.core, want).keys() for want in self.wants}
        while True:
            change = turns.change
            if turns.stopping:
                raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
            if turn.held or self._missing_bytes() <= PASSING_BYTES:
                break
            check_ever_fits(self.core, whole_bytes, self.holder)  # told at once, not after hours in line
            self.phase = Phase.QUEUED
            await change.wait()
            for want in self.wants:
                await self._link(want)
            self._lacks_bytes = self._missing_bytes()
        self.phase = Phase.RESERVING
        for want in self.wants:
            self.tallies[want.snapshot].joined += len(lacked[want.snapshot] - missing(self.core, want).keys())

    @property
    def _in_line(self) -> bool:
        """It waits for its first turn, or for space: nothing of it is promised or fetched."""
        return self.refusal is not None or (self.phase is Phase.QUEUED and self.turn is not None and not self.turn.held)

    def _missing_bytes(self) -> int:
        lacking = {
            digest: entry.size_bytes for want in self.wants for digest, entry in missing(self.core, want).items()
        }
        return sum(lacking.values())

    def _park(self) -> None:
        """Its flights stand still while it is not its turn."""
        parks = self.turn is not None and not self.turn.held
        if parks != self._parks:
            self._parks = parks
            for flight in self.joined.values():
                self.flights.park(flight, 1 if parks else -1)

    # Space and flights

    async def _step_aside(self, refusal: NoRoomError, may_change: asyncio.Event) -> None:
        """Out of every line until somebody else has ended something, as long as a caller has patience for that.

        Raises the refusal when none has.
        """
        self.refusal = refusal
        self.phase, self.detail = Phase.QUEUED, f"waits for space: {refusal.message}"
        try:
            while not may_change.is_set():
                patient = [caller.until for caller in self._callers if caller.tell(refusal)]
                if not patient:
                    if refusal.modest:  # whoever asks from now on may have more than that, and begins anew
                        self._ended_by = refusal
                    raise refusal
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(patient) - time.monotonic()):
                        await may_change.wait()
            await asyncio.sleep(_ROOM_SECONDS)
        finally:
            self.refusal, self.detail = None, ""
        if self.core.turns.stopping:
            raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
        self.phase = Phase.RESERVING
        for want in self.wants:
            await self._link(want)

    async def _look(self) -> None:
        """In the line for space, where nobody else drops what an earlier try left.

        Last, what a request for another repository has brought meanwhile is linked, until there is nothing to try:
        the step of the event loop that saw so reserves and takes off, and no blob is fetched twice (invariant 2).
        """
        digests = {digest for want in self.wants for digest in want.digests}
        self._resumable = await self.core.pools.on_disk(self.core.partials.allocated_bytes, digests)
        while any([await self._link(want) for want in self.wants]):
            pass

    def _need(self) -> Amount:
        """What to reserve now: for what is missing and not in flight, and for publishing."""
        return to_reserve(self.core, self.wants, self.flights.has, self._resumable, publishes=self.publishes)

    def _for_flight(self, digest: Digest, size_bytes: int) -> Amount:
        """What a blob needs beyond the blocks that an earlier try left it."""
        return Amount(max(0, blob_bytes(size_bytes) - self._resumable.get(digest, 0)), INODES_OF_FLIGHT)

    def _take_off(self, reservation: Reservation) -> None:
        """Joins or starts a flight for each missing blob; small files first. One step of the event loop."""
        batch = self.flights.new_batch()
        for want in self.wants:
            tally = self.tallies[want.snapshot]
            repo = self.core.index.repo(want.snapshot.repo_id)
            for digest, entry in sorted(missing(self.core, want).items(), key=lambda item: item[1].size_bytes):
                flight, origins = self.flights.get(digest), self._origins(want, entry)
                if flight is None:
                    foreign = repo.blobs.get(digest)
                    if foreign is not None and foreign.foreign and foreign.path is not None:
                        origins.insert(0, LocalOrigin(foreign.path))
                    if not origins:
                        raise CacheError(
                            Reason.UPSTREAM_UNAVAILABLE,
                            f"hub.offline is set, and sources.directories have no {entry.path} of {want.snapshot}",
                        )
                    flight = self.flights.start(digest, entry.size_bytes, want.snapshot.repo_id, origins, batch)
                    self.core.landing[Name(flight.repo_id, digest)] += 1
                    flight.reservation = reservation.split(self._for_flight(digest, entry.size_bytes))
                    tally.started += 1
                else:
                    flight.also_from(origins)
                    tally.joined += 1
                    if flight.repo_id != want.snapshot.repo_id:
                        self._donated.add(Name(flight.repo_id, digest))
                if digest not in self.joined:
                    self.joined[digest] = flight
                    flight.interest += 1
                    flight.parked += self._parks
                    self.flights.hurry(flight, 1 if self.waiters else 0)

    def _origins(self, want: Want, entry: FileEntry) -> list[Origin]:
        here = self._local.get((want.snapshot, entry.digest))
        if self.folder is not None:
            return [here or LocalOrigin(f"{self.folder.folder.path}/{entry.path}")]
        local: list[Origin] = [here] if here is not None else []
        offline = self.core.config.hub.offline
        return local if offline else local + self.upstream.origins(want.snapshot, entry, self.token)

    async def _land(self) -> None:
        """Waits for all flights. The first failure ends the wait; what the others have is kept."""
        pending = {flight.done for flight in self.joined.values()}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            for landed in done:
                landed.result()
        for want in self.wants:
            tally = self.tallies[want.snapshot]
            own = {d: f for d, f in self.joined.items() if f.repo_id == want.snapshot.repo_id and d in want.digests}
            if tally.started:
                tally.fetched_bytes = sum(f.size_bytes for f in own.values() if f.origin.label != "local")

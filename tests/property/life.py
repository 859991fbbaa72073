"""One life of the daemon's parts over a directory: started as main.py starts them, ended cleanly or by a kill.

Everything of modelcached.daemon.Daemon that decides is here and real; the servers and the loops' timers are not, and
the threads are not: what would run in one runs in a later step of the event loop, how much later the test says. So a
race that was met once is met again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from modelcached.cache import Cache, Core
from modelcached.cache.account import FlightAccount
from modelcached.cache.recovery import Report, recover
from modelcached.cache.rescue import make_room
from modelcached.config import Config
from modelcached.daemon import _open_state
from modelcached.events import Event
from modelcached.ledger import database as state
from modelcached.ledger.checks import Checks
from modelcached.ledger.clock import Clock
from modelcached.ledger.space import Amount, Limits, Reservation, Space
from modelcached.ledger.use import UseLedger
from modelcached.pools import Pools, Threads
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.owner import OwnerLock, prepare
from modelcached.transfer.flights import Flights
from modelcached.transfer.movers import TransferLimits
from modelcached.transfer.pace import RateLimiter
from modelcached.upkeep.loops import LeaseKeeper
from modelcached.upkeep.pods import PodsDirectory

from tests.property.universe import Catalog, Hub, Upstream

T = TypeVar("T")
CONNECTIONS = 3
MEMORY_BYTES = 1 << 40
OWN_POD = "the-daemon"


class KilledError(BaseException):
    """The process is no more."""


@dataclass(eq=False)
class Hands:
    """Of the clock: only the test moves them."""

    seconds: float = 1000.0
    boot: int = 0


@dataclass(frozen=True)
class MovedClock(Clock):
    """A clock that stands still until it is moved."""

    hands: Hands = field(default_factory=Hands)

    def boottime(self) -> float:
        return self.hands.seconds

    def wall(self) -> float:
        return 1.7e9 + self.hands.seconds + 1e6 * self.hands.boot


class Later(Threads):
    """In the place of threads: the event loop goes on for a while, then the work is done in one piece.

    And the loop goes on again before it hears of it: who is cancelled in between never does, as with a thread.
    """

    def __init__(self, turns: Callable[[], int]) -> None:
        self._turns = turns

    async def run(self, function: Callable[[], T]) -> T:
        await self._meanwhile()
        try:
            done = function()
        except KilledError:
            await asyncio.get_running_loop().create_future()  # nothing comes after it
            raise
        except Exception:
            await self._meanwhile()
            raise
        await self._meanwhile()
        return done

    async def _meanwhile(self) -> None:
        for _ in range(self._turns()):
            await asyncio.sleep(0)

    def stop(self, *, wait: bool) -> None:
        """There is nothing to stop."""


class MortalDatabase(state.Database):
    """The real one, but for when: the event loop stands still until a transaction is written.

    What need not be waited for is written with the next that is, so that a kill costs it. And a kill keeps the
    files: SQLite itself would tidy up when the connection is closed.
    """

    def __init__(self, path: str, connection: sqlite3.Connection) -> None:
        self._path = path
        self._waiting: list[state.Statement] = []
        self._dead = False
        super().__init__(connection)

    async def write(self, *statements: state.Statement) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        if not self._dead:
            self.write_waiting()
            self._commit([state._Job(list(statements), done, loop)])
        await done

    def write_later(self, *statements: state.Statement) -> None:
        self._waiting += statements

    def write_waiting(self) -> None:
        """As the writer does in a quiet moment."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._commit([state._Job(waiting, None, None)])

    def close(self) -> None:
        self.write_waiting()
        super().close()

    def die(self) -> None:
        """What is written is written."""
        self._dead = True
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(self._path + suffix, f"{self._path}{suffix}.dead")

    def bury(self) -> None:
        """Puts it back as it was."""
        self._queue.put(None)
        self._thread.join()
        self._connection.close()
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._path}{suffix}.dead", self._path + suffix)


class WatchedSpace(Space):
    """Remembers what each admission saw."""

    def __init__(self) -> None:
        super().__init__(Limits(0, 0))
        self.seen: list[int] = []
        """Room at each look of the admission that runs."""
        self.admitted: list[tuple[int, list[int]]] = []
        """Bytes promised, and the room at each look before."""

    def room_bytes(self, free_bytes: int) -> int:
        room = super().room_bytes(free_bytes)
        self.seen.append(room)
        return room

    def reserve(self, amount: Amount, holder: str) -> Reservation:
        if amount.size_bytes:
            self.admitted.append((amount.size_bytes, self.seen))
            self.seen = []
        return super().reserve(amount, holder)


@dataclass(eq=False)
class Life:
    """From ``start`` to ``stop``, or to ``die`` and ``bury``."""

    root: str
    pods_dir: Path
    config: Config
    hub: Hub
    hands: Hands
    random: random.Random
    guard: Callable[[str, str], None]
    """Told of each disk call before it is made."""
    observe: Callable[[Event], None]
    calls: int = 0
    """Disk calls so far that change something."""
    dies_at: int | None = None
    """Before which of them."""
    dead: bool = False
    has_database: bool = False
    """It did not die before."""

    async def start(self) -> Report:
        self.died = asyncio.get_running_loop().create_future()
        self.layout = Layout(self.root)
        self.disk = Disk(self._before)
        later = Later(lambda: self.random.choice((1, 1, 1, 2, 3, 7)))
        self.pools = Pools(later, later, later, later, later)
        self.clock = MovedClock(f"boot {self.hands.boot}", self.hands)
        prepare(self.disk, self.layout)
        self.lock = OwnerLock(self.disk, self.layout)
        self.lock.acquire()
        connection, contents = _open_state(self.disk, self.layout)
        self.database = MortalDatabase(self.layout.state_db, connection)
        self.has_database = True
        pods = PodsDirectory(
            self.pods_dir,
            OWN_POD,
            boot_id=self.clock.boot_id,
            proven=contents.pods_directory,
            remember=lambda identity: self.database.write_later(state.proven_pods_directory(identity)),
        )
        grace = self.config.leases.reconnect_grace.total_seconds()
        use = UseLedger(self.database, contents, self.clock, grace)
        self.space = WatchedSpace()
        self.core = Core(
            self.config, self.layout, self.disk, self.pools, self.database, use, self.clock, self.observe,
            space=self.space,
        )  # fmt: skip
        account = FlightAccount(self.core)
        self.flights = Flights(
            pools=self.pools,
            partials=self.core.partials,
            limits=TransferLimits(CONNECTIONS, timedelta(seconds=60)),
            limiter=RateLimiter(0),
            allocating=account.allocating,
            published=account.published,
            ended=account.ended,
            make_room=functools.partial(make_room, self.core),
            observe=lambda _event: None,
        )
        catalog, upstream = Catalog(self.hub, self.core), Upstream(self.hub)
        checks = Checks(self.database, contents.checks)
        self.cache = Cache(self.core, catalog, self.flights, upstream, checks, lambda: MEMORY_BYTES)  # type: ignore[arg-type]
        self.pods = pods
        self.keeper = LeaseKeeper(self.cache, pods)
        return await recover(self.core, lost=contents.lost)

    def _before(self, operation: str, path: str) -> None:
        if self.dead:
            raise KilledError
        self.calls += 1
        if self.dies_at is not None and self.calls >= self.dies_at:
            self.die()
            raise KilledError
        self.guard(operation, path)

    @property
    def busy(self) -> bool:
        """Something goes on in the background."""
        running = self.cache._assemblies._running
        return bool(self.core.evictions or running or self.flights.all() or self.core.afterwards)

    async def rest(self) -> None:
        """Until nothing goes on."""
        async with asyncio.timeout(20):
            while self.busy:
                assemblies = [assembly.task for assembly in self.cache._assemblies._running.values()]
                flights = [flight.task for flight in self.flights.all()]
                every = (*assemblies, *flights, *self.core.evictions.values(), *self.core.afterwards)
                tasks = [task for task in every if task is not None]
                if any(not task.done() for task in tasks):
                    await asyncio.wait([task for task in tasks if not task.done()])
                await asyncio.sleep(0)

    async def stop(self) -> None:
        """A clean end."""
        self.pools.stopping.set()
        await self.cache.stop(timedelta(seconds=5))
        self.database.close()
        self.lock.release()

    def die(self) -> None:
        """From now on nothing of it changes anything."""
        self.dead = True
        if self.has_database:
            self.database.die()
        if not self.died.done():
            self.died.set_result(None)

    async def bury(self) -> None:
        """What the kernel does for a dead process."""
        me = asyncio.current_task()
        async with asyncio.timeout(20):
            while tasks := asyncio.all_tasks() - {me}:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=0.05)
        if self.has_database:
            self.database.bury()
        self.lock.release()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{number}").startswith(f"{self.root}/"):
                    os.close(int(number))

"""The inside of a daemon: all parts that main.py builds, but no sockets, no network, and no threads but the database's.

So the order of calls is the same in every run, and "before call 17" names a moment.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from modelcached.cache import Cache, Core, Watch
from modelcached.cache.account import FlightAccount
from modelcached.cache.recovery import Report, recover
from modelcached.cache.requests import EnsureRequest, LeaseWish, ModelRequest, Ready
from modelcached.cache.rescue import make_room
from modelcached.catalog import Catalog, CatalogLimits
from modelcached.config import CacheSection, Config, Size
from modelcached.ledger import database as state
from modelcached.ledger.checks import Checks
from modelcached.ledger.clock import Clock
from modelcached.ledger.use import UseLedger
from modelcached.model import Revision
from modelcached.pools import Pools, Threads
from modelcached.sources.endpoints import Endpoints
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.owner import OwnerLock, prepare
from modelcached.transfer.flights import Flights
from modelcached.transfer.movers import TransferLimits
from modelcached.transfer.pace import RateLimiter

from .world import ENDPOINT, FakeUpstream, Model, profile_of

PATIENCE = timedelta(seconds=10)
T = TypeVar("T")
Tell = Callable[[str], None]
"""To the process that waits, a line at a time."""

THIS_BOOT, ANOTHER_BOOT = "this boot", "another boot"
MAIN = Revision("main")
_UNIQUE = re.compile(r"/\d+-\d+-")


class Announcements:
    """What the seam announces, told to ``tell`` as "operation path"; at ``at`` (from 1) ``die`` is called instead."""

    def __init__(self, root: str, tell: Tell, at: int = 0, die: Callable[[], None] = lambda: None) -> None:
        self._root = root
        self._tell = tell
        self._at = at
        self._die = die
        self.count = 0

    def __call__(self, operation: str, path: str) -> None:
        self.count += 1
        if self.count == self._at:
            self._die()
        # staged and trashed names carry the process and a counter, and what lies beside the cache the cache's name
        beside = f"{self._root}.given"
        name = path.replace(beside, "given", 1) if path.startswith(beside) else os.path.relpath(path, self._root)
        self._tell(f"{operation} {_UNIQUE.sub('/*-', name)}")


class KillableDisk(Disk):
    """A kill loses nothing that was written, so that nothing here waits for the platter; the calls are announced."""

    def sync(self, descriptor: int, path: str) -> None:
        self._before("fsync", path)

    def sync_data(self, descriptor: int, path: str) -> None:
        self._before("fdatasync", path)

    def sync_directory(self, path: str) -> None:
        self._before("fsync", path)


class _AtOnce:
    """In the place of threads: what would block is done in the loop's own, between two of its steps."""

    async def run(self, function: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return function()

    def stop(self, *, wait: bool) -> None:
        """Nothing is ever under way."""


@dataclass
class Machine:
    """A started daemon's parts."""

    core: Core
    cache: Cache
    upstream: FakeUpstream
    report: Report

    async def ensure(self, model: Model, profile: str = "full", revision: str = "main") -> Ready:
        """As a workload asks for it; the upstream's branch is then at this commit."""
        name = Revision(revision)
        self.upstream.branches[name] = model.commit
        self.cache._catalog.expire(model.repo_id)
        wish = ModelRequest(model.repo_id, name, profile_of(profile))
        return await self.cache.ensure(EnsureRequest((wish,), LeaseWish()), Watch(), lambda _uid: False)

    async def move_in(self, model: Model, folder: str) -> None:
        """As an operator imports it from a folder that he gives away."""
        self.upstream.branches[MAIN] = model.commit
        self.cache._catalog.expire(model.repo_id)
        wish = ModelRequest(model.repo_id, MAIN, profile_of("full"))
        request = EnsureRequest((wish,), LeaseWish(), folder=folder, moves=True)
        await self.cache.import_model(request, Watch(), lambda _uid: False)

    async def release(self) -> None:
        """Ends every lease."""
        await self.cache.leasing.release(list(self.core.use.leases))

    async def background(self) -> None:
        """Until all is done that nobody waits for."""
        while running := [a.task for a in self.cache._assemblies._running.values() if a.task is not None]:
            await asyncio.wait(running)

    async def at_rest(self) -> int:
        """The account, when nothing is under way and state.db has been written."""
        await self.core.database.write()
        return (await self.cache.status()).used_bytes


@dataclass
class Start:
    """What a start is made from."""

    cache_dir: str
    disk: Disk
    boot_id: str = THIS_BOOT
    opened: Callable[[Layout], None] = field(default=lambda _layout: None)
    """Called when state.db is open."""


@asynccontextmanager
async def machine(start: Start) -> AsyncIterator[Machine]:
    """Started and recovered; a clean stop at the end, unless the process dies before."""
    os.umask(0o022)  # main.py does
    layout, disk = Layout(start.cache_dir), start.disk
    config = Config(
        cache=CacheSection(dir=Path(start.cache_dir), budget=Size(size_bytes=64 << 20), min_free=Size(size_bytes=0))
    )
    lock = OwnerLock(disk, layout)
    prepare(disk, layout)
    lock.acquire()
    connection = state.connect(layout.state_db)
    start.opened(layout)
    contents = state.contents(connection)
    database = state.Database(connection)
    clock = Clock(start.boot_id)
    use = UseLedger(database, contents, clock, reconnect_grace_seconds=60)
    pools = Pools(*[cast("Threads", _AtOnce())] * 5)
    core = Core(config, layout, disk, pools, database, use, clock, lambda _event: None)
    account = FlightAccount(core)
    flights = Flights(
        pools=pools,
        partials=core.partials,
        limits=TransferLimits(1, PATIENCE),
        limiter=RateLimiter(0),
        allocating=account.allocating,
        published=account.published,
        ended=account.ended,
        make_room=functools.partial(make_room, core),
        observe=lambda _event: None,
    )
    upstream = FakeUpstream({})
    catalog = Catalog(
        apis=[cast("Any", upstream)],
        endpoints=Endpoints([ENDPOINT], "questions"),
        pools=pools,
        manifests=core.manifests,
        limits=CatalogLimits(timedelta(minutes=5), PATIENCE),
        observe=lambda _call, _outcome: None,
        own_token=core.own_token,
    )
    cache = Cache(core, catalog, flights, cast("Any", upstream), Checks(database, contents.checks), lambda: 0)
    cache.scrubber.stop()
    cache.scrubber._thread = cast("Threads", _AtOnce())
    report = await recover(core, lost=contents.lost)
    yield Machine(core, cache, upstream, report)
    await cache.stop(PATIENCE)
    database.close()
    pools.stop()
    lock.release()

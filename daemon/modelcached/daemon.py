"""The composition root: configuration -> parts -> serve. Only this module builds."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import structlog

from modelcached import __version__, modellist
from modelcached.cache import Cache, Core
from modelcached.cache.account import FlightAccount
from modelcached.cache.hub import HubKeeper
from modelcached.cache.recovery import recover
from modelcached.cache.requests import CachedModel, Status
from modelcached.cache.rescan import Rescan
from modelcached.cache.rescue import make_room
from modelcached.catalog import Catalog, CatalogLimits
from modelcached.config import DEFAULT_CONFIG_FILE, Config, ConfigError, in_force, load
from modelcached.doctor import Doctor, Surroundings
from modelcached.errors import CacheError, Reason
from modelcached.events import DaemonStarted, Event, HubCalled, RequestEnded
from modelcached.ledger import database as state
from modelcached.ledger.checks import Checks
from modelcached.ledger.clock import Clock
from modelcached.ledger.history import History, Row
from modelcached.ledger.use import UseLedger
from modelcached.pools import Pools
from modelcached.service.server import Server
from modelcached.sources.endpoints import Endpoints
from modelcached.sources.http import HttpSource
from modelcached.sources.hub import HubApi
from modelcached.sources.network import Network
from modelcached.sources.upstream import Upstream
from modelcached.sources.xet import XetSource
from modelcached.store import memory
from modelcached.store.claim import Claim
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.measure import filesystem
from modelcached.store.owner import Ballast
from modelcached.telemetry import logs, page
from modelcached.telemetry.lag import LoopLag
from modelcached.telemetry.listener import Listener, Page
from modelcached.telemetry.metrics import Metrics
from modelcached.transfer.flights import Flights
from modelcached.transfer.movers import TransferLimits
from modelcached.transfer.pace import RateLimiter
from modelcached.upkeep import loops, systemd
from modelcached.upkeep.file_watch import FileWatcher
from modelcached.upkeep.hub_watch import Watch
from modelcached.upkeep.pods import PodsDirectory
from modelcached.upkeep.prefetch import Prefetcher
from modelcached.upkeep.reload import Reloader

log = structlog.get_logger()

SCRAPE_SECONDS = 10.0
T = TypeVar("T")


class Daemon:
    """All parts of one daemon, wired. Raises ConfigError."""

    def __init__(
        self,
        config: Config,
        disk: Disk | None = None,
        clock: Clock | None = None,
        claim: Claim | None = None,
        config_file: Path | None = None,
    ) -> None:
        """``claim``: to the cache, with its disk; without one it is made when the daemon starts.

        ``config_file``: where the settings come from, for who asks.
        """
        self.config = config
        self.config_file = config_file
        self.began_at = time.monotonic()
        self.network = Network.of(config.hub.ca_file, os.environ)
        self.disk = claim.disk if claim is not None else disk or Disk()
        self.layout = Layout(str(config.cache.dir))
        self.claim = claim
        self.pools = Pools.start(config.transfer.connections)
        self.clock = clock or Clock.system()
        self.tasks: list[asyncio.Task[None]] = []
        self.serving = False

    async def start(self) -> None:
        """Owns the cache, recovers it, serves. Raises CacheError, ConfigError, OSError."""
        config, loop = self.config, asyncio.get_running_loop()
        systemd.notify("STATUS=recovering the cache")
        self.claim = claim = self.claim or Claim(self.disk, str(config.cache.dir))
        connection, contents = _open_state(self.disk, self.layout)
        self.database = state.Database(connection)
        self.history = History(self.database, self.clock)
        pods = PodsDirectory(
            config.leases.kubelet_pods_dir,
            os.environ.get("POD_UID", ""),
            boot_id=self.clock.boot_id,
            proven=contents.pods_directory,
            remember=lambda identity: self.database.write_later(state.proven_pods_directory(identity)),
        )

        def status_from_thread() -> Status:
            return _from_loop(self.cache.status(), loop)

        def tasks_from_thread() -> int:
            async def count() -> int:
                return len(asyncio.all_tasks()) - 1  # without this one

            return _from_loop(count(), loop)

        self.metrics = Metrics(status_from_thread, tasks_from_thread)
        use = UseLedger(self.database, contents, self.clock, config.leases.reconnect_grace.total_seconds())
        self.core = Core(config, self.layout, self.disk, self.pools, self.database, use, self.clock, self._observe)
        self.source = HttpSource(
            network=self.network,
            stall_timeout_seconds=config.transfer.stall_timeout.total_seconds(),
            user_agent=f"modelcached/{__version__}",
        )
        account = FlightAccount(self.core)
        self.flights = Flights(
            pools=self.pools,
            partials=self.core.partials,
            limits=TransferLimits(config.transfer.connections, config.transfer.retry_timeout),
            limiter=RateLimiter(config.transfer.rate_limit),
            allocating=account.allocating,
            published=account.published,
            ended=account.ended,
            make_room=functools.partial(make_room, self.core),
            observe=self._observe,
        )
        apis = [
            HubApi(endpoint, network=self.network, version=__version__, max_files=config.hub.max_files)
            for endpoint in config.hub.endpoints
        ]
        questions, transfers = (Endpoints(config.hub.endpoints, kind) for kind in ("questions", "transfers"))
        self.xet = XetSource(
            apis,
            stall_timeout_seconds=config.transfer.stall_timeout.total_seconds(),
            enabled=config.transfer.xet,
            ca_file=config.hub.ca_file,
        )
        self.catalog = Catalog(
            apis=apis,
            endpoints=questions,
            pools=self.pools,
            manifests=self.core.manifests,
            limits=CatalogLimits(config.hub.resolve_ttl, config.hub.timeout, config.hub.offline),
            observe=lambda call, outcome: self._observe(HubCalled(call, outcome)),
            own_token=self.core.own_token,
        )
        upstream = Upstream(transfers, self.source, self.xet, self.core.own_token)
        checks = Checks(self.database, contents.checks)
        self.cache = Cache(self.core, self.catalog, self.flights, upstream, checks, memory.available_bytes)
        hub_keeper = HubKeeper(self.core, contents.hub)
        self.watch = Watch(self.core, hub_keeper, Rescan(self.core, self.flights.has), claim.at)
        self.report = await recover(self.core, lost=contents.lost, begun=claim.walker, told=systemd.recovering)
        claim.walker.close()
        await hub_keeper.look()  # before anybody is answered
        doctor = Doctor(self.core, Surroundings(apis, lambda: self.watch.why_polling, self.began_at))

        def refused() -> None:  # not for the history: one that asks in a loop would leave nothing else in it
            self.metrics.observe(RequestEnded("error", Reason.OVERLOADED.value, 0.0))

        self.server = Server(self.cache, self.history, doctor, config.server, pods.seen, self.config_file, refused)
        await self.server.start()
        self.listener = (
            Listener(config.metrics.address, self.metrics.registry, loop, lambda: self.serving, self._page(loop))
            if config.metrics.address
            else None
        )
        self._start_loops(pods)
        self.lag = LoopLag(self.metrics.registry, loop)
        self.lag.start()
        self.serving = True
        models = sum(1 for _ in self.core.index.snapshots())
        self.history.observe(DaemonStarted(__version__, models, time.monotonic() - self.began_at))
        systemd.notify("READY=1", f"STATUS=serving {self.layout.cache_dir}")
        log.info(
            "serving",
            cache_dir=self.layout.cache_dir,
            budget_bytes=self.core.space.limits.budget_bytes,
            used_bytes=self.core.space.used_bytes,
            cache_socket=str(config.server.cache_socket),
            admin_socket=str(config.server.admin_socket),
            metrics_address=config.metrics.address or None,
            metrics_port=self.listener.port if self.listener else None,
            version=__version__,
        )

    def _page(self, loop: asyncio.AbstractEventLoop) -> Callable[[], Page | None]:
        """The status page, while it is wanted."""

        async def look() -> tuple[Status, list[CachedModel], list[Row]]:
            events, _ = await self.history.newest(page.EVENTS, None, lambda _: True)
            return await self.cache.status(), await self.cache.shelf.all(), events

        def data() -> bytes:
            return page.data(*_from_loop(look(), loop), self.clock.wall())

        html = page.html()
        shown = Page(html, page.policy(html), page.shared(data))
        return lambda: shown if self.config.metrics.page else None

    def _start_loops(self, pods: PodsDirectory) -> None:
        """What happens without being asked for."""
        keeper = loops.LeaseKeeper(self.cache, pods)
        self._loop_task(loops.LEASE_SECONDS, "leases", keeper.look)
        self._loop_task(loops.LEFTOVER_SECONDS, "leftovers", lambda: loops.sweep_leftovers(self.core))
        self._loop_task(loops.WATERMARK_SECONDS, "watermarks", lambda: loops.keep_watermarks(self.core))
        teller = loops.ProgressTeller(self.cache.transfers)
        self._loop_task(loops.PROGRESS_SECONDS, "progress", teller.look)
        self._loop_task(loops.SCRUB_SECONDS, "scrub", self.cache.scrubber.look)
        self._loop_task(loops.WATCH_SECONDS, "watch", self.watch.turn)
        self._loop_task(loops.STALL_SECONDS, "stalls", lambda: loops.end_stalls(self.source))
        self._loop_task(loops.IDLE_SECONDS, "connections", lambda: loops.close_idle(self.source))
        self._loop_task(loops.XET_IDLE_SECONDS, "xet", lambda: loops.end_idle_process(self.xet, self.pools))
        self._loop_task(loops.TROUBLE_SECONDS, "troubles", loops.TroubleTeller(self.core.degraded).look)
        self.prefetcher = Prefetcher(self.cache)
        self._loop_task(loops.LIST_SECONDS, "model list", self.prefetcher.look, self.prefetcher.soon)
        self.tasks.append(asyncio.create_task(self.prefetcher.work(), name="prefetch"))
        if systemd.managed():
            at_once = asyncio.Event()
            at_once.set()
            self._loop_task(systemd.STATUS_SECONDS, "status", systemd.StatusTeller(self.cache).look, at_once)
        if (seconds := systemd.watchdog_seconds()) is not None:

            async def feed() -> None:
                systemd.notify("WATCHDOG=1")

            self._loop_task(seconds, "watchdog", feed)

    def _loop_task(self, seconds: float, name: str, work: Any, soon: asyncio.Event | None = None) -> None:
        self.tasks.append(asyncio.create_task(loops.every(seconds, name, work, self._observe, soon), name=name))

    def _observe(self, event: Event) -> None:
        self.metrics.observe(event)
        self.history.observe(event)

    def apply(self, written: Config) -> None:
        """A reload: what can change while running does; the rest is shown as what the next start brings."""
        config = in_force(self.config, written)
        disk = filesystem(self.layout.cache_dir)
        self.core.apply_limits(config.cache, disk, self.core.kubelet())  # refuses before anything has changed
        over = self.core.space.used_bytes - self.core.space.limits.budget_bytes
        if over > 0:
            log.warning("the new cache.budget is less than is used: models are evicted for it", over_bytes=over)
        self.config = self.core.config = config
        self.core.written = written
        logs.configure(config.log)
        self.flights.limiter.bytes_per_second = config.transfer.rate_limit
        self.xet.enabled = config.transfer.xet
        self.core.turns.settle()
        self.catalog.limits = CatalogLimits(config.hub.resolve_ttl, self.catalog.limits.timeout, config.hub.offline)
        self.core.use.set_grace(config.leases.reconnect_grace.total_seconds())
        self.prefetcher.soon.set()

    def configuration_refused(self, why: str) -> None:
        """Where operators look; an empty text ends it."""
        if why:
            self.core.degraded["configuration"] = why
        else:
            self.core.degraded.pop("configuration", None)

    async def stop(self) -> None:
        """Drains: progress kept, streams told, nothing left behind."""
        self.serving = False
        systemd.notify("STOPPING=1", "STATUS=stopping: what downloads have is kept")
        log.info("stopping", under_way=self.server.gate.under_way)
        self.pools.stopping.set()
        self.lag.stop()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.watch.stop()
        await self.server.drain()
        await self.cache.stop(self.config.server.drain_timeout)
        await self.server.stop()
        if self.listener is not None:
            self.listener.stop()
        await asyncio.get_running_loop().run_in_executor(None, self.database.close)
        self.source.close()
        self.xet.close()
        self.pools.stop()
        if self.claim is not None:
            self.claim.release()
        log.info("stopped")


def _from_loop(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """What it comes to on the event loop, for another thread. Raises TimeoutError, and then it goes on no more."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result(SCRAPE_SECONDS)
    except TimeoutError:
        future.cancel()
        raise


def _open_state(disk: Disk, layout: Layout) -> tuple[sqlite3.Connection, state.Contents]:
    """state.db and what is in it. Garbage is kept in quarantine for whoever wants to look, and a new one made."""
    for again in (True, False):
        try:
            connection = state.connect(layout.state_db)
            return connection, state.contents(connection)
        except state.NewerSchemaError as error:
            mend = "start the newer daemon, or remove the file"
            raise CacheError(Reason.STORAGE_ERROR, str(error), mend=mend) from error
        except sqlite3.DatabaseError as error:
            if again and state.may_be_full(error):
                Ballast(disk, layout).drop()
                continue
            if not again or not state.is_damage(error):
                raise CacheError(Reason.STORAGE_ERROR, f"{layout.state_db} cannot be opened: {error}") from error
            log.error("state.db is damaged, starting a new one", path=layout.state_db, why=str(error))  # noqa: TRY400
            for suffix in ("", "-wal", "-shm", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    disk.rename(layout.state_db + suffix, f"{layout.quarantine}/state.db{suffix}")
    raise AssertionError("the second try returns or raises")


async def serve(config: Config, config_file: Path | None, flags: dict[str, dict[str, Any]], claim: Claim) -> None:
    """Runs until SIGTERM or SIGINT. Raises CacheError, ConfigError, OSError where it cannot start."""
    logs.configure(config.log)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    watched = config_file or DEFAULT_CONFIG_FILE
    daemon = Daemon(config, claim=claim, config_file=watched if watched.exists() else None)
    await daemon.start()
    watcher = FileWatcher()

    def follow_list() -> None:
        watcher.follow("model list", daemon.config.models.file, daemon.prefetcher.soon.set)

    def apply(changed: Config) -> None:
        daemon.apply(changed)
        follow_list()

    reloader = Reloader(config, lambda: load(config_file, flags), apply, daemon.configuration_refused)
    loop.add_signal_handler(signal.SIGHUP, reloader.reload)
    if watched.parent.is_dir():
        watcher.follow("configuration", watched, reloader.reload)
    follow_list()
    try:
        await ended.wait()
    finally:
        watcher.stop()
        await daemon.stop()


def check(config: Config) -> None:
    """What a start would find wrong with the files that the settings name, and the model list. Raises ConfigError."""
    Network.of(config.hub.ca_file, os.environ)
    file = config.models.file
    try:
        if file is not None:  # a daemon starts without a list that is wrong, and says so
            modellist.read(file)
    except modellist.ModelListError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from error

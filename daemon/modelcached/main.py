"""The composition root: configuration -> parts -> serve. Only this module builds.

modelcached [--config FILE] [--cache-dir DIR] [--budget SIZE] [--hub-endpoint URL]... [--check]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import structlog
from modelcache.reasons import EXIT_USAGE

from modelcached import __version__, modellist
from modelcached.cache import Cache, Core
from modelcached.cache.account import FlightAccount
from modelcached.cache.hub import HubKeeper
from modelcached.cache.recovery import recover
from modelcached.cache.requests import Status
from modelcached.cache.rescan import Rescan
from modelcached.cache.rescue import make_room
from modelcached.catalog import Catalog, CatalogLimits
from modelcached.config import DEFAULT_CONFIG_FILE, Config, ConfigError, load
from modelcached.errors import CacheError, Reason
from modelcached.events import Event, HubCalled
from modelcached.ledger import database as state
from modelcached.ledger.checks import Checks
from modelcached.ledger.clock import Clock
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
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.measure import filesystem
from modelcached.store.owner import Ballast, OwnerLock, prepare
from modelcached.telemetry import logs
from modelcached.telemetry.lag import LoopLag
from modelcached.telemetry.listener import Listener
from modelcached.telemetry.metrics import Metrics
from modelcached.transfer.flights import Flights, TransferLimits
from modelcached.transfer.pace import RateLimiter
from modelcached.upkeep import loops, systemd
from modelcached.upkeep.file_watch import FileWatcher
from modelcached.upkeep.hub_watch import Watch
from modelcached.upkeep.pods import PodsDirectory
from modelcached.upkeep.prefetch import Prefetcher
from modelcached.upkeep.reload import Reloader

log = structlog.get_logger()

EXIT_CONFIG = 78
"""EX_CONFIG."""
SCRAPE_SECONDS = 10.0


class Daemon:
    """All parts of one daemon, wired. Raises ConfigError."""

    def __init__(self, config: Config, disk: Disk | None = None, clock: Clock | None = None) -> None:
        self.config = config
        self.network = Network.of(config.hub.ca_file, os.environ)
        self.disk = disk or Disk()
        self.layout = Layout(str(config.cache.dir))
        self.lock = OwnerLock(self.disk, self.layout)
        self.pools = Pools.start(config.transfer.connections)
        self.clock = clock or Clock.system()
        self.tasks: list[asyncio.Task[None]] = []
        self.serving = False

    async def start(self) -> None:
        """Owns the cache, recovers it, serves. Raises CacheError, ConfigError, OSError."""
        config, loop = self.config, asyncio.get_running_loop()
        systemd.notify("STATUS=recovering the cache")
        prepare(self.disk, self.layout)
        self.lock.acquire()
        connection, contents = _open_state(self.disk, self.layout)
        self.database = state.Database(connection)
        pods = PodsDirectory(
            config.leases.kubelet_pods_dir,
            os.environ.get("POD_UID", ""),
            boot_id=self.clock.boot_id,
            proven=contents.pods_directory,
            remember=lambda identity: self.database.write_later(state.proven_pods_directory(identity)),
        )

        def status_from_thread() -> Status:
            return asyncio.run_coroutine_threadsafe(self.cache.status(), loop).result(SCRAPE_SECONDS)

        def tasks_from_thread() -> int:
            async def count() -> int:
                return len(asyncio.all_tasks()) - 1  # without this one

            return asyncio.run_coroutine_threadsafe(count(), loop).result(SCRAPE_SECONDS)

        self.metrics = Metrics(status_from_thread, tasks_from_thread)
        use = UseLedger(self.database, contents, self.clock, config.leases.reconnect_grace.total_seconds())
        self.core = Core(
            config, self.layout, self.disk, self.pools, self.database, use, self.clock, self.metrics.observe
        )
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
            limits=CatalogLimits(config.hub.resolve_ttl, config.hub.timeout),
            observe=lambda call, outcome: self._observe(HubCalled(call, outcome)),
        )
        upstream = Upstream(transfers, self.source, self.xet)
        checks = Checks(self.database, contents.checks)
        self.cache = Cache(self.core, self.catalog, self.flights, upstream, checks, memory.available_bytes)
        hub_keeper = HubKeeper(self.core, contents.hub)
        self.watch = Watch(self.core, hub_keeper, Rescan(self.core, self.flights.has))
        self.report = await recover(self.core, lost=contents.lost)
        await hub_keeper.look()  # before anybody is answered
        # All modules and the whole index: they stay, and each look through them would stop every call meanwhile.
        # No look before it either: with a large cache that alone takes longer than reading its records.
        gc.freeze()
        self.server = Server(self.cache, config.server, pods.seen)
        await self.server.start()
        self.listener = (
            Listener(config.metrics.address, self.metrics.registry, loop, lambda: self.serving)
            if config.metrics.address
            else None
        )
        self._start_loops(pods)
        self.lag = LoopLag(self.metrics.registry, loop)
        self.lag.start()
        self.serving = True
        systemd.notify("READY=1", f"STATUS=serving {self.layout.cache_dir}")
        log.info(
            "serving",
            cache_dir=self.layout.cache_dir,
            budget_bytes=self.core.space.limits.budget_bytes,
            used_bytes=self.core.space.used_bytes,
            cache_socket=str(config.server.cache_socket),
            admin_socket=str(config.server.admin_socket),
            metrics_port=self.listener.port if self.listener else None,
            version=__version__,
        )

    def _start_loops(self, pods: PodsDirectory) -> None:
        """What happens without being asked for."""
        keeper = loops.LeaseKeeper(self.cache, pods)
        self._loop_task(loops.LEASE_SECONDS, "leases", keeper.look)
        self._loop_task(loops.LEFTOVER_SECONDS, "leftovers", lambda: loops.sweep_leftovers(self.core))
        self._loop_task(loops.WATERMARK_SECONDS, "watermarks", lambda: loops.keep_watermarks(self.core))
        self._loop_task(loops.SCRUB_SECONDS, "scrub", self.cache.scrubber.look)
        self._loop_task(loops.WATCH_SECONDS, "watch", self.watch.turn)
        self._loop_task(loops.STALL_SECONDS, "stalls", lambda: loops.end_stalls(self.source))
        self._loop_task(loops.IDLE_SECONDS, "connections", lambda: loops.close_idle(self.source))
        self._loop_task(loops.XET_IDLE_SECONDS, "xet", lambda: loops.end_idle_process(self.xet, self.pools))
        self.prefetcher = Prefetcher(self.cache)
        self._loop_task(loops.LIST_SECONDS, "model list", self.prefetcher.look, self.prefetcher.soon)
        self.tasks.append(asyncio.create_task(self.prefetcher.work(), name="prefetch"))
        if (seconds := systemd.watchdog_seconds()) is not None:

            async def feed() -> None:
                systemd.notify("WATCHDOG=1")

            self._loop_task(seconds, "watchdog", feed)

    def _loop_task(self, seconds: float, name: str, work: Any, soon: asyncio.Event | None = None) -> None:
        self.tasks.append(asyncio.create_task(loops.every(seconds, name, work, self._observe, soon), name=name))

    def _observe(self, event: Event) -> None:
        self.metrics.observe(event)

    def apply(self, config: Config) -> None:
        """A reload: what can change while running does."""
        disk = filesystem(self.layout.cache_dir)
        self.core.apply_limits(config.cache, disk, self.core.kubelet())  # refuses before anything has changed
        self.config = self.core.config = config
        logs.configure(config.log)
        self.flights.limiter.bytes_per_second = config.transfer.rate_limit
        self.xet.enabled = config.transfer.xet
        self.core.turns.settle()
        self.catalog.limits = CatalogLimits(config.hub.resolve_ttl, self.catalog.limits.timeout)
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
        systemd.notify("STOPPING=1", "STATUS=draining")
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
        self.lock.release()
        log.info("stopped")


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


async def serve(config: Config, config_file: Path | None, flags: dict[str, dict[str, Any]]) -> None:
    """Runs until SIGTERM or SIGINT."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    daemon = Daemon(config)
    await daemon.start()
    watcher = FileWatcher()

    def follow_list() -> None:
        watcher.follow("model list", daemon.config.models.file, daemon.prefetcher.soon.set)

    def apply(changed: Config) -> None:
        daemon.apply(changed)
        follow_list()

    reloader = Reloader(config, lambda: load(config_file, flags), apply, daemon.configuration_refused)
    loop.add_signal_handler(signal.SIGHUP, reloader.reload)
    watched = config_file or DEFAULT_CONFIG_FILE
    if watched.parent.is_dir():
        watcher.follow("configuration", watched, reloader.reload)
    follow_list()
    try:
        await ended.wait()
    finally:
        watcher.stop()
        await daemon.stop()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """With the clients' exit status for a command line that cannot be obeyed."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="modelcached",
        description="Owns this node's LLM model cache: downloads once, verifies, shares, evicts against a budget.",
        epilog="Every setting is also MODELCACHED_SECTION__KEY in the environment; see docs/configuration.md.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file (default {DEFAULT_CONFIG_FILE})")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache.dir")
    parser.add_argument("--budget", metavar="SIZE", help="cache.budget, such as 500GB or 80%%")
    parser.add_argument("--hub-endpoint", action="append", metavar="URL", help="hub.endpoints; may be repeated")
    parser.add_argument("--check", action="store_true", help="check the settings, print them as JSON, and exit")
    parser.add_argument("--version", action="version", version=f"modelcached {__version__}")
    return parser


def _flags(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {}
    if arguments.cache_dir is not None:
        # Empty (an unset variable of a script) is no directory, least of all this one.
        given.setdefault("cache", {})["dir"] = arguments.cache_dir and os.path.abspath(arguments.cache_dir)
    if arguments.budget is not None:
        given.setdefault("cache", {})["budget"] = arguments.budget
    if arguments.hub_endpoint:
        given["hub"] = {"endpoints": arguments.hub_endpoint}
    return given


def _check_model_list(config: Config) -> None:
    file = config.models.file
    try:
        if file is not None:
            modellist.read(file)
    except modellist.ModelListError as error:
        raise ConfigError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``modelcached``; the exit status."""
    given = _parser().parse_args(arguments)
    flags = _flags(given)
    try:
        config = load(given.config, flags)
        Network.of(config.hub.ca_file, os.environ)
        if given.check:  # a daemon starts without a list that is wrong, and says so
            _check_model_list(config)
    except ConfigError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"modelcached: {line}\n")
        return EXIT_CONFIG
    if given.check:
        sys.stdout.write(json.dumps(config.effective(), indent=2) + "\n")
        return 0
    logs.configure(config.log)
    # A directory has its mode from its first moment: one that was made under a narrower mask, by a daemon that was
    # killed before it could set the mode, would stay unreadable to workloads for ever.
    os.umask(0o022)
    try:
        asyncio.run(serve(config, given.config, flags))
    except CacheError as error:
        log.error("cannot start", reason=error.reason.value, why=error.text)  # noqa: TRY400
        return error.entry.exit_status
    except OSError as error:
        log.error("cannot start", why=str(error))  # noqa: TRY400
        return 74
    return 0


if __name__ == "__main__":
    sys.exit(main())

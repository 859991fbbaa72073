"""What happens without being asked for: each loop is a plain coroutine that survives its own errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import structlog

from modelcached.cache import Cache, Core
from modelcached.cache.core import PODS_DIRECTORY
from modelcached.cache.eviction import condemn, plan
from modelcached.cache.leftovers import drop_leftovers
from modelcached.cache.requests import Transfer
from modelcached.events import Observer, UpkeepRan
from modelcached.ledger.leases import LeaseKind, PodWitness
from modelcached.ledger.space import NOTHING, Amount
from modelcached.model import SnapshotId
from modelcached.pools import Pools
from modelcached.sources.http import HttpSource
from modelcached.sources.xet import XetSource
from modelcached.units import format_size
from modelcached.upkeep.pods import PodsDirectory

log = structlog.get_logger()

LEASE_SECONDS = 2.0
"""A pod's lease ends after two looks without its directory: within 10 s of its going."""
LEFTOVER_SECONDS = 60.0
WATERMARK_SECONDS = 5.0
SCRUB_SECONDS = 5.0
"""How soon the scrub sees that something is due."""
TROUBLE_SECONDS = 1.0
WATCH_SECONDS = 0.5
STALL_SECONDS = 1.0
IDLE_SECONDS = 10.0
"""A connection that was not used for so long is closed."""
PROGRESS_SECONDS = 10.0
LIST_SECONDS = 5.0
"""Where the model list's file cannot be watched, and for what could not be done the last time."""
XET_IDLE_SECONDS = 2.0
"""The process for Xet: between two files of a model, not between two models."""


async def every(
    seconds: float,
    name: str,
    work: Callable[[], Awaitable[None]],
    observe: Observer,
    soon: asyncio.Event | None = None,
) -> None:
    """For ever, and at once when ``soon`` is set; an error is logged and counted, and the next turn tries again."""
    soon = soon or asyncio.Event()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await soon.wait()
        soon.clear()
        outcome = "error"
        try:
            await work()
            outcome = "ok"
        except Exception:
            log.exception("upkeep failed, will try again", loop=name)
        finally:
            observe(UpkeepRan(name, outcome))


async def close_idle(source: HttpSource) -> None:
    """Gives back connections to upstream that no transfer uses any more."""
    source.close(idle_seconds=IDLE_SECONDS)


async def end_idle_process(xet: XetSource, pools: Pools) -> None:
    """Gives back the memory of the process for Xet; in a thread, for that takes a moment."""
    if xet.idles:
        await pools.on_flush(lambda: xet.close(idle_seconds=XET_IDLE_SECONDS))


async def end_stalls(source: HttpSource) -> None:
    """Ends fetches that bring next to nothing."""
    source.stalls.look()


class LeaseKeeper:
    """Ends leases whose time is up or whose pod is proven gone."""

    def __init__(self, cache: Cache, pods: PodsDirectory) -> None:
        self._cache = cache
        self._pods = pods
        self._witness = PodWitness()
        self._witness_healthy = True

    async def look(self) -> None:
        """Once."""
        use = self._cache.core.use
        ended: dict[str, str] = {}
        pods = {lease.pod_uid for lease in use.leases.values() if lease.kind is LeaseKind.POD}
        healthy = True  # nobody needs the witness
        if pods:
            seen = await self._cache.core.pools.on_disk(self._pods.look, frozenset(pods))
            healthy = seen.healthy
            gone = self._witness.look(seen, pods)
            ended = {lease.id: "its pod has gone" for lease in use.leases.values() if lease.pod_uid in gone}
        # Judged in the step that ends them: a stream that came back while we looked keeps its lease.
        ended |= {lease.id: "its time is up" for lease in use.expired()}
        self._tell(healthy=healthy)
        for lease_id, why in ended.items():
            lease = use.leases.get(lease_id)
            if lease is not None:
                log.info("lease ended", lease=lease_id, kind=lease.kind.value, holder=lease.holder, why=why)
        await self._cache.leasing.release(list(ended))

    def _tell(self, *, healthy: bool) -> None:
        """Whether absence means anything, where operators look."""
        topic, degraded = PODS_DIRECTORY, self._cache.core.degraded
        if healthy:
            degraded.pop(topic, None)
        else:
            degraded[topic] = f"{self._pods.path} shows no pod that is known to be there: pod leases do not end"
        if healthy != self._witness_healthy:
            self._witness_healthy = healthy
            log.info("pods directory", healthy=healthy, directory=str(self._pods.path))  # degraded tells the rest


class TroubleTeller:
    """A line for each trouble that comes or goes, whatever found it: who reads logs sees no status."""

    def __init__(self, degraded: Mapping[str, str]) -> None:
        self._degraded = degraded
        self._told: set[str] = set()

    async def look(self) -> None:
        """Once."""
        now = dict(self._degraded)
        for topic in sorted(now.keys() - self._told):
            log.warning("degraded", topic=topic, why=now[topic])
        for topic in sorted(self._told - now.keys()):
            log.info("no longer degraded", topic=topic)
        self._told = set(now)


class ProgressTeller:
    """A line for each model that has been on its way for a while: logs are read where nobody sees a bar."""

    def __init__(self, transfers: Callable[[], tuple[Transfer, ...]]) -> None:
        self._transfers = transfers
        self._before: set[SnapshotId] = set()

    async def look(self) -> None:
        """Once; of what was on its way at the last look, too."""
        transfers = self._transfers()
        for transfer in transfers:
            if transfer.snapshot not in self._before:
                continue
            progress = transfer.progress
            log.info(
                "progress",
                model=str(transfer.snapshot),
                phase=progress.phase.name.lower(),
                bytes_done=progress.bytes_done,
                bytes_total=progress.bytes_total,
                bytes_per_second=progress.bytes_per_second,
                waiters=progress.waiters,
                background=transfer.background,
                detail=progress.detail,
            )
        self._before = {transfer.snapshot for transfer in transfers}


async def sweep_leftovers(core: Core) -> None:
    """Removes unfinished data that nobody has asked for within ``partial_ttl``."""
    if core.hub_trouble:
        return
    async with core.admission:
        await drop_leftovers(core, None, expired_only=True)
    await core.look_for_kubelet()
    await core.pools.on_disk(core.ballast.fill)  # an earlier full disk may have cost it
    await core.measure("private")


async def keep_watermarks(core: Core) -> None:
    """Evicts in the background, so that a waiting pod rarely waits for deletion, and when others fill the disk."""
    limits, section = core.space.limits, core.config.cache
    disk = await core.filesystem()
    core.room.tell()  # others on the filesystem may have given something up, which nobody else says
    over = core.space.used_bytes + core.space.reserved_bytes - int(limits.budget_bytes * section.high_watermark)
    wanted = 0
    if over > 0:
        wanted = over + int(limits.budget_bytes * (section.high_watermark - section.low_watermark))
    short = limits.min_free_bytes - disk.free_bytes
    short_inodes = 0 if disk.free_inodes is None else max(0, limits.min_free_inodes - disk.free_inodes)
    topic = "min_free"
    if short > 0:
        core.degraded[topic] = (
            f"the filesystem has {format_size(disk.free_bytes)} free, cache.min_free is "
            f"{format_size(limits.min_free_bytes)}: nothing new is admitted"
        )
    elif short_inodes > 0:
        core.degraded[topic] = (
            f"the filesystem has {disk.free_inodes} inodes free, {limits.min_free_inodes} are kept: "
            "nothing new is admitted"
        )
    else:
        core.degraded.pop(topic, None)
    if core.space.used_bytes > limits.budget_bytes:
        core.degraded["budget"] = (
            f"the cache uses {format_size(core.space.used_bytes)}, cache.budget is {format_size(limits.budget_bytes)}: "
            "nothing new is admitted; raise it, or unpin, release and evict"
        )
    else:
        core.degraded.pop("budget", None)
    core.pacer.set_urgent(short > 0 or short_inodes > 0)
    lacking = Amount(max(wanted, short, 0), short_inodes)
    # Who is in line evicts for itself, and what is going already may be enough.
    if NOTHING.covers(lacking) or core.admission.locked() or core.evictions or core.hub_trouble:
        return
    victims, freed = plan(core, lacking)
    if freed.inodes < lacking.inodes:  # a model has few: all of them would go, and help nobody
        victims, freed = plan(core, replace(lacking, inodes=0))
    if victims:
        log.info(
            "evicting in the background",
            wanted_bytes=lacking.size_bytes,
            wanted_inodes=lacking.inodes,
            frees_bytes=freed.size_bytes,
            models=len(victims),
        )
        condemn(core, [victim.id for victim in victims], "watermark", leisurely=True)

"""What all parts of the cache share: its stores, its beliefs, its books. Built once, by main."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from modelcached.cache.branches import Branches
from modelcached.cache.locks import Locks
from modelcached.cache.pacer import Pacer
from modelcached.cache.requests import Listed
from modelcached.cache.room import Room
from modelcached.cache.turns import Turns
from modelcached.config import LEAST_BUDGET_BYTES, CacheSection, Config
from modelcached.errors import CacheError, Reason
from modelcached.events import Observer
from modelcached.ledger.clock import Clock
from modelcached.ledger.database import Database, Statement
from modelcached.ledger.space import Amount, Limits, Space
from modelcached.ledger.use import UseLedger
from modelcached.ledger.victims import Name
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, repo_folder
from modelcached.pools import Pools
from modelcached.sources.own_token import OwnToken
from modelcached.store.disk import Disk
from modelcached.store.index import Index
from modelcached.store.layout import Layout
from modelcached.store.manifests import ManifestStore
from modelcached.store.measure import Filesystem, filesystem, measure
from modelcached.store.neighbours import KUBELET_DIRECTORIES, kubelet_directory
from modelcached.store.owner import Ballast
from modelcached.store.partials import PartialStore
from modelcached.store.snapshots import SnapshotStore
from modelcached.units import format_size

log = structlog.get_logger()

KUBELET_DELETES_BELOW = 0.15
"""Share of the filesystem that is free: imageGCHighThresholdPercent is 85, imagefs.available 15 %."""
_BAD_BLOB = "bad blob "
PODS_DIRECTORY = "pods directory"
"""The topic of what is degraded while the kubelet's pods directory does not show what is there."""
KUBELET_WANTS_INODES = 0.06
"""Share of the filesystem's inodes that is left free beside it: it evicts pods below 5 % (nodefs.inodesFree)."""
SET_ASIDE_BYTES = LEAST_BUDGET_BYTES // 2
"""state.db and its WAL may grow by this without asking."""
SET_ASIDE_INODES = 16
"""The daemon's own files: those of SQLite, the ballast, what is written before it takes another's place."""


def _no_hub(why: str) -> CacheError:
    mend = "put the old one back; or restart its readers, and end leases that stay with cachectl release"
    return CacheError(Reason.STORAGE_ERROR, why, mend=mend)


@dataclass(slots=True, eq=False)
class Core:
    """One cache directory and all that is known of it. The event loop's alone."""

    config: Config
    layout: Layout
    disk: Disk
    pools: Pools
    database: Database
    use: UseLedger
    clock: Clock
    observe: Observer
    index: Index = field(default_factory=Index)
    space: Space = field(default_factory=lambda: Space(Limits(0, 0)))
    evictions: dict[SnapshotId, asyncio.Task[int]] = field(default_factory=dict)
    """Condemned snapshots, until their last trace is gone."""
    unremovable: dict[SnapshotId, float] = field(default_factory=dict)
    """Could not be evicted, and until when (monotonic) others are chosen for it."""
    admission: asyncio.Lock = field(default_factory=asyncio.Lock)
    """The line for space: first come, first served."""
    pacer: Pacer = field(init=False)
    """How fast evictions go on that nobody waits for."""
    rescues: int = 0
    """How often room was made for what met a full disk."""
    room: Room = field(default_factory=Room)
    """Tells those who wait for space that there may be more."""
    degraded: dict[str, str] = field(default_factory=dict)
    """What is not as it should be, by topic."""
    written: Config | None = None
    """The settings as they were last read, where some of them wait for the next start."""
    hub_at: tuple[int, int] | None = None
    """Device and inode of the hub/ that workloads have mounted; None until somebody has looked."""
    hub_trouble: str = ""
    """Why nothing is served: hub/ is missing, or is not that directory."""
    branches: Branches = field(default_factory=Branches)
    listed: Callable[[], tuple[Listed, ...]] = tuple
    """How the models of the model list stand."""
    turns: Turns = field(init=False)
    """The line for downloading."""
    measuring: Locks[str] = field(default_factory=Locks)
    """Held while an area is looked at, or while something must not be seen half done there."""
    verifying: Locks[Name] = field(default_factory=Locks)
    """One at a time judges a blob."""
    publishing: Locks[SnapshotId] = field(default_factory=Locks)
    """One at a time changes what a snapshot holds."""
    landing: Counter[Name] = field(default_factory=Counter)
    """What flights publish: whoever waits for one may have asked for another repository, or have gone."""
    removing: Locks[RepoId] = field(default_factory=Locks)
    """One at a time takes something out of a repository: the last to go takes the directories with it. An eviction
    may pause in it; others enter by ``taking_from``."""
    partials: PartialStore = field(init=False)
    manifests: ManifestStore = field(init=False)
    snapshots: SnapshotStore = field(init=False)
    ballast: Ballast = field(init=False)
    own_token: OwnToken = field(init=False)
    afterwards: set[asyncio.Task[None]] = field(default_factory=set)
    """What is tidied up behind requests and flights that have their answer."""
    _neighbour: str | None = None
    """The directory of the kubelet's that the limits were made for."""

    def __post_init__(self) -> None:
        """The stores share the disk's seam and the layout; the limits are those of the settings in force."""
        self.space.freed = self.use.freed = self.room.tell
        self.turns = Turns(lambda: self.config.transfer.models)
        self.pacer = Pacer(lambda: self.config.cache.evict_rate)
        self.partials = PartialStore(self.disk, self.layout, self.clock.boot_id)
        self.manifests = ManifestStore(self.disk, self.layout)
        self.snapshots = SnapshotStore(self.disk, self.layout)
        self.ballast = Ballast(self.disk, self.layout)
        self.own_token = OwnToken(lambda: self.config.hub.token_file, functools.partial(self._tell_degraded, "token"))

    def _tell_degraded(self, topic: str, why: str) -> None:
        if why:
            self.degraded[topic] = why
        else:
            self.degraded.pop(topic, None)

    # Space

    def apply_limits(self, section: CacheSection, disk: Filesystem, kubelet: str | None) -> None:
        """Budget and free space as configured. Raises CacheError, and changes nothing, where they cannot be.

        ``kubelet``: a directory of its on the same filesystem.
        """
        budget = section.budget.of(disk.size_bytes)
        if budget < LEAST_BUDGET_BYTES:
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"cache.budget is {format_size(budget)}; the daemon itself needs {format_size(LEAST_BUDGET_BYTES)}",
                mend="raise it",
            )
        min_free = section.min_free_bytes(disk.size_bytes, beside_kubelet=kubelet is not None)
        least = int(disk.size_bytes * KUBELET_DELETES_BELOW)
        if kubelet is not None and min_free < least:
            log.warning(
                "cache.min_free is below what the kubelet wants on the same filesystem: it will delete images",
                directory=kubelet,
                min_free_bytes=min_free,
                kubelet_wants_bytes=least,
            )
        beside = int((disk.inodes or 0) * KUBELET_WANTS_INODES) if kubelet is not None else 0
        self.space.limits = Limits(budget, min_free, SET_ASIDE_BYTES, max(SET_ASIDE_INODES, beside))
        self._neighbour = kubelet

    async def look_for_kubelet(self) -> None:
        """One that came after we did, or went, changes what is left to it."""
        kubelet = await self.pools.on_disk(self.kubelet)
        if (kubelet is None) == (self._neighbour is None):
            return
        self.apply_limits(self.config.cache, await self.filesystem(), kubelet)
        kept = self.space.limits.min_free_bytes
        log.info("the kubelet came or went on the cache's filesystem", directory=kubelet or "", min_free_bytes=kept)

    def kubelet(self) -> str | None:
        """A directory of the kubelet or its container runtime on the cache's filesystem. Blocking."""
        pods = self.config.leases.kubelet_pods_dir
        return kubelet_directory(self.layout.cache_dir, [*([str(pods)] if pods else []), *KUBELET_DIRECTORIES])

    async def filesystem(self) -> Filesystem:
        """The one that holds the cache, now."""
        return await self.pools.on_disk(filesystem, self.layout.cache_dir)

    def room_on(self, disk: Filesystem) -> Amount:
        """What can still be promised; negative when already over."""
        return Amount(self.space.room_bytes(disk.free_bytes), self.space.room_inodes(disk.free_inodes))

    def areas(self) -> Mapping[str, tuple[str, frozenset[str]]]:
        """The fixed areas of the account: name -> path, and what below it belongs to another area."""
        layout = self.layout
        inner = {"partial": layout.partial, "trash": layout.trash, "quarantine": layout.quarantine}
        inner |= {"staging": layout.staging, "manifests": layout.manifests}
        return {
            **{name: (path, frozenset[str]()) for name, path in inner.items()},
            "private": (layout.private, frozenset(inner.values())),
            "root": (layout.cache_dir, frozenset({layout.hub, layout.private})),
        }

    async def measure(self, *names: str) -> None:
        """Brings the account of those areas up to what is on the disk; a repository's area is its folder's name."""
        fixed = self.areas()
        for name in names:
            path, skip = fixed.get(name, (f"{self.layout.hub}/{name}", frozenset[str]()))
            async with self.measuring(name):  # a slow look must not overwrite a later one
                self.space.begin_look(name)
                sizes, unseen = await self.pools.on_disk(self._measure, path, skip)
                self.space.set_area(name, sizes, keep=unseen is not None)
                self._tell_unseen(name, unseen)

    def _measure(self, path: str, skip: frozenset[str]) -> tuple[dict[int, int], OSError | None]:
        """Blocking. What is mounted there, or below, is not the cache's."""
        return measure(path, skip=skip, device=os.stat(self.layout.cache_dir).st_dev)

    def _tell_unseen(self, name: str, error: OSError | None) -> None:
        topic = f"account of {name}"
        if error is None:
            self.degraded.pop(topic, None)
            return
        if topic not in self.degraded:
            log.error("cannot look at the disk, counting what was there before", area=name, why=str(error))
        self.degraded[topic] = f"{error}: counted as it was before"

    async def measure_hub_alone(self) -> None:
        """The directory itself, which grows with what lies in it."""
        sizes, unseen = await self.pools.on_disk(measure, self.layout.hub, deep=False)
        self.space.set_area("hub", sizes, keep=unseen is not None)

    async def measure_after(self, *repos: RepoId) -> None:
        """What a change to repositories touches."""
        names = [repo_folder(repo_id) for repo_id in set(repos)]
        await self.measure(*names, "partial", "staging", "trash", "quarantine", "manifests", "private")
        await self.measure_hub_alone()

    def tidy_up(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Begins what nobody waits for but the daemon's end: an answer does not wait for it, nor is it cancelled."""
        task = asyncio.create_task(work, name=name)
        self.afterwards.add(task)
        task.add_done_callback(self.afterwards.discard)

    async def tidied_up(self) -> None:
        """Until all that was begun so far has come to its end."""
        if self.afterwards:
            await asyncio.wait(set(self.afterwards))

    def lands_in(self, repo_id: RepoId) -> bool:
        """A flight is about to publish a blob there."""
        return any(name.repo_id == repo_id for name in self.landing)

    def needs_unfinished(self, digest: Digest) -> bool:
        """A request is about to use what there is of the blob, or a flight about to publish it though all have gone."""
        return self.use.held(digest) or any(name.digest == digest for name in self.landing)

    # hub/

    def hub_is_ours(self) -> bool:
        """hub/ is at this moment the directory that workloads have mounted. Blocking."""
        try:
            status = os.lstat(self.layout.hub)
        except OSError:
            return False
        return self.hub_at in (None, (status.st_dev, status.st_ino))

    def check_hub(self) -> None:
        """Refuses (STORAGE_ERROR) to serve from, or change, a hub/ that is not the one that workloads see."""
        if self.hub_trouble:
            raise _no_hub(self.hub_trouble)

    def check_hub_on_disk(self) -> None:
        """The same in the moment before the watch has seen it. Blocking."""
        if not self.hub_is_ours():
            raise _no_hub(f"{self.layout.hub} is missing, or another directory than it was")

    # Use

    def refs(self) -> Mapping[RepoId, dict[Revision, Commit]]:
        """What each branch and tag points to now."""
        return {repo_id: repo.refs for repo_id, repo in self.index.repos.items()}

    async def commit(self, *statements: Statement) -> None:
        """Writes to state.db before an answer leaves. On a full disk the ballast is given up for it first."""
        if not statements:
            return
        try:
            await self.database.write(*statements)
        except sqlite3.Error:
            with contextlib.suppress(OSError):  # a disk that takes nothing at all: told below
                await self.pools.on_disk(self.ballast.drop)
            try:
                await self.database.write(*statements)
            except sqlite3.Error as error:
                self.degraded["state.db"] = f"state.db cannot be written: {error}"
                raise CacheError(Reason.STORAGE_ERROR, f"{self.layout.state_db} cannot be written: {error}") from error
        self.degraded.pop("state.db", None)

    # Blobs that went bad under a lease

    def tell_bad(self, repo_id: RepoId, digest: Digest, text: str) -> None:
        """Where operators look, until it is mended."""
        self.degraded[f"{_BAD_BLOB}{repo_id} {digest.hex}"] = text

    def forget_mended(self) -> None:
        """Those whose place a right one has taken, or that no snapshot has any more."""
        for topic in [topic for topic in self.degraded if topic.startswith(_BAD_BLOB)]:
            name, text = topic.removeprefix(_BAD_BLOB).split(" ")
            repo, digest = self.index.repos.get(RepoId(name)), Digest.parse(text)
            blob = repo.blobs.get(digest) if repo is not None and digest is not None else None
            wanted = repo is not None and any(digest in snapshot.digests for snapshot in repo.snapshots.values())
            if blob is None or blob.verified or not wanted:
                del self.degraded[topic]

    # Order

    @contextlib.asynccontextmanager
    async def taking_from(self, repo_id: RepoId) -> AsyncIterator[None]:
        """Nobody else takes anything out of the repository; an eviction that does is waited for, and hurries."""
        with contextlib.ExitStack() as waiting:
            if self.removing.is_held(repo_id):
                waiting.enter_context(self.pacer.hurried())
            async with self.removing(repo_id):
                waiting.close()
                yield

    async def until_evicted(self, evictions: Iterable[asyncio.Task[int]]) -> list[int | BaseException]:
        """What each freed, or why it failed. Who gives up waiting ends none of them."""
        tasks = list(evictions)
        if tasks:
            with self.pacer.hurried():
                await asyncio.wait(tasks)
        return [task.exception() or task.result() for task in tasks]

    async def settled(self, repo_id: RepoId) -> None:
        """Until nothing of the repository is being removed: what is unlinked must not be published meanwhile."""
        while running := [task for snapshot, task in self.evictions.items() if snapshot.repo_id == repo_id]:
            await self.until_evicted(running)
        async with self.taking_from(repo_id):
            return

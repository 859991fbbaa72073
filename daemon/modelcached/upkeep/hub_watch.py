"""The cache directory under watch: somebody runs ``rm -rf``, or ``hf download`` into hub/, and the index follows.

Events only say where to look; what has happened is for the look to find out (cache/rescan.py). Where there are no
events (no inotify instance left, a filesystem that others change, or one that tells nothing), the times of the
directories are polled instead. And all of hub/ is looked at now and then, for what nobody has told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from functools import partial

import structlog

from modelcached.cache.core import Core
from modelcached.cache.hub import HubKeeper, HubSight
from modelcached.cache.rescan import Rescan
from modelcached.model import repo_folder, repo_id_of_folder
from modelcached.store.mounts import is_mounted, mounts_below, remote_kind
from modelcached.upkeep.inotify import Directories, Directory, look_at

log = structlog.get_logger()

_SETTLE_SECONDS = 1.0
"""From the first event of a repository to the look: things come in heaps."""
_AGAIN_SECONDS = 1.0
"""To the next look at what is busy, or must be found twice."""
_AFTER_DRIFT_SECONDS = 4.0
"""To one more look: who writes a snapshot is perhaps not done, and what lies deep in it tells nothing."""
_FAILED_SECONDS = 60.0
"""To the next look at what the disk does not show."""
_POLL_SECONDS = 5.0
_PROBE_SECONDS = 5.0
"""So long an event may take; where none comes there are none."""
_ROUND_SECONDS = 0.3
"""Of a turn for the look at everything: others want the disk's threads, too."""
_DUE_SECONDS = 1.0
"""Of a turn for what is due; the rest has the next one."""
_AT_ONCE = 100
"""Folders of which the directories are looked at in one go of a thread."""
_PROBE = "probe"
_PROBE_GROUP = "/probe"
"""Like no name in hub/."""
_LIBRARYS = ("blobs", ".locks")
"""What huggingface_hub keeps in hub/ beside repositories; it grows with them, and is not watched."""


class Watch:
    """The event loop's alone, but for what inotify's thread calls."""

    def __init__(self, core: Core, keeper: HubKeeper, rescan: Rescan, read_since: float) -> None:
        """``read_since``: when the start began to read hub/; seconds since the epoch."""
        self._core = core
        self._keeper = keeper
        self._rescan = rescan
        self._device = -1
        self._directories: Directories | None = None
        self._lock = threading.Lock()
        self._noted: set[str] = set()
        self._dropped = False
        self._probe_seen = threading.Event()
        self._probed_at: float | None = None
        self._why_polling = ""
        self._polled: dict[str, tuple[Directory, ...]] = {}
        self._next_poll = 0.0
        self._due: dict[str, float] = {}
        self._round: deque[str] = deque()
        self._round_began = float("-inf")
        self._read_since = read_since
        self._started = False

    @property
    def why_polling(self) -> str:
        """Empty where events tell what is changed."""
        return self._why_polling

    # From inotify's thread

    def _note(self, folder: str) -> None:
        with self._lock:
            self._noted.add(folder)

    def _note_in(self, folder: str, name: str) -> None:
        self._note(folder or name)

    def _note_loss(self) -> None:
        with self._lock:
            self._dropped = True

    # The event loop's

    async def _start(self) -> None:
        """Sets all watches. What was changed since the start of the daemon has read it is looked at first."""
        self._round_began = time.monotonic()
        await self._begin()
        horizon = self._read_since - _SETTLE_SECONDS
        all_found = await self._heed(await self._folders())
        changed = {name for name, own in all_found.items() if any(one.mtime_ns / 1e9 >= horizon for one in own)}
        if "" in changed:  # what is no repository has no directory that tells
            changed |= {name for name, own in all_found.items() if not own}
        self._due |= {name: time.monotonic() for name in changed if name not in self._due}

    async def turn(self) -> None:
        """Once; about a second long at most, whatever there is to do."""
        sight = await self._keeper.look()
        if sight is HubSight.LOST:
            return
        with contextlib.suppress(FileNotFoundError):  # hub/ went at this moment: the next turn sees that
            if not self._started:
                self._started = True
                await self._start()
            await self._notice(sight)
            await self._look_around()

    async def _notice(self, sight: HubSight) -> None:
        """What is due, by events, by times, or because it is time for everything."""
        now = time.monotonic()
        await self._end_probe(now)
        if self._why_polling and now >= self._next_poll:
            self._next_poll = now + _POLL_SECONDS
            await self._poll()
        with self._lock:
            noted, self._noted = self._noted, set()
            dropped, self._dropped = self._dropped, False
        for folder in noted:
            self._due.setdefault(folder, now + _SETTLE_SECONDS)
        if dropped:
            log.warning("inotify has dropped events, looking at everything")
        interval = self._core.config.cache.rescan_interval.total_seconds()  # a reload may have changed it
        if dropped or sight is HubSight.NEW or now - self._round_began >= interval:
            await self._begin_round()

    async def _look_around(self) -> None:
        began = time.monotonic()
        due = sorted((at, folder) for folder, at in self._due.items() if at <= began)
        for _, folder in due:
            if time.monotonic() - began >= _DUE_SECONDS:
                return
            del self._due[folder]
            await self._look(folder)
        while self._round and time.monotonic() - began < _ROUND_SECONDS:
            await self._look(self._round.popleft())

    async def _begin_round(self) -> None:
        self._round_began = time.monotonic()
        if self._directories is None:
            await self._begin()
        self._round = deque(sorted(await self._folders()))
        await self._core.measure_hub_alone()

    async def _folders(self) -> set[str]:
        """All that there is, and all that is believed to be; an empty one is hub/ itself."""
        core = self._core
        names = await core.pools.on_disk(os.listdir, core.layout.hub)
        return {"", *names, *map(repo_folder, core.index.repos)}

    async def _look(self, folder: str) -> None:
        core = self._core
        try:
            mounts = await core.pools.on_disk(mounts_below, core.layout.hub)
            if is_mounted(f"{core.layout.hub}/{folder}", mounts) and folder:
                return  # what lies there is somebody else's
            await self._heed([folder])
            repo_id = repo_id_of_folder(folder)
            if repo_id is None:
                if folder:
                    await core.measure(folder)
                await core.measure_hub_alone()
                return
            look = await self._rescan.look(repo_id)
        except OSError as error:
            log.warning("cannot look at the disk, believing what was there before", folder=folder, why=str(error))
            self._due[folder] = time.monotonic() + _FAILED_SECONDS
            return
        if look.drifts:
            self._due |= dict.fromkeys(_LIBRARYS, time.monotonic())
            self._due[folder] = time.monotonic() + _AFTER_DRIFT_SECONDS
        if look.again:
            self._due[folder] = time.monotonic() + _AGAIN_SECONDS

    # Events

    async def _begin(self) -> None:
        """Events if there can be any, else polling; and the proof that they come is asked for."""
        core = self._core
        self._device = (await core.pools.on_disk(os.stat, core.layout.cache_dir)).st_dev
        kind = await core.pools.on_disk(remote_kind, core.layout.hub)
        if kind is not None:
            self._poll_from_now(f"others may change a {kind} filesystem without this kernel's knowing")
            return
        try:
            self._directories = await core.pools.on_disk(Directories, self._note_loss)
            await core.pools.on_disk(self._ask_for_proof, self._directories)
        except OSError as error:
            await self._give_up(str(error))
            return
        self._probed_at = time.monotonic()

    def _ask_for_proof(self, directories: Directories) -> None:
        """Blocking. An event of our own, in a directory of our own."""
        core, path = self._core, f"{self._core.layout.private}/{_PROBE}"
        self._probe_seen.clear()

        def tell(name: str) -> None:
            if name == _PROBE:
                self._probe_seen.set()

        private = look_at(core.layout.private, self._device)
        directories.watch(_PROBE_GROUP, [private] if private else [], tell)
        core.disk.unlink(path)
        try:
            os.close(core.disk.create(path))
        finally:
            core.disk.unlink(path)

    async def _end_probe(self, now: float) -> None:
        if self._probed_at is None or self._directories is None:
            return
        if self._probe_seen.is_set():
            self._probed_at = None
            await self._core.pools.on_disk(self._directories.watch, _PROBE_GROUP, (), self._note)
            if self._why_polling:
                self._why_polling = ""
                self._polled.clear()
                log.info("hub/ is watched again")
        elif now - self._probed_at >= _PROBE_SECONDS:
            await self._give_up(f"no event of {self._core.layout.private}/{_PROBE} came within {_PROBE_SECONDS:g} s")

    async def _give_up(self, why: str) -> None:
        directories, self._directories, self._probed_at = self._directories, None, None
        if directories is not None:
            await self._core.pools.on_disk(directories.close)
        self._poll_from_now(why)

    def _poll_from_now(self, why: str) -> None:
        if not self._why_polling:
            self._round_began = float("-inf")  # what changed until the first poll
            log.warning("hub/ cannot be watched, polling it", why=why, every_seconds=_POLL_SECONDS)
        self._why_polling = why

    async def _heed(self, folders: Collection[str]) -> dict[str, tuple[Directory, ...]]:
        """Watches the folders' directories as they are now, and returns them."""
        pending, all_found = list(folders), dict[str, tuple[Directory, ...]]()
        while pending:
            some, pending = pending[:_AT_ONCE], pending[_AT_ONCE:]
            found = await self._core.pools.on_disk(self._directories_of, some)
            all_found |= found
            if self._directories is None:
                continue
            try:
                await self._core.pools.on_disk(self._watch, self._directories, found)
            except OSError as error:  # this user has no watch left
                await self._give_up(str(error))
        return all_found

    def _watch(self, directories: Directories, found: dict[str, tuple[Directory, ...]]) -> None:
        """Blocking."""
        for folder, own in found.items():
            directories.watch(folder, own, partial(self._note_in, folder))

    def _directories_of(self, folders: Collection[str]) -> dict[str, tuple[Directory, ...]]:
        """Blocking. Of a repository those in which blobs, snapshots and refs come and go; never what is mounted."""
        hub = self._core.layout.hub
        mounts = mounts_below(hub)
        found: dict[str, tuple[Directory, ...]] = {}
        for folder in folders:
            root = f"{hub}/{folder}"
            if not folder:
                own = look_at(hub, self._device)
                found[folder] = (own,) if own is not None else ()
            elif repo_id_of_folder(folder) is None or is_mounted(root, mounts):
                found[folder] = ()
            else:
                found[folder] = tuple(self._walk(root))
        return found

    def _walk(self, root: str) -> Iterator[Directory]:
        pending = [root, f"{root}/blobs", f"{root}/snapshots", f"{root}/refs"]
        while pending:
            directory = look_at(pending.pop(), self._device)
            if directory is None:
                continue
            yield directory
            if directory.path.startswith(f"{root}/refs"):  # a branch's name may have slashes
                with contextlib.suppress(FileNotFoundError), os.scandir(directory.path) as entries:
                    pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]

    # Polling

    async def _poll(self) -> None:
        """What changed since the last time is looked at."""
        now, before = time.monotonic(), self._polled
        self._polled = await self._heed(await self._folders())
        if before:
            names = before.keys() | self._polled.keys()
            changed = [name for name in names if before.get(name) != self._polled.get(name)]
            self._due |= {name: now for name in changed if name not in self._due}

    async def stop(self) -> None:
        """Ends the watching thread."""
        if self._directories is not None:
            await asyncio.to_thread(self._directories.close)
            self._directories = None
        self._keeper.close()

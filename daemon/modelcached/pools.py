"""Bounded threads for blocking work, one pool a kind: six calls to a silent Hub must not stop the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

HUB_THREADS = 8
DISK_THREADS = 4
HASH_THREADS = 2
FLUSH_THREADS = 4


@dataclass(frozen=True, slots=True)
class Pools:
    """The threads of one daemon."""

    hub: ThreadPoolExecutor
    disk: ThreadPoolExecutor
    hash: ThreadPoolExecutor
    flush: ThreadPoolExecutor
    """fsync of large files takes seconds: a hit's stat must not wait behind it."""
    movers: ThreadPoolExecutor
    """One thread a connection to upstream."""

    @classmethod
    def start(cls, connections: int) -> Pools:
        """Threads start when first needed."""
        return cls(
            ThreadPoolExecutor(HUB_THREADS, "hub"),
            ThreadPoolExecutor(DISK_THREADS, "disk"),
            ThreadPoolExecutor(HASH_THREADS, "hash"),
            ThreadPoolExecutor(FLUSH_THREADS, "flush"),
            ThreadPoolExecutor(connections, "mover"),
        )

    async def on_disk(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a disk thread."""
        return await asyncio.get_running_loop().run_in_executor(self.disk, lambda: function(*args, **kwargs))

    async def on_hub(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a Hub thread. Put a deadline round it: the thread cannot be interrupted."""
        return await asyncio.get_running_loop().run_in_executor(self.hub, lambda: function(*args, **kwargs))

    async def on_hash(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a hash thread."""
        return await asyncio.get_running_loop().run_in_executor(self.hash, lambda: function(*args, **kwargs))

    async def on_flush(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a flush thread."""
        return await asyncio.get_running_loop().run_in_executor(self.flush, lambda: function(*args, **kwargs))

    async def on_mover(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a mover thread."""
        return await asyncio.get_running_loop().run_in_executor(self.movers, lambda: function(*args, **kwargs))

    def stop(self) -> None:
        """Waits for disk and hash work, lets go of what waits on the network."""
        for pool in (self.hub, self.movers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self.disk, self.hash, self.flush):
            pool.shutdown(wait=True, cancel_futures=True)

"""Bounded threads for blocking work, one pool a kind: six calls to a silent Hub must not stop the disk."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

HUB_THREADS = 8
DISK_THREADS = 4
HASH_THREADS = 2
FLUSH_THREADS = 4


class NetworkThreads(Executor):
    """At most ``size`` threads for what waits on other machines.

    Unlike a ThreadPoolExecutor's, they do not keep the process: a connect, a lookup of a name or a silent Hub
    cannot be interrupted, and the daemon's end must not wait for them.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unclaimed = 0  # threads that are free or on their way to the next work, less what is queued
        self._stopped = False

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs the function as soon as a thread is free."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._stopped:
                raise RuntimeError(f"the {self._name} threads are stopped")
            self._work.put(run)
            self._unclaimed -= 1
            if self._unclaimed < 0 and self._threads < self._size:
                self._threads += 1
                self._unclaimed += 1
                threading.Thread(target=self._serve, name=f"{self._name}_{self._threads - 1}", daemon=True).start()
        return future

    def _serve(self) -> None:
        while (work := self._work.get()) is not None and not self._stopped:
            work()
            del work  # what it holds must not outlive it
            with self._lock:
                self._unclaimed += 1

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:  # noqa: ARG002 - Executor's own
        """Starts nothing more; what runs is let go."""
        with self._lock:
            self._stopped = True
            for _ in range(self._threads):
                self._work.put(None)


@dataclass(frozen=True, slots=True)
class Pools:
    """The threads of one daemon."""

    hub: NetworkThreads
    disk: ThreadPoolExecutor
    hash: ThreadPoolExecutor
    flush: ThreadPoolExecutor
    """fsync of large files takes seconds: a hit's stat must not wait behind it."""
    movers: NetworkThreads
    """One thread a connection to upstream."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the daemon stops: what hashes for minutes looks at it."""

    @classmethod
    def start(cls, connections: int) -> Pools:
        """Threads start when first needed."""
        return cls(
            NetworkThreads(HUB_THREADS, "hub"),
            ThreadPoolExecutor(DISK_THREADS, "disk"),
            ThreadPoolExecutor(HASH_THREADS, "hash"),
            ThreadPoolExecutor(FLUSH_THREADS, "flush"),
            NetworkThreads(connections, "mover"),
        )

    async def on_disk(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a disk thread."""
        return await _in_thread(self.disk, lambda: function(*args, **kwargs))

    async def on_hub(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a Hub thread. Put a deadline round it: the thread cannot be interrupted."""
        return await _in_thread(self.hub, lambda: function(*args, **kwargs))

    async def on_hash(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a hash thread."""
        return await _in_thread(self.hash, lambda: function(*args, **kwargs))

    async def on_flush(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a flush thread."""
        return await _in_thread(self.flush, lambda: function(*args, **kwargs))

    async def on_mover(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a mover thread."""
        return await _in_thread(self.movers, lambda: function(*args, **kwargs))

    def stop(self) -> None:
        """Waits for disk and hash work, lets go of what waits on the network."""
        self.stopping.set()
        for network in (self.hub, self.movers):
            network.shutdown()
        for pool in (self.disk, self.hash, self.flush):
            pool.shutdown(wait=True, cancel_futures=True)


async def _in_thread(pool: Executor, function: Callable[[], T]) -> T:
    """Runs it there, under the request id that the caller logs under."""
    return await asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, function)

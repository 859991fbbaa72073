"""Bounded threads for blocking work, one pool a kind: six calls to a silent Hub must not stop the disk."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from modelcached.precedence import Precedence

P = ParamSpec("P")
T = TypeVar("T")

HUB_THREADS = 8
DISK_THREADS = 4
HASH_THREADS = 2
FLUSH_THREADS = 4
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE, _IOPRIO_CLASS_SHIFT = 1, 3, 13
HASH_NICE = 10
"""Hashing, which never waits, steps back behind answers (`make bench CASE=meanwhile`). Movers do not: what they are
late to read lies in sockets, and is lost with them."""


@dataclass(slots=True)
class _Work:
    function: Callable[[], Any]
    context: contextvars.Context
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]

    def do(self) -> None:
        if self.done.cancelled():
            return
        try:
            result = self.context.run(self.function)
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            self._tell(self._fail, error)
        else:
            self._tell(self._succeed, result)

    def _tell(self, how: Callable[[Any], None], what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody waits any more
            self.loop.call_soon_threadsafe(how, what)

    def _succeed(self, result: object) -> None:
        if not self.done.done():
            self.done.set_result(result)

    def _fail(self, error: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Threads:
    """At most ``size`` of them, started when first needed, for work that the event loop waits for.

    Made for the loop: a ThreadPoolExecutor's futures, their locks and their way back to asyncio take longer than
    what a hit does in a thread. And unlike its threads, these do not keep the process.
    """

    def __init__(self, size: int, name: str, nice: int = 0, *, in_bulk: bool = False, idle_io: bool = False) -> None:
        """``nice``: by how much they step back behind the daemon's other threads, 0 to 19.

        ``in_bulk``: they move or read many bytes for nobody in particular, so they have their share of the processors
        and are in no hurry for it: one that wakes takes no other's place (SCHED_BATCH, sched(7)).
        ``idle_io``: they read when nobody else does, where the disk's scheduler knows that (bfq, not none).
        """
        self._size = size
        self._nice = nice
        self._in_bulk = in_bulk
        self._idle_io = idle_io
        self._name = name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unclaimed = 0  # threads that are free or on their way to the next work, less what is queued
        self._stopped = False

    async def run(self, function: Callable[[], T]) -> T:
        """Runs it as soon as a thread is free, under the request id that the caller logs under.

        Raises what it raises. Work that is cancelled before it begins is never begun; later it goes on, unheeded.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        work = _Work(function, contextvars.copy_context(), loop, done)
        with self._lock:
            if self._stopped:
                raise RuntimeError(f"the {self._name} threads are stopped")
            self._queue.put(work)
            self._unclaimed -= 1
            if self._unclaimed < 0 and len(self._threads) < self._size:
                try:
                    self._start_one()
                except RuntimeError:  # the machine gives no thread at this moment; those that there are will do
                    if not self._threads:
                        done.cancel()
                        raise
        return await done

    def _start_one(self) -> None:
        thread = threading.Thread(target=self._serve, name=f"{self._name}_{len(self._threads)}", daemon=True)
        thread.start()
        self._threads.append(thread)
        self._unclaimed += 1

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # a sandbox may forbid it, and work comes first
            os.nice(self._nice)  # of this thread alone: on Linux each has its own (sched(7)), and its own policy
            if self._in_bulk:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        if self._idle_io:
            _step_back_from_the_disk()
        while (work := self._queue.get()) is not None and not self._stopped:
            work.do()
            del work  # what it holds must not outlive it
            with self._lock:
                self._unclaimed += 1

    def stop(self, *, wait: bool) -> None:
        """Starts nothing more. What runs is waited for, or let go."""
        with self._lock:
            self._stopped = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads if wait else ():
            thread.join()


def _step_back_from_the_disk() -> None:
    """ioprio_set(2): this thread's class is idle. libc has no name for it."""
    number = {"x86_64": 251, "aarch64": 30}.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT)


@dataclass(frozen=True, slots=True)
class Pools:
    """The threads of one daemon."""

    hub: Threads
    disk: Threads
    hash: Threads
    flush: Threads
    """fsync of large files takes seconds: a hit's stat must not wait behind it."""
    movers: Threads
    """One thread a connection to upstream."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the daemon stops: what hashes for minutes looks at it."""
    precedence: Precedence = field(default_factory=Precedence)
    """What movers and hashing step back for, beside those niced."""

    @classmethod
    def start(cls, connections: int) -> Pools:
        """Threads start when first needed."""
        return cls(
            Threads(HUB_THREADS, "hub"),
            Threads(DISK_THREADS, "disk"),
            Threads(HASH_THREADS, "hash", HASH_NICE, in_bulk=True),
            Threads(FLUSH_THREADS, "flush", in_bulk=True),
            Threads(connections, "mover", in_bulk=True),
        )

    async def on_disk(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a disk thread."""
        return await self.disk.run(lambda: function(*args, **kwargs))

    async def on_hub(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a Hub thread. Put a deadline round it: the thread cannot be interrupted."""
        return await self.hub.run(lambda: function(*args, **kwargs))

    async def on_hash(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a hash thread."""
        return await self.hash.run(lambda: function(*args, **kwargs))

    async def on_flush(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a flush thread."""
        return await self.flush.run(lambda: function(*args, **kwargs))

    async def on_mover(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in a mover thread."""
        return await self.movers.run(lambda: function(*args, **kwargs))

    def stop(self) -> None:
        """Waits for disk and hash work; lets go of what waits on other machines: a connect cannot be interrupted."""
        self.stopping.set()
        for threads in (self.hub, self.movers):
            threads.stop(wait=False)
        for threads in (self.disk, self.hash, self.flush):
            threads.stop(wait=True)

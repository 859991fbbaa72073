"""Signals as a flag that ends every wait, instead of an exception out of nowhere.

A handler notes the signal, wakes `sleep` through a pipe and cancels the call
under way. gRPC's locks are reentrant for the main thread, where Python runs
handlers, so cancelling there is safe. Light on purpose: it is imported before
gRPC, so that a signal in the first 100 ms is already ours (as PID 1 of a
container it would otherwise be ignored).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol, TypeVar

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cancellable(Protocol):
    """Anything under way that can be ended early."""

    def cancel(self) -> object:
        """Ends it; a second time does nothing."""


_Call = TypeVar("_Call", bound=Cancellable)


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The run was asked to stop: by a signal, or (signum 0) because what it waited beside has ended."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name if signum else "its own end")
        self.exit_status = 128 + signum


class Interruption:
    """Whether to stop, and who is to be told. One for a process."""

    def __init__(self) -> None:
        self.triggered = False
        self.signum: int | None = None
        self._under_way: Cancellable | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def install(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP trigger it; a second one ends the process at once."""
        for signum in STOPPING:
            # nohup's choice stays: an ignored SIGHUP is ignored by us too.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            sys.stdout.flush()
            os._exit(128 + signum)
        self.signum = signum
        self.trigger()

    def trigger(self) -> None:
        """Ends the wait under way and every later one. Safe in a signal handler."""
        self.triggered = True
        with suppress(BlockingIOError):  # full of earlier wakes: whoever sleeps will wake
            os.write(self._wake_write, b"!")
        if self._under_way is not None:
            self._under_way.cancel()

    def check(self) -> None:
        """Raises Stopped when triggered."""
        if self.triggered:
            raise Stopped(self.signum or 0)

    def sleep(self, seconds: float) -> None:
        """Waits so long, or until triggered."""
        deadline = time.monotonic() + seconds
        while not self.triggered and (left := deadline - time.monotonic()) > 0:
            select.select([self._wake_read], [], [], left)

    @contextmanager
    def watching(self, call: _Call) -> Iterator[_Call]:
        """Within it, a trigger cancels the call; it is cancelled in any case at the end."""
        self._under_way = call
        try:
            if self.triggered:  # it came before there was anything to cancel
                call.cancel()
            yield call
        finally:
            self._under_way = None
            call.cancel()

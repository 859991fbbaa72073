"""A command run under a lease: signals passed on, children reaped, its status ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from modelcache.hold import LeaseKeeper
from modelcache.interruption import Interruption
from modelcache.report import Reporter

NOT_FOUND = 127
NOT_EXECUTABLE = 126
"""As every shell has it."""

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_FROM_KEYBOARD = frozenset({signal.SIGINT, signal.SIGQUIT})


def run_command(
    command: Sequence[str],
    environ: Mapping[str, str],
    keeper: LeaseKeeper,
    interruption: Interruption,
    reporter: Reporter,
) -> int:
    """Runs the command to its end while the keeper holds; returns its status, 128+n for signal n. Raises Stopped."""
    child = _Child(interruption)
    child.take_signals()
    interruption.check()  # one that came before is not the child's: there is none yet
    try:
        child.start(command, environ)
    except FileNotFoundError:
        reporter.fail(f"{command[0]}: command not found")
        return NOT_FOUND
    except OSError as error:
        reporter.fail(f"{command[0]}: {error.strerror}")
        return NOT_EXECUTABLE
    keeper.keep()
    assert child.exit_status is not None  # nothing but its end triggers the interruption now
    return child.exit_status


class _Child:
    """One child process. Its end triggers the interruption, which ends the keeper's wait."""

    def __init__(self, interruption: Interruption) -> None:
        self.exit_status: int | None = None
        self._interruption = interruption
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._ended: dict[int, int] = {}

    def take_signals(self) -> None:
        """Handlers come before the child, so that no signal falls between."""
        for signum in FORWARDED:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, self._forward)
        signal.signal(signal.SIGCHLD, self._reap)

    def start(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        """Starts it with our stdin, stdout and stderr. Raises OSError.

        subprocess execs from a vfork and runs no Python in between, so gRPC's threads and fork handlers are not met.
        """
        sys.stdout.flush()
        self._process = subprocess.Popen(command, env=dict(environ))  # noqa: S603 - the caller's command, no shell
        for signum in self._early:
            self._send(signum)
        self._reap()

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(signum)
        elif not (signum in _FROM_KEYBOARD and _terminal_is_ours()):
            # On a terminal the kernel has sent ^C to the child too.
            self._send(signum)

    def _send(self, signum: int) -> None:
        # Once reaped, its pid may be somebody else's.
        if self._process is not None and self.exit_status is None:
            os.kill(self._process.pid, signum)

    def _reap(self, _signum: int = 0, _frame: FrameType | None = None) -> None:
        """Waits for every child that has ended: as PID 1 of a container, orphans are ours too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            self._ended[pid] = os.waitstatus_to_exitcode(status)
        if self._process is None:  # it ended while Popen was still returning: start() looks again
            return
        if (code := self._ended.get(self._process.pid)) is not None and self.exit_status is None:
            self.exit_status = 128 - code if code < 0 else code
            self._process.returncode = code  # it is waited for: subprocess need not
            self._interruption.trigger()
        self._ended.clear()


def _terminal_is_ours() -> bool:
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False

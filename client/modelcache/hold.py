"""Keeping a lease for as long as something runs: `ensure-model --hold`, with and without a command."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from modelcache.client import Client
from modelcache.connection import explain_unreachable
from modelcache.errors import ModelCacheError
from modelcache.flow import EXIT_IO, Failure, Run
from modelcache.interruption import Interruption, Stopped
from modelcache.output import Answer, write_atomically
from modelcache.patience import FIRST_PAUSE_SECONDS, MOST_PAUSE_SECONDS, Patience, ensure_ready
from modelcache.reasons import Reason
from modelcache.report import Reporter
from modelcache.v1 import cache_pb2, common_pb2

RELEASE_SECONDS = 5.0
"""A daemon that does not answer must not keep a pod from ending; the lease then ends by its own rule."""

WARN_EVERY_SECONDS = 60.0
"""The same warning again, while nothing changes."""

_REFUSED_PAUSE_SECONDS = 30.0
"""Between two tries when the daemon is there and refuses: the workload runs on, and the operator has been told."""


def hold(
    task: Run,
    client: Client,
    request: cache_pb2.EnsureModelRequest,
    ready: cache_pb2.Ready,
    told: Sequence[Answer],
) -> int:
    """Holds the lease until a signal comes (returns 0) or the command ends (returns its status). Raises Stopped."""
    keeper = LeaseKeeper(
        client,
        ready.lease.id,
        request=_same_again(request, ready),
        reporter=task.reporter,
        interruption=task.interruption,
    )
    ready_file = task.options.ready_file
    try:
        if ready_file:
            _write_ready_file(ready_file, told)
        if task.options.command:
            from modelcache.child import run_command  # noqa: PLC0415 - only with a command

            environ = {**task.environ, "MODELCACHE_PATH": told[0].path}
            return run_command(task.options.command, environ, keeper, task.interruption, task.reporter)
        keeper.keep()
        return 0
    finally:
        if ready_file:
            with suppress(OSError):
                os.unlink(ready_file)
        keeper.release()


def _write_ready_file(path: str, told: Sequence[Answer]) -> None:
    try:
        write_atomically(path, "".join(f"{answer.path}\n" for answer in told))
    except OSError as error:
        raise Failure(EXIT_IO, "OUTPUT", f"cannot write {path}: {error.strerror}") from error


def _same_again(request: cache_pb2.EnsureModelRequest, ready: cache_pb2.Ready) -> cache_pb2.EnsureModelRequest:
    """The request for exactly the snapshots that were answered.

    What runs has these files open: if its lease is lost after a branch has
    moved, the new lease must be for them, not for the newer commit.
    """
    again = cache_pb2.EnsureModelRequest()
    again.CopyFrom(request)
    for wanted, got in zip([again.model, *again.adapters], ready.models, strict=False):
        wanted.revision = got.commit or wanted.revision
    return again


class LeaseKeeper:
    """Holds one stream lease, across daemon restarts, until interrupted."""

    def __init__(
        self,
        client: Client,
        lease_id: str,
        *,
        request: cache_pb2.EnsureModelRequest,
        reporter: Reporter,
        interruption: Interruption,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``request`` is what to ask for if the lease is lost."""
        self._client = client
        self._request = request
        self._lease_id = lease_id
        self._reporter = reporter
        self._interruption = interruption
        self._clock = clock
        self._broken = False
        self._warning = ""
        self._warned = clock()
        self._pause = FIRST_PAUSE_SECONDS

    def keep(self) -> None:
        """Returns when interrupted; nothing else ends it."""
        while not self._interruption.triggered:
            try:
                self._hold_once()
            except ModelCacheError as error:
                if not self._interruption.triggered:
                    self._recover(error)
            else:
                self._pause_for("the daemon ended the hold")

    def release(self) -> None:
        """Gives the lease up; that it could not be is a warning, because leases end by themselves."""
        try:
            self._release(self._client)
        except ModelCacheError as error:
            self._reporter.warn(f"lease {self._lease_id} not released, it will end by itself: {self._why(error)}")

    def _release(self, client: Client) -> None:
        try:
            client.release(self._lease_id, timeout_seconds=RELEASE_SECONDS)
        except ModelCacheError as error:
            if not error.connection_lost or client is not self._client:
                raise
            # A connection that was lost waits before it is tried again: the daemon may be back by now.
            with Client(client.address) as another:
                self._release(another)

    def _why(self, error: ModelCacheError) -> str:
        address = self._client.address
        if error.reason or not error.connection_lost:
            return error.message
        return f"the daemon at {address} is not reachable: {explain_unreachable(address, error.message)}"

    def _hold_once(self) -> None:
        with self._interruption.watching(self._client.hold(self._lease_id)) as stream:
            for lease in stream:
                self._held(lease)

    def _held(self, lease: common_pb2.Lease) -> None:
        if self._broken:
            self._reporter.note(f"lease {lease.id or self._lease_id} is held again")
        self._broken, self._pause, self._warning = False, FIRST_PAUSE_SECONDS, ""

    def _recover(self, error: ModelCacheError) -> None:
        if error.connection_lost:
            self._pause_for(self._why(error))
        elif error.reason == Reason.LEASE_NOT_FOUND:
            self._warn(f"lease {self._lease_id} is gone; asking for a new one")
            self._lease_again()
        else:
            self._refused(error)

    def _lease_again(self) -> None:
        patience = Patience(None, retry=True)
        try:
            ready = ensure_ready(self._client, self._request, patience, self._reporter, self._interruption)
        except ModelCacheError as error:
            self._refused(error)
            return
        except Stopped:
            return  # keep() sees it
        self._lease_id = ready.lease.id
        self._sleep()  # a daemon that forgets each lease at once must not be asked without end

    def _pause_for(self, why: str) -> None:
        self._warn(f"lease {self._lease_id} is not held: {why}; trying again")
        self._sleep()

    def _sleep(self) -> None:
        pause, self._pause = self._pause, min(MOST_PAUSE_SECONDS, self._pause * 2)
        self._interruption.sleep(pause)

    def _refused(self, error: ModelCacheError) -> None:
        self._warn(f"lease {self._lease_id} is not held: {error.text}; trying again")
        self._interruption.sleep(_REFUSED_PAUSE_SECONDS)

    def _warn(self, text: str) -> None:
        self._broken = True
        if text != self._warning or self._clock() - self._warned >= WARN_EVERY_SECONDS:
            self._warning, self._warned = text, self._clock()
            self._reporter.warn(text)

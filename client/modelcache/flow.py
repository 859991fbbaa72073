"""One run of ensure-model, top-down: ask, check, tell, and hold if that is wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from modelcache.arguments import Options, UsageError, Wanted
from modelcache.client import Client, reference
from modelcache.connection import AddressError, cache_address
from modelcache.errors import ModelCacheError
from modelcache.interruption import Interruption
from modelcache.output import (
    Answer,
    BadAnswerError,
    HubDirectory,
    answers,
    directory_obstacle,
    hub_directory,
    link_obstacle,
    replace_link,
    write_atomically,
)
from modelcache.patience import Patience, TimedOutError, ensure_ready
from modelcache.reasons import TABLE, Reason
from modelcache.report import Reporter
from modelcache.units import format_size
from modelcache.v1 import cache_pb2, common_pb2

EXIT_IO = TABLE[Reason.STORAGE_ERROR].exit_status
_STDOUT = 1
EXIT_NO_INPUT = TABLE[Reason.MODEL_NOT_CACHED].exit_status


class Failure(Exception):  # noqa: N818 - the end of a run, whatever kind of error was at its root
    """Why the run ends, as its last word and exit status."""

    def __init__(self, exit_status: int, label: str, text: str) -> None:
        super().__init__(text)
        self.exit_status = exit_status
        self.label = label
        self.text = text


@dataclass(frozen=True, slots=True)
class Run:
    """What every step of a run needs."""

    options: Options
    environ: Mapping[str, str]
    reporter: Reporter
    interruption: Interruption


def run(task: Run) -> int:
    """Returns the exit status. Raises Failure, Stopped, UsageError."""
    options = task.options
    _check_targets(options)
    try:
        address = cache_address(options.address, task.environ)
    except AddressError as error:
        raise UsageError(str(error)) from None
    if options.token and not address.startswith("unix:"):
        task.reporter.warn(f"the token goes to {address} unencrypted")
    with Client(address) as client:
        request = _request(options)
        ready = _ensure(task, client, request)
        told = _tell(task, ready)
        if not options.hold:
            return 0
        from modelcache.hold import hold  # noqa: PLC0415 - most runs do not hold

        return hold(task, client, request, ready, told)


def _check_targets(options: Options) -> None:
    """Finds out before 140 GB are fetched that the answer could not be written."""
    for flag, path in (("--output", options.output), ("--ready-file", options.ready_file)):
        if path and (obstacle := directory_obstacle(path)):
            raise UsageError(f"{flag}: {obstacle}")
    if options.link and (obstacle := link_obstacle(options.link)):
        raise UsageError(f"--link: {obstacle}")


def _request(options: Options) -> cache_pb2.EnsureModelRequest:
    base, *adapters = (_reference(wanted) for wanted in options.models)
    return cache_pb2.EnsureModelRequest(
        model=base,
        adapters=adapters,
        lease=cache_pb2.LeaseRequest(pod_uid=options.pod_uid, stream=options.hold, holder=options.holder),
        token=options.token,
        # One for the whole run: the daemon's log lines of every try carry it.
        # 128 random bits, as uuid4().hex; importing uuid would take 3 ms of a hit.
        request_id=os.urandom(16).hex(),
        prewarm=options.prewarm or None,  # unset: as the daemon's configuration says
        wait_for_space=_duration(options.wait_for_space_seconds),
    )


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def _reference(wanted: Wanted) -> common_pb2.ModelReference:
    return reference(
        wanted.repo_id, wanted.revision, profile=wanted.profile, include=wanted.include, exclude=wanted.exclude
    )


def _ensure(task: Run, client: Client, request: cache_pb2.EnsureModelRequest) -> cache_pb2.Ready:
    patience = Patience(task.options.timeout_seconds, retry=task.options.retry)
    try:
        with task.reporter.ticking():
            return ensure_ready(client, request, patience, task.reporter, task.interruption)
    except TimedOutError as error:
        raise Failure(error.exit_status, error.label, f"{error} (request {request.request_id})") from error
    except ModelCacheError as error:
        text = f"{error.text} (request {request.request_id})"
        raise Failure(error.exit_status, error.label, text) from error


def _tell(task: Run, ready: cache_pb2.Ready) -> list[Answer]:
    """Warns, then writes files, then stdout: who reads stdout finds the files written."""
    options = task.options
    hub = hub_directory(options.hub_dir, task.environ, ready.hub_dir)
    try:
        told = answers(ready, hub)
    except BadAnswerError as error:
        raise Failure(TABLE[Reason.INTERNAL].exit_status, Reason.INTERNAL, str(error)) from error
    for answer in told:
        task.reporter.say(_ready_line(answer))
        if answer.stale:
            task.reporter.warn(f"{answer.repo_id}: upstream did not answer; {answer.commit} is the newest known commit")
    _check_visible(task, ready, hub, told)
    _check_lease(task, ready)
    paths = "".join(f"{answer.path}\n" for answer in told)
    try:
        if options.output:
            write_atomically(options.output, paths)
        if options.link:
            replace_link(options.link, told[0].path)
    except OSError as error:
        raise Failure(EXIT_IO, "OUTPUT", f"cannot write {error.filename}: {error.strerror}") from error
    if options.json:
        _print("".join(f"{json.dumps(answer.as_dict())}\n" for answer in told))
    elif not options.command:
        # Under a command stdout is the command's; it has the path in MODELCACHE_PATH.
        _print(paths)
    return told


def _ready_line(answer: Answer) -> str:
    fetched = f", {format_size(answer.bytes_fetched)} fetched" if answer.bytes_fetched else ""
    return f"{answer.repo_id} is ready: {answer.outcome}, {format_size(answer.bytes_total)}{fetched}"


def _check_visible(task: Run, ready: cache_pb2.Ready, hub: HubDirectory, told: list[Answer]) -> None:
    """A path that cannot be seen here may be right for its reader, who mounts the hub elsewhere; so it is a warning.

    Where the caller wants something made of the path and its hub directory is
    here but holds no such snapshot, it is another directory than the daemon's.
    """
    missing = [answer.path for answer in told if not os.path.isdir(answer.path)]
    if not missing:
        return
    options = task.options
    if os.path.isdir(hub.path) and (options.hub_dir or options.output or options.link):
        text = (
            f"{missing[0]} is not there: {hub.path} (from {hub.origin}) is not the daemon's {ready.hub_dir}; mount that"
        )
        raise Failure(EXIT_NO_INPUT, "HUB_DIR", text)
    task.reporter.warn(
        f"{missing[0]} is not visible here: the hub directory is {hub.path} (from {hub.origin});"
        f" mount the daemon's {ready.hub_dir} there, or name its mount with --hub-dir"
    )


def _check_lease(task: Run, ready: cache_pb2.Ready) -> None:
    """A pod that its lease does not last as long as would lose its model's cover in the middle of its life."""
    if ready.lease.kind != common_pb2.LEASE_KIND_TTL:
        return
    if task.options.pod_uid:
        why = f"the daemon sees no pod {task.options.pod_uid} (leases.kubelet_pods_dir)"
    elif "KUBERNETES_SERVICE_HOST" in task.environ:
        why = "POD_UID is not set"
    else:
        return
    expires = ready.lease.expires_at.ToJsonString()
    task.reporter.warn(f"{why}: the lease ends at {expires}, however long the pod runs; or keep it with --hold")


def _print(text: str) -> None:
    """Straight to the descriptor: what a failed flush leaves in a buffer, Python writes again at exit, and fails."""
    data = text.encode()
    try:
        while data:
            data = data[os.write(_STDOUT, data) :]
    except OSError as error:
        raise Failure(EXIT_IO, "OUTPUT", f"cannot write to stdout: {error.strerror}") from error

"""Where the snapshots are for this process, and how that is told: stdout, a file, a symlink."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from modelcache.client import EnsureEvent, Stream
from modelcache.v1 import cache_pb2
from modelcache.words import lease_kind_word, outcome_word


@dataclass(frozen=True, slots=True)
class HubDirectory:
    """The hub directory as this run tells it to others, and which of the three said so."""

    path: str
    origin: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What ``--json`` prints for one model; scripts rely on these keys."""

    repo_id: str
    revision: str
    commit: str
    path: str
    outcome: str
    profile: str
    bytes_total: int
    bytes_fetched: int
    stale: bool
    lease_id: str | None
    lease_kind: str | None
    lease_expires: str | None

    def as_dict(self) -> dict[str, str | int | bool | None]:
        """The same, ready for json.dumps."""
        return asdict(self)


class BadAnswerError(ValueError):
    """The daemon named no snapshot, or a path that does not lie in the hub directory."""


def ready_of(
    stream: Stream[EnsureEvent], watch: Callable[[cache_pb2.Progress], object] = lambda _progress: None
) -> cache_pb2.Ready:
    """The answer at the stream's end; ``watch`` sees each step before it. Raises BadAnswerError where there is none."""
    ready = None
    with stream:
        for event in stream:
            if isinstance(event, cache_pb2.Ready):
                ready = event
            else:
                watch(event)
    if ready is None:
        raise BadAnswerError("the daemon ended the stream without an answer")
    return ready


def hub_directory(flag: str | None, environ: Mapping[str, str], daemons_own: str) -> HubDirectory:
    """``--hub-dir``, else HF_HUB_CACHE, else the daemon's own path; absolute."""
    if flag:
        return HubDirectory(os.path.abspath(os.path.expanduser(flag)), "--hub-dir")
    if environ.get("HF_HUB_CACHE"):
        # As huggingface_hub reads it (constants.py).
        return HubDirectory(
            os.path.abspath(os.path.expandvars(os.path.expanduser(environ["HF_HUB_CACHE"]))), "HF_HUB_CACHE"
        )
    return HubDirectory(os.path.abspath(daemons_own or "."), "the daemon's own path")


def answers(ready: cache_pb2.Ready, hub: HubDirectory) -> list[Answer]:
    """One answer a model, the base first. Raises BadAnswerError."""
    if not ready.models:
        raise BadAnswerError("the daemon says that it is ready, and names no snapshot")
    lease = ready.lease if ready.HasField("lease") else None
    return [
        Answer(
            repo_id=model.repo_id,
            revision=model.revision,
            commit=model.commit,
            path=_joined(hub.path, model.path),
            outcome=outcome_word(model.outcome),
            profile=model.profile,
            bytes_total=model.bytes_total,
            bytes_fetched=model.bytes_fetched,
            stale=model.stale,
            lease_id=lease.id if lease else None,
            lease_kind=lease_kind_word(lease.kind) if lease else None,
            lease_expires=lease.expires_at.ToJsonString() if lease and lease.HasField("expires_at") else None,
        )
        for model in ready.models
    ]


def _joined(hub_path: str, relative: str) -> str:
    # Symlinks and files are made of this path: a daemon that is not ours must not name /etc.
    parts = relative.split("/")
    if not relative or posixpath.isabs(relative) or ".." in parts or not relative.isprintable():
        raise BadAnswerError(f"the daemon named a snapshot outside of its hub directory: {relative!r}")
    return os.path.join(hub_path, relative)


def write_atomically(path: str, text: str) -> None:
    """Writes a file that readers see whole or not at all, with the umask's permissions. Raises OSError."""
    temporary = _beside(path)
    try:
        # Not tempfile: its 0600 would keep the main container's user from reading it.
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace_link(path: str, target: str) -> None:
    """Makes ``path`` a symlink to ``target``; one that is there is swapped in one step. Raises OSError."""
    temporary = _beside(path)
    os.symlink(target, temporary)
    try:
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def link_obstacle(path: str) -> str:
    """Why ``--link`` may not replace what is there; empty when it may."""
    if os.path.lexists(path) and not os.path.islink(path):
        return f"{path} exists and is not a symlink"
    return directory_obstacle(path)


def directory_obstacle(path: str) -> str:
    """Why no file can be made at ``path``; empty when one can, as far as can be told beforehand."""
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        return f"{directory} is not a directory"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} is not writable for user {os.getuid()}"
    return ""


def _beside(path: str) -> str:
    """A name in the same directory, so that the rename stays in one filesystem."""
    directory, name = os.path.split(os.path.abspath(path))
    return os.path.join(directory, f".{name}.{os.getpid()}.tmp")

"""A model that lies on this machine already: found in a folder, and taken from there as from an upstream.

It is copied and each file hashed, never linked: whoever wrote it may still write it. What the Hub lists is what
counts; the folder is only asked for bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from modelcached.errors import CacheError, Reason
from modelcached.model import Commit, FileEntry, RepoId, Revision, as_commit, repo_folder, shown

_NAMED = 3
"""Files that a refusal names; it says how many more."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the files are, by their paths in the repository."""

    path: str
    commit: Commit | None
    """Which commit it is, where it is a cache of huggingface_hub's that says so."""


def find(path: str, repo_id: RepoId, revision: Revision) -> Folder:
    """A plain folder, or of a huggingface_hub cache the snapshot that it means. Blocking.

    Raises CacheError(INVALID_REQUEST) where there is none.
    """
    if not os.path.isabs(path):
        raise CacheError(Reason.INVALID_REQUEST, f"'{shown(path)}' is not an absolute path, as the daemon sees it")
    if not os.path.isdir(path):
        mend = "in Kubernetes, mount it into the daemon's pod too"
        raise CacheError(Reason.INVALID_REQUEST, f"'{shown(path)}' is no directory that the daemon sees", mend=mend)
    for repo in (f"{path}/hub/{repo_folder(repo_id)}", f"{path}/{repo_folder(repo_id)}", path):
        if os.path.isdir(f"{repo}/snapshots") and os.path.isdir(f"{repo}/blobs"):
            return _snapshot(repo, revision)
    return Folder(path, None)


def _snapshot(repo: str, revision: Revision) -> Folder:
    commit = as_commit(revision) or as_commit(_first_line(f"{repo}/refs/{revision}"))
    if commit is None or not os.path.isdir(f"{repo}/snapshots/{commit}"):
        try:
            there = sorted(filter(as_commit, os.listdir(f"{repo}/snapshots")))
        except OSError as error:
            raise _unreadable(f"{repo}/snapshots", error) from error
        named = ", ".join(there[:_NAMED]) or "none"
        raise CacheError(
            Reason.INVALID_REQUEST, f"'{shown(repo)}' has no snapshot of {revision}", mend=f"its commits are: {named}"
        )
    return Folder(f"{repo}/snapshots/{commit}", commit)


def _first_line(path: str) -> str:
    """Empty where there is none. Whoever wrote the folder may still write it: no link, no FIFO, and not more of it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        return os.read(descriptor, 64).decode("ascii", errors="replace").strip()
    finally:
        os.close(descriptor)


def _unreadable(path: str, error: OSError) -> CacheError:
    return CacheError(Reason.INVALID_REQUEST, f"'{shown(path)}' cannot be read: {error.strerror}")


def check(folder: Folder, entries: Iterable[FileEntry]) -> None:
    """Refuses (INVALID_REQUEST), by file, what cannot be read, is no file, or has another size. Blocking."""
    wrong = [told for entry in entries if (told := _wrong(f"{folder.path}/{entry.path}", entry)) is not None]
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise CacheError(
            Reason.INVALID_REQUEST,
            f"'{shown(folder.path)}' is not that model: {'; '.join(wrong[:_NAMED])}{more}",
            mend="name the revision and the --profile that it was made with, or cachectl pull",
        )


def _wrong(path: str, entry: FileEntry) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return f"{entry.path}: {error.strerror}"
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.path} is no file"
    if status.st_size != entry.size_bytes:
        return f"{entry.path} has {status.st_size} bytes, not {entry.size_bytes}"
    return None

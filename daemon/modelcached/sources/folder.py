"""A model that lies in a directory of this machine: which commit it is, what it says of its files, where each is.

Two kinds are known. A cache of huggingface_hub's: blobs named by their digests, snapshots of links (file_download.py).
And a plain folder of the repository's files; one that ``hf download --local-dir`` made says beside each file which
commit and which digest it is (_local_folder.py: ``.cache/huggingface/download/<path>.metadata``, line by line the
commit, the etag, the time). Whoever wrote a folder may still write it, so nothing that it says of content is believed
before it was hashed. Blocking.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelcached.errors import CacheError, Reason
from modelcached.model import (
    Commit,
    Digest,
    FileEntry,
    Manifest,
    RepoId,
    Revision,
    as_commit,
    repo_folder,
    repo_id_of_folder,
    shown,
)

_NAMED = 3
"""Files that a refusal names; it says how many more."""
_LINE_BYTES = 512
"""More than any file has that says which commit or digest something is."""
DOWNLOADS = ".cache/huggingface/download"
"""Where ``hf download --local-dir`` keeps what it knows of the files."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a model's files are."""

    path: str
    """Below it they have their paths in the repository."""
    repo: str = ""
    """Of a cache of huggingface_hub's: the repository's directory. Empty for a plain folder."""
    commit: Commit | None = None
    """Which commit it says that it is; None where it does not."""

    def locate(self, entry: FileEntry) -> str | None:
        """The file that may be that one: there, regular, and of its size."""
        names = [f"{self.repo}/blobs/{entry.digest.hex}"] if self.repo else []
        for name in (*names, f"{self.path}/{entry.path}"):
            if _wrong(name, entry) is None:
                return name
        return None

    def holds(self, path: str) -> bool:
        """The file itself lies in here: no link leads out to what is somebody else's to give away."""
        return os.path.realpath(path).startswith(f"{os.path.realpath(self.repo or self.path)}/")

    def says(self, repo_id: RepoId) -> Manifest | None:
        """What it says of its own files; None where it does not say it of a single one.

        It may hold less than the commit does. Raises CacheError(INVALID_REQUEST) where it cannot be read,
        INVALID_MANIFEST where a path cannot be stored.
        """
        if self.commit is None:
            return None
        try:
            files = list(self._entries())
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return Manifest.of(repo_id, self.commit, files, local=True) if files else None

    def _entries(self) -> Iterator[FileEntry]:
        for directory, folders, names in os.walk(self.path):
            if directory == self.path and not self.repo:
                folders[:] = [name for name in folders if name != ".cache"]
            for name in names:
                full = f"{directory}/{name}"
                path = full.removeprefix(f"{self.path}/")
                try:
                    status = os.stat(full)
                except FileNotFoundError:
                    continue  # a link that leads nowhere
                digest = self._digest(full, path)
                if digest is not None and stat.S_ISREG(status.st_mode):
                    yield FileEntry(path, status.st_size, digest, digest.hex)

    def _digest(self, full: str, path: str) -> Digest | None:
        """The digest that the file is said to have: the Hub's etags are those, SHA-256 for LFS, git's SHA-1 else."""
        if self.repo:
            told = os.path.basename(os.readlink(full)) if os.path.islink(full) else ""
        else:
            told = _downloaded(self.path, path)
        return Digest.parse(told)


def find(path: str, repo_id: RepoId, revision: Revision) -> Folder:
    """A plain folder, or of a huggingface_hub cache the snapshot that it means.

    Raises CacheError(INVALID_REQUEST) where there is none.
    """
    if not os.path.isabs(path):
        raise CacheError(Reason.INVALID_REQUEST, f"'{shown(path)}' is not an absolute path, as the daemon sees it")
    if not os.path.isdir(path):
        mend = "in Kubernetes, mount it into the daemon's pod too"
        raise CacheError(Reason.INVALID_REQUEST, f"'{shown(path)}' is no directory that the daemon sees", mend=mend)
    repo = _repository(path, repo_id)
    if repo is None:
        return Folder(path, commit=_downloaded_commit(path))
    folder = _snapshot(repo, revision)
    if folder is None:
        try:
            there = _commits(repo)
        except OSError as error:
            raise _unreadable(f"{repo}/snapshots", error) from error
        named = ", ".join(there[:_NAMED]) or "none"
        raise CacheError(
            Reason.INVALID_REQUEST, f"'{shown(repo)}' has no snapshot of {revision}", mend=f"its commits are: {named}"
        )
    return folder


def look(directories: Iterable[Path], repo_id: RepoId, revision: Revision) -> list[Folder]:
    """Where the model lies in directories that hold several: caches of huggingface_hub's, and trees of ``org/name``.

    A cache that has the repository and not that revision is one of them: its blobs may be the same.
    """
    found = []
    for directory in map(str, directories):
        repo = _repository(directory, repo_id)
        if repo is not None:
            found.append(_snapshot(repo, revision) or Folder(f"{repo}/snapshots/none", repo))
        elif os.path.isdir(plain := f"{directory}/{repo_id}"):
            commit = _downloaded_commit(plain)
            means_it = revision in ("main", commit)
            found.append(Folder(plain, commit=commit if means_it else None))
    return found


def repositories(path: Path) -> int:
    """How many models a directory has that ``look`` would find. Raises OSError where it cannot be listed."""
    names = {*os.listdir(path)}
    cached = {*names, *(os.listdir(path / "hub") if "hub" in names else ())}
    if any(repo_id_of_folder(name) for name in cached):
        return sum(repo_id_of_folder(name) is not None for name in cached)
    return sum(
        child.is_dir() and not child.name.startswith(".")
        for name in names
        if (path / name).is_dir()
        for child in (path / name).iterdir()
    )


def _repository(path: str, repo_id: RepoId) -> str | None:
    """Of a huggingface_hub cache (HF_HOME, or its hub/), or of the repository's directory in one."""
    for repo in (f"{path}/hub/{repo_folder(repo_id)}", f"{path}/{repo_folder(repo_id)}", path):
        if os.path.isdir(f"{repo}/snapshots") and os.path.isdir(f"{repo}/blobs"):
            return repo
    return None


def _snapshot(repo: str, revision: Revision) -> Folder | None:
    commit = as_commit(revision) or as_commit(_line(f"{repo}/refs/{revision}"))
    if commit is None and revision == "main":
        commits = _commits(repo)  # one that was made by its commit has no refs
        commit = Commit(commits[0]) if len(commits) == 1 else None
    if commit is None or not os.path.isdir(f"{repo}/snapshots/{commit}"):
        return None
    return Folder(f"{repo}/snapshots/{commit}", repo, commit)


def _commits(repo: str) -> list[str]:
    return sorted(filter(as_commit, os.listdir(f"{repo}/snapshots")))


def _downloaded_commit(path: str) -> Commit | None:
    """Which commit ``hf download --local-dir`` brought; None where several, or none."""
    commits = set()
    for directory, _, names in os.walk(f"{path}/{DOWNLOADS}"):
        for name in names:
            if name.endswith(".metadata"):
                commits.add(as_commit(_line(f"{directory}/{name}")))
    (commit,) = commits if len(commits) == 1 else (None,)
    return commit


def _downloaded(path: str, file: str) -> str:
    """The etag of a file that ``hf download --local-dir`` brought; empty where it did not."""
    lines = _lines(f"{path}/{DOWNLOADS}/{file}.metadata")
    return lines[1] if len(lines) >= 2 else ""


def _line(path: str) -> str:
    return (_lines(path) or [""])[0]


def _lines(path: str) -> list[str]:
    """Empty where there is no file. Others may write the folder still: no link, no FIFO, and not more of it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return []
        text = os.read(descriptor, _LINE_BYTES).decode("ascii", errors="replace")
        return [line.strip() for line in text.splitlines()]
    finally:
        os.close(descriptor)


def _unreadable(path: str, error: OSError) -> CacheError:
    return CacheError(Reason.INVALID_REQUEST, f"'{shown(path)}' cannot be read: {error.strerror}")


def check(folder: Folder, entries: Iterable[FileEntry]) -> None:
    """Refuses (INVALID_REQUEST), by file, what cannot be read, is no file, or has another size."""
    wrong = [
        f"{entry.path}{told}"
        for entry in entries
        if folder.locate(entry) is None and (told := _wrong(f"{folder.path}/{entry.path}", entry)) is not None
    ]
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
        return f": {error.strerror}"
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return " is no file"
    if status.st_size != entry.size_bytes:
        return f" has {status.st_size} bytes, not {entry.size_bytes}"
    return None

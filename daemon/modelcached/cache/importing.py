"""A model that lies on this machine already: taken from there, and removed there where it is given away.

What counts is what the Hub lists; where it is silent, what the folder says of itself. Each file is hashed on the way.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from modelcached.errors import CacheError, Reason
from modelcached.model import Digest, FileEntry, shown
from modelcached.sources.folder import DOWNLOADS, Folder
from modelcached.store.disk import Disk
from modelcached.store.measure import BLOCK
from modelcached.transfer.hashing import hash_file

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Import:
    """Where a request takes its model from."""

    folder: Folder
    moves: bool = False
    """It is given away: what was taken is removed there when the model is whole here."""


def check_elsewhere(folder: Folder, cache_dir: str) -> None:
    """Refuses (INVALID_REQUEST) a folder that is the cache's own: it would be given away to itself. Blocking."""
    hub = f"{cache_dir}/hub"
    inside = os.path.realpath(folder.path).startswith(f"{os.path.realpath(cache_dir)}/")
    mounted = folder.repo and os.path.exists(hub) and os.path.samefile(os.path.dirname(folder.repo), hub)
    if inside or mounted:
        raise CacheError(
            Reason.INVALID_REQUEST,
            f"'{shown(folder.path)}' lies in the cache itself",
            mend="ask for the model (cachectl pull): what is there is verified and served",
        )


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of a folder that was given away."""

    freed_bytes: int
    """What du loses there."""
    kept: tuple[str, ...]
    """Files that stay, by their paths in the repository: another content, or they could not be removed."""


def remove_taken(
    disk: Disk,
    folder: Folder,
    entries: Iterable[FileEntry],
    blob: Callable[[Digest], str],
    stopping: threading.Event,
) -> Removed:
    """Removes from the folder what the cache has by now: the same inode, or content that is read and is the same.

    What else lies there stays. ``blob``: the cache's own file. Blocking: what was copied is read once more.
    Raises CacheError(SHUTTING_DOWN).
    """
    freed, kept, digests = 0, [], set()
    for entry in entries:
        name = f"{folder.path}/{entry.path}"
        try:
            if not _is_the_same(name, entry, blob(entry.digest), stopping):
                kept.append(entry.path)
                continue
            freed += _bytes_of_last_name(name)
            disk.unlink(name)
        except FileNotFoundError:
            continue  # an earlier try came so far
        except OSError as error:
            log.warning("what was imported stays in its folder", path=name, why=str(error))
            kept.append(entry.path)
            continue
        digests.add(entry.digest)
        if not folder.repo:
            for ending in (".metadata", ".lock"):
                with contextlib.suppress(OSError):
                    disk.unlink(f"{folder.path}/{DOWNLOADS}/{entry.path}{ending}")
    try:
        freed += _tidy_repository(disk, folder, digests) if folder.repo else 0
        _remove_empty(disk, folder.path)
    except OSError as error:
        log.warning("the folder of what was imported stays", path=folder.path, why=str(error))
    return Removed(freed, tuple(kept))


def _is_the_same(name: str, entry: FileEntry, blob: str, stopping: threading.Event) -> bool:
    status = os.stat(name)
    if not stat.S_ISREG(status.st_mode) or status.st_size != entry.size_bytes:
        return False
    ours = os.stat(blob)
    if (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino):
        return True
    return hash_file(name, entry.digest, stopping)


def _bytes_of_last_name(path: str) -> int:
    """What du loses with the name: nothing while the inode has another one."""
    status = os.lstat(path)
    return status.st_blocks * BLOCK if status.st_nlink == 1 else 0


def _tidy_repository(disk: Disk, folder: Folder, digests: set[Digest]) -> int:
    """Of a cache of huggingface_hub's: blobs that no snapshot links to any more, and what names an empty snapshot."""
    wanted = set()
    for directory, _, names in os.walk(f"{folder.repo}/snapshots"):
        for name in names:
            if os.path.islink(full := f"{directory}/{name}"):
                wanted.add(os.path.basename(os.readlink(full)))
    freed = 0
    for digest in digests:
        path = f"{folder.repo}/blobs/{digest.hex}"
        if digest.hex not in wanted and os.path.lexists(path):
            freed += _bytes_of_last_name(path)
            disk.unlink(path)
    _remove_empty(disk, folder.path)
    if os.path.isdir(folder.path) or folder.commit is None:
        return freed
    for directory, _, names in os.walk(f"{folder.repo}/refs"):
        for name in names:
            with open(full := f"{directory}/{name}", encoding="ascii", errors="replace") as file:
                says = file.read(64).strip()
            if says == folder.commit:
                disk.unlink(full)
    disk.unlink(f"{folder.repo}/trees/{folder.commit}.json")
    for name in ("snapshots", "blobs", "refs", "trees"):
        _remove_empty(disk, f"{folder.repo}/{name}")
    if disk.rmdir(folder.repo):
        parent, name = os.path.split(folder.repo)
        disk.remove_tree(f"{parent}/.locks/{name}")  # the library's, of nothing by now
    return freed


def _remove_empty(disk: Disk, path: str) -> None:
    """The directory and those in it, as far as nothing lies there."""
    for directory, _, _ in os.walk(path, topdown=False):
        disk.rmdir(directory)

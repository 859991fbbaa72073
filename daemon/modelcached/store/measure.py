"""How much is on the disk, as du and df say it. Changes nothing."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

BLOCK = 512  # stat(2): st_blocks counts these, whatever the filesystem's own block is

Sizes = dict[int, int]
"""Allocated bytes by inode."""


def measure(
    path: str, *, skip: frozenset[str] = frozenset(), deep: bool = True, device: int | None = None
) -> tuple[Sizes, OSError | None]:
    """Allocated bytes of all at and below path, as du -x counts; what vanishes meanwhile counts nothing.

    By inode, but those of directories and symlinks together under the first one's: they are never of two areas at
    once, and a cache has a link for each file. Other filesystems that are mounted below are nobody's business here:
    their bytes are not the cache's. The second is why not all of it could be seen (the last error), or None. Without
    ``deep``: of path alone. ``device``: of the filesystem that counts; path's own where none is given.
    """
    sizes: Sizes = {}
    unseen: OSError | None = None
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return sizes, None
    except OSError as error:
        return sizes, error
    if status.st_dev != (device := device or status.st_dev):
        return sizes, None
    top = add(sizes, status)
    pending = [path] if deep and stat.S_ISDIR(status.st_mode) else []
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.path in skip:
                        continue
                    try:
                        item = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if item.st_dev != device:
                        continue
                    if stat.S_ISDIR(item.st_mode):
                        pending.append(entry.path)
                    add(sizes, item, top)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unseen = error
    return sizes, unseen


def add(sizes: Sizes, status: os.stat_result, top: int | None = None) -> int:
    """Counts it; under which inode."""
    alone = stat.S_ISDIR(status.st_mode) or (stat.S_ISLNK(status.st_mode) and status.st_nlink == 1)
    if top is None or not alone:
        sizes[status.st_ino] = status.st_blocks * BLOCK
        return status.st_ino
    sizes[top] += status.st_blocks * BLOCK
    return top


def bytes_of_name(path: str) -> int:
    """What du loses when this name goes: nothing where it is not there, or its inode has another name."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return status.st_blocks * BLOCK if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1 else 0


@dataclass(frozen=True, slots=True)
class Filesystem:
    """As statvfs(3) describes it."""

    size_bytes: int
    free_bytes: int
    """What an unprivileged writer may still use (f_bavail)."""
    inodes: int | None
    """How many there can be; None where the filesystem makes them as they are wanted (btrfs)."""
    free_inodes: int | None


def filesystem(path: str) -> Filesystem:
    """The one that holds path, now."""
    status = os.statvfs(path)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    if status.f_files == 0:
        return Filesystem(size, free, None, None)
    return Filesystem(size, free, status.f_files, status.f_favail)

"""Which directory is which, and where it is mounted: a name can be given to another directory, a mount stays.

A pod's mount of hub/ holds its inode. Whoever renames or removes hub/ and makes a new one leaves the pod with
the old one until it is restarted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass

PROC = "/proc"
_REMOTE = ("nfs", "cifs", "smb", "ceph", "9p", "virtiofs", "lustre", "gpfs", "beegfs", "afs", "gluster", "gfs2", "fuse")
"""Beginnings of filesystem types that others may change without this kernel's knowing."""

_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100
_STATX_BTIME = 0x800
_libc = ctypes.CDLL(None, use_errno=True)


class _Statx(ctypes.Structure):
    """struct statx (statx(2)), as far as the birth time."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 76),
        ("born_seconds", ctypes.c_int64),
        ("born_nanoseconds", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 164),
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """A directory itself, whatever its name is."""

    device: int
    inode: int
    born_ns: int
    """When it was made; 0 where the filesystem does not say. A number of an inode is soon given to another one."""

    def __str__(self) -> str:
        """As it is remembered."""
        return f"{self.device} {self.inode} {self.born_ns}"

    @classmethod
    def parse(cls, text: str) -> Identity | None:
        """None for what ``str`` did not make."""
        parts = text.split()
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            return None
        return cls(*map(int, parts))


def identity(path: str) -> Identity | None:
    """Of the directory that has this name now; None where there is none, or a symlink. Raises OSError."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISDIR(status.st_mode):
        return None
    return Identity(status.st_dev, status.st_ino, _born_ns(path))


def _born_ns(path: str) -> int:
    if not hasattr(_libc, "statx"):
        return 0
    found = _Statx()
    flags, mask = ctypes.c_int(_AT_SYMLINK_NOFOLLOW), ctypes.c_uint(_STATX_BTIME)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), flags, mask, ctypes.byref(found)) != 0:
        return 0
    if not found.mask & _STATX_BTIME:
        return 0
    return int(found.born_seconds) * 1_000_000_000 + int(found.born_nanoseconds)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of mountinfo (proc_pid_mountinfo(5))."""

    device: str
    """major:minor."""
    point: str
    kind: str
    """The filesystem's type."""


def parse_mountinfo(text: str) -> Iterator[Mount]:
    """Every mount of a mount namespace."""
    for line in text.splitlines():
        fields = line.split(" ")
        with contextlib.suppress(ValueError, IndexError):
            yield Mount(fields[2], _unescaped(fields[4]), fields[fields.index("-", 6) + 1])


def _unescaped(text: str) -> str:
    """Spaces, tabs, newlines and backslashes are octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(proc: str, process: str) -> list[Mount]:
    try:
        with open(f"{proc}/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return list(parse_mountinfo(file.read()))
    except OSError:
        return []


def mounts_below(path: str, proc: str = PROC) -> frozenset[str]:
    """Where something is mounted below the directory, as paths that begin with ``path``."""
    real = os.path.realpath(path)
    points = (mount.point for mount in _read(proc, "self"))
    return frozenset(path + point[len(real) :] for point in points if point.startswith(f"{real}/"))


def is_mounted(path: str, mounts: frozenset[str]) -> bool:
    """Something is mounted there, or below."""
    return any(mount == path or mount.startswith(f"{path}/") for mount in mounts)


def _holding(path: str, proc: str) -> Mount | None:
    """The mount that the path lies in."""
    real = os.path.realpath(path)
    best: Mount | None = None
    for mount in _read(proc, "self"):
        holds = mount.point in ("/", real) or real.startswith(f"{mount.point}/")
        if holds and (best is None or len(mount.point) >= len(best.point)):  # the last one hides those before
            best = mount
    return best


def kind_of(path: str, proc: str = PROC) -> str | None:
    """The type of the filesystem that holds the path; None where it cannot be seen."""
    mount = _holding(path, proc)
    return mount.kind if mount is not None else None


def remote_kind(path: str, proc: str = PROC) -> str | None:
    """The type of the filesystem that holds the path if others may change it unnoticed, else None."""
    mount = _holding(path, proc)
    if mount is None or mount.kind == "fuseblk" or not mount.kind.startswith(_REMOTE):
        return None
    return mount.kind


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who has a directory mounted."""

    pid: int
    program: str
    point: str
    """Where, as that process sees it."""
    pod_uid: str
    """Of a pod of Kubernetes; empty where it is none, or cannot be seen."""

    def __str__(self) -> str:
        pod = f", pod {self.pod_uid}" if self.pod_uid else ""
        return f"process {self.pid} ({self.program}{pod}) at {self.point}"


_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")


def holders(directory: Identity, near: str, proc: str = PROC) -> list[Holder]:
    """Who has the directory mounted, as far as /proc shows: one process for each mount namespace.

    ``near``: a path on the directory's filesystem, which stat(2) and mountinfo may call by different numbers (btrfs).
    """
    found, seen = [], set()
    own = _holding(near, proc)
    for name in sorted((name for name in os.listdir(proc) if name.isdigit()), key=int):
        try:
            namespace = os.readlink(f"{proc}/{name}/ns/mnt")
        except OSError:  # gone, or not ours to see
            continue
        if namespace in seen:
            continue
        seen.add(namespace)
        for mount in _read(proc, name):
            if own is None or mount.device != own.device:  # another filesystem, perhaps one that does not answer
                continue
            try:
                status = os.stat(f"{proc}/{name}/root{mount.point}")
            except OSError:
                continue
            if (status.st_dev, status.st_ino) == (directory.device, directory.inode):
                found.append(Holder(int(name), _text(f"{proc}/{name}/comm"), mount.point, _pod(proc, name)))
    return found


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _pod(proc: str, process: str) -> str:
    match = _POD.search(_text(f"{proc}/{process}/cgroup"))
    return match[1].replace("_", "-") if match else ""

"""A filesystem in a process of its own that hands on to a directory, and fails on demand. Needs mfusepy and libfuse 3.

``python -m tests.node.passthrough DIRECTORY MOUNTPOINT`` says ``{"mounted": true}`` when it is, then obeys a line of
JSON at a time and answers each with one (see ``_obey``); FaultyDisk in disks.py is its other end. It ends when it is
unmounted, or with whoever started it.

Nothing is cached in the kernel (direct I/O, no attribute kept), so that each call of the daemon comes here.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mfusepy

_AT_FDCWD = -100
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

_CHANGES = {"chmod", "chown", "create", "fallocate", "link", "mkdir", "rename", "rmdir", "symlink", "truncate"}
_CHANGES |= {"unlink", "utimens", "write"}
"""What a read-only filesystem refuses, on descriptors that were open before too."""


@dataclass
class _Fault:
    """What fails, and how often it has."""

    operation: str
    pattern: str
    code: int
    after: int = 0
    """Calls that still succeed."""
    fired: int = 0


class Passthrough(mfusepy.Operations):
    """Paths come from libfuse and begin with a slash; descriptors are the directory's own files'."""

    use_ns = True

    def __init__(self, root: str) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._read_only = False

    # Failing

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """``fail`` (an operation, with ``pattern`` and ``error``), ``heal``, ``read_only``; how many calls failed."""
        with self._lock:
            fired = sum(fault.fired for fault in self._faults)
            if "fail" in order:
                code = getattr(errno, order["error"])
                self._faults.append(_Fault(order["fail"], order["pattern"], code, order.get("after", 0)))
            if order.get("heal"):
                self._faults, self._read_only = [], False
            if order.get("read_only"):
                self._read_only = True
        return {"fired": fired}

    def _meet(self, operation: str, *paths: str) -> None:
        """Every call comes here first."""
        with self._lock:
            if self._read_only and operation in _CHANGES:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            for fault in self._faults:
                if fault.operation == operation and any(fnmatchcase(path, fault.pattern) for path in paths):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.fired += 1
                    raise OSError(fault.code, os.strerror(fault.code))

    def _at(self, path: str) -> str:
        return self._root + path

    # Looking

    def init(self, path: str) -> None:
        print(json.dumps({"mounted": True}), flush=True)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        self._meet("getattr", path)
        status = os.lstat(self._at(path)) if fh is None else os.fstat(fh)
        names = ("mode", "ino", "dev", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks")
        found = {f"st_{name}": getattr(status, f"st_{name}") for name in names}
        return found | {f"st_{name}": getattr(status, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}

    def readdir(self, path: str, fh: int) -> Any:
        self._meet("readdir", path)
        found: list[Any] = [".", ".."]
        with os.scandir(self._at(path)) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                found.append((entry.name, {"st_ino": status.st_ino, "st_mode": status.st_mode}, 0))
        return found

    def readlink(self, path: str) -> str:
        self._meet("readlink", path)
        return os.readlink(self._at(path))

    def statfs(self, path: str) -> dict[str, int]:
        status = os.statvfs(self._root)
        names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax")
        return {f"f_{name}": getattr(status, f"f_{name}") for name in names}

    def access(self, path: str, amode: int) -> int:
        return 0

    # Files

    def open(self, path: str, flags: int) -> int:
        self._meet("open", path)
        return os.open(self._at(path), flags & ~os.O_DIRECT)

    def create(self, path: str, mode: int, flags: int) -> int:  # type: ignore[override]
        self._meet("create", path)
        descriptor = os.open(self._at(path), flags | os.O_CREAT, mode)
        os.fchmod(descriptor, mode)
        return descriptor

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._meet("read", path)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._meet("write", path)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._meet("truncate", path)
        os.truncate(self._at(path) if fh is None else fh, length)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        self._meet("fallocate", path)
        if _libc.fallocate(fh, mode, ctypes.c_int64(offset), ctypes.c_int64(size)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._meet("fsync", path)
        (os.fdatasync if datasync else os.fsync)(fh)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    # Names

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._meet("fsyncdir", path)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._meet("mkdir", path)
        os.mkdir(self._at(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        self._meet("rmdir", path)
        os.rmdir(self._at(path))
        return 0

    def unlink(self, path: str) -> int:
        self._meet("unlink", path)
        os.unlink(self._at(path))
        return 0

    def symlink(self, target: str, source: str) -> int:
        """``target`` is the link's own path, ``source`` what it says: mfusepy's words."""
        self._meet("symlink", target)
        os.symlink(source, self._at(target))
        return 0

    def link(self, target: str, source: str) -> int:
        self._meet("link", target)
        os.link(self._at(source), self._at(target), follow_symlinks=False)
        return 0

    def rename(self, old: str, new: str, flags: int = 0) -> int:
        self._meet("exchange" if flags else "rename", old, new)
        self._meet("rename", old, new)
        one, other = os.fsencode(self._at(old)), os.fsencode(self._at(new))
        if _libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, flags) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._meet("chmod", path)
        os.chmod(self._at(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        self._meet("chown", path)
        os.lchown(self._at(path), uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._meet("utimens", path)
        os.utime(self._at(path), ns=times, follow_symlinks=False)
        return 0


class PassthroughWithLocks(Passthrough):
    """Locks are asked of this process, as on a network filesystem, instead of kept by the kernel."""

    def flock(self, path: str, fh: int, op: int) -> int:
        self._meet("flock", path)
        return 0


class _Fuse(mfusepy.FUSE):
    """mfusepy takes rename's flags for none: an exchange of two directories would be a rename."""

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        return self.operations.rename(os.fsdecode(old), os.fsdecode(new), flags)  # type: ignore[no-any-return]


def _obey(operations: Passthrough) -> None:
    for line in sys.stdin:
        print(json.dumps(operations.obey(json.loads(line))), flush=True)


def main() -> None:
    """Until it is unmounted."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    root, mountpoint, *options = sys.argv[1:]
    os.umask(0)
    operations = (PassthroughWithLocks if "--locks" in options else Passthrough)(root)
    threading.Thread(target=_obey, args=(operations,), daemon=True).start()
    _Fuse(
        operations,
        mountpoint,
        foreground=True,
        allow_other=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
        direct_io=True,
        use_ino=True,
        hard_remove=True,
    )


if __name__ == "__main__":
    main()

"""Disks that fail for real: filesystems on loop devices, in memory and in FUSE, seen by this run alone. Needs root.

Each is a context manager; within it ``path`` is a directory for a cache, beside which others may write.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).parents[2]
_CLONE_NEWNS = 0x00020000
_MIB = 1 << 20
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}  # where mkfs is


def enter_private_mounts() -> None:
    """From here on what this thread and its children mount is theirs alone, and ends with them, however they end.

    A loop device goes with its mount, and a process of FUSE with its own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")
    _run("mount", "--make-rprivate", "/")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def fill_blocks(directory: Path, name: str = "filled") -> None:
    """Another writer takes every block that is left."""
    with (directory / name).open("ab", buffering=0) as file:
        for size in (_MIB, 4096, 4096):
            block = os.urandom(size)
            try:
                while True:
                    file.write(block)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())  # what was promised for its own bookkeeping may be free now


def fill_inodes(directory: Path) -> None:
    """Another writer makes files until there can be none."""
    folder = directory / "many"
    folder.mkdir(exist_ok=True)
    number = len(os.listdir(folder))
    try:
        while True:
            (folder / str(number)).touch()
            number += 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


class Disk(abc.ABC):
    """One filesystem."""

    def __init__(self, root: Path) -> None:
        """``root``: an empty directory for its image and its mount."""
        self.mount = root / "mount"
        self.mount.mkdir(parents=True)
        self.path = self.mount / "cache"

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @abc.abstractmethod
    def attach(self) -> None:
        """Makes the filesystem and mounts it."""

    def detach(self) -> None:
        """Lazily: whoever still has a file open keeps the rest of it until he ends."""
        subprocess.run(["umount", "--lazy", str(self.mount)], capture_output=True, check=False)


class Ext4(Disk):
    """On a loop device, with no blocks reserved for root, who is the daemon."""

    def __init__(self, root: Path, size_bytes: int = 64 * _MIB, *, extents: bool = True) -> None:
        """Without extents it cannot allocate ahead: writing itself meets the full disk."""
        super().__init__(root)
        self._image = root / "image"
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        features = [] if extents else ["-O", "^extent,^64bit"]
        _run("mkfs.ext4", "-q", "-F", "-m", "0", *features, str(self._image))

    def attach(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.mount))

    def break_down(self) -> None:
        """As when its own blocks contradict each other: the kernel makes it read-only, open files too."""
        device = Path(_run("findmnt", "-no", "SOURCE", str(self.mount))).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        """What an operator does, once nobody has it open any more."""
        _run("umount", str(self.mount))
        check = ["e2fsck", "-f", "-y", str(self._image)]
        done = subprocess.run(check, capture_output=True, text=True, check=False, env=_ENVIRONMENT)
        assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: it had something to mend
        self.attach()

    def fill(self) -> None:
        fill_blocks(self.mount)

    def empty(self) -> None:
        for file in self.mount.glob("filled*"):
            file.unlink()


class Tmpfs(Disk):
    """In memory, with so many inodes."""

    def __init__(self, root: Path, inodes: int, size_bytes: int = 256 * _MIB) -> None:
        super().__init__(root)
        self._options = f"size={size_bytes},nr_inodes={inodes}"

    def attach(self) -> None:
        _run("mount", "-t", "tmpfs", "-o", self._options, "tmpfs", str(self.mount))

    def fill(self) -> None:
        fill_inodes(self.mount)

    def empty(self) -> None:
        for file in (self.mount / "many").iterdir():
            file.unlink()


class Btrfs(Disk):
    """On a loop device; the cache is a subvolume that can have a quota, or be made read-only with files open in it."""

    def __init__(self, root: Path, size_bytes: int = 256 * _MIB) -> None:
        super().__init__(root)
        self._image = root / "image"
        with self._image.open("wb") as file:
            file.truncate(size_bytes)
        _run("mkfs.btrfs", "-q", "-f", "-m", "single", "-d", "single", str(self._image))

    def attach(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.mount))
        if not self.path.exists():
            _run("btrfs", "quota", "enable", str(self.mount))
            _run("btrfs", "subvolume", "create", str(self.path))

    def limit(self, size_bytes: int | None) -> None:
        """The subvolume's quota."""
        size = "none" if size_bytes is None else str(size_bytes)
        subvolume = _run("btrfs", "inspect-internal", "rootid", str(self.path))
        # By number, from outside: within a subvolume that is full even this counts against the quota.
        _run("btrfs", "qgroup", "limit", size, f"0/{subvolume}", str(self.mount))

    def used_bytes(self) -> int:
        """As the quota counts, when all is written."""
        return self._counted()[0]

    def exclusive_bytes(self) -> int:
        """Of those, what no other subvolume shares."""
        return self._counted()[1]

    def _counted(self) -> tuple[int, int]:
        _run("btrfs", "filesystem", "sync", str(self.mount))
        shown = _run("btrfs", "qgroup", "show", "-f", "--raw", str(self.path)).splitlines()
        referenced, exclusive = shown[-1].split()[1:3]
        return int(referenced), int(exclusive)

    def set_read_only(self, read_only: bool) -> None:
        _run("btrfs", "property", "set", str(self.path), "ro", str(read_only).lower())


class FaultyDisk(Disk):
    """passthrough.py over a plain directory."""

    def __init__(self, root: Path, *, locks: bool = False) -> None:
        super().__init__(root)
        self._options = ["--locks"] if locks else []
        self._backing = root / "backing"
        self._backing.mkdir()
        self._process: subprocess.Popen[str] | None = None

    def attach(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.node.passthrough", str(self._backing), str(self.mount), *self._options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        assert self._answer() == {"mounted": True}

    def detach(self) -> None:
        super().detach()
        process = self._process
        assert process is not None
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # somebody has a file open
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _order(self, **order: Any) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["fired"])

    def fail(self, operation: str, pattern: str, error: str = "EIO", *, after: int = 0) -> None:
        """From now on, or from so many calls on, the operation fails for paths below the mount that match the glob."""
        self._order(fail=operation, pattern=pattern, error=error, after=after)

    def make_read_only(self) -> None:
        """Everything that changes anything fails with EROFS, on descriptors that are open too."""
        self._order(read_only=True)

    def heal(self) -> int:
        """Nothing fails any more; how many calls had."""
        return self._order(heal=True)

    def fired(self) -> int:
        """How many calls have failed by a fault that was ordered."""
        return self._order()

"""A disk that forgets what nobody synced.

What a power loss leaves is worked out from three things that are kept while the calls come: what each file held at
its last fsync or fdatasync, which names each directory had at its own last fsync, and which names there were when
anything was synced last. From these a directory is made as one of several disks could leave it; see ``WAYS``. The
inodes are the same, for records know blobs by inode: every file has a second name among the ``graves``, which keeps it.

SQLite's files do not come through the seam. What was in them when the daemon had opened them is what was synced:
with synchronous=NORMAL nothing is until the next checkpoint, and a run is too short to have one.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from modelcached.store.disk import Disk

WAYS = ("bare", "ordered", "named", "small", "scattered")
"""What is left of it:

bare      nothing but what was synced, names by the fsync of their own directory, and the names of the directories
          on the way to it (POSIX does not promise the latter; ext4, XFS and btrfs do it)
ordered   names and modes as they were when anything was synced last, contents as synced: a journal that commits in
          order (ext4, XFS), the moment before it commits again
named     names and modes as they are now, contents as synced and zeros behind: the journal has committed, the data
          was not yet written back
small     the same, but what is small was written back, and what is large was not: journals and records that speak
          of data which is not there
scattered the names in blobs/ and partial/ as they are now, all others as synced: directories are written back in no
          order
"""
_SMALL_BYTES = 16 << 10
_STATE = ("state.db", "state.db-wal")

Names = dict[str, int | str]
"""Of one directory: name -> inode, or the text of a symbolic link."""


class ForgetfulDisk(Disk):
    """Keeps what it takes to lose the power at any moment. For one thread."""

    def __init__(self, root: str, graves: str) -> None:
        super().__init__()
        self._root = root
        self._graves = graves
        self._modes: dict[int, int] = {}
        """As synced, by inode."""
        self._contents: dict[int, bytes] = {}
        """As synced, by inode, of files that were written to since the start."""
        self._names: dict[int, Names] = {}
        """As synced, by inode of the directory."""
        self._held: dict[int, int] = {}
        """Descriptors of directories: an inode that is still open is not given to another."""
        self._moves: list[tuple[int, int, str, int]] = []
        """Renames of which the new directory was not synced: that one, the old one, the old name, and whose."""
        self._state: dict[str, bytes] = {}
        os.makedirs(graves)
        os.makedirs(root, exist_ok=True)
        self._ordered = self._tree()
        self._names |= self._ordered

    def announce(self, before: Callable[[str, str], None]) -> None:
        """From now on."""
        self._before = before

    def keep_state(self, path: str) -> None:
        """SQLite's files as they are now are on the disk."""
        for suffix in ("", "-wal"):
            if os.path.exists(path + suffix):
                self._state[f"state.db{suffix}"] = Path(path + suffix).read_bytes()

    # What there is now

    def _tree(self) -> dict[int, Names]:
        """Every directory's names; whatever is met for the first time is held."""
        tree: dict[int, Names] = {}
        pending = [self._root]
        while pending:
            directory = pending.pop()
            names: Names = {}
            for entry in os.scandir(directory):
                if entry.name.startswith("state.db"):
                    continue
                if entry.is_symlink():
                    names[entry.name] = os.readlink(entry.path)
                    continue
                names[entry.name] = entry.inode()
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    self._bury(entry.path)
            tree[self._hold(directory)] = names
        return tree

    def _hold(self, directory: str) -> int:
        status = os.lstat(directory)
        if status.st_ino not in self._held:
            self._held[status.st_ino] = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            self._modes[status.st_ino] = stat.S_IMODE(status.st_mode)
        return status.st_ino

    def _bury(self, path: str) -> int:
        """Gives the file a name that nobody removes."""
        status = os.lstat(path)
        grave = f"{self._graves}/{status.st_ino}"
        if not os.path.exists(grave):
            os.link(path, grave)
            self._modes[status.st_ino] = stat.S_IMODE(status.st_mode)
        return status.st_ino

    def _content(self, inode: int) -> bytes:
        return Path(self._graves, str(inode)).read_bytes()

    # The calls

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        super().mkdir(path, mode)
        self._names.setdefault(self._hold(path), {})

    def create(self, path: str, mode: int = 0o600) -> int:
        descriptor = super().create(path, mode)
        self._contents[self._bury(path)] = b""
        return descriptor

    def open_or_create(self, path: str, mode: int = 0o600) -> int:
        known = os.path.exists(path)
        descriptor = super().open_or_create(path, mode)
        inode = self._bury(path)
        if not known:
            self._contents[inode] = b""
        return descriptor

    def _touch(self, descriptor: int) -> None:
        """A file from before this start is about to be changed: as it is now, it is on the disk."""
        inode = os.fstat(descriptor).st_ino
        if inode not in self._contents:
            self._contents[inode] = self._content(inode)

    def allocate(self, descriptor: int, size_bytes: int, path: str) -> bool:
        self._touch(descriptor)
        return super().allocate(descriptor, size_bytes, path)

    def write_at(self, descriptor: int, data: memoryview, offset: int, path: str) -> None:
        self._touch(descriptor)
        super().write_at(descriptor, data, offset, path)

    def append(self, descriptor: int, data: bytes, path: str) -> None:
        self._touch(descriptor)
        super().append(descriptor, data, path)

    def truncate(self, descriptor: int, size_bytes: int, path: str) -> None:
        self._touch(descriptor)
        super().truncate(descriptor, size_bytes, path)

    def _synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if status.st_ino in self._contents:
            self._contents[status.st_ino] = self._content(status.st_ino)
        self._modes[status.st_ino] = stat.S_IMODE(status.st_mode)
        self._ordered = self._tree()

    def rename(self, source: str, target: str) -> None:
        child = os.lstat(source).st_ino
        super().rename(source, target)
        directory, name = os.path.split(source)
        self._moves.append((os.lstat(os.path.dirname(target)).st_ino, os.lstat(directory).st_ino, name, child))

    def _complete_moves(self, target: int) -> None:
        """With its new name on the disk, the old one is gone: no filesystem shows a file that was renamed twice.

        The other way round nothing is promised: the old name may be gone, and the new one not there.
        """
        for move in [move for move in self._moves if move[0] == target]:
            self._moves.remove(move)
            _, source, name, child = move
            if self._names[source].get(name) == child:
                self._names[source] = {n: i for n, i in self._names[source].items() if n != name}

    def sync(self, descriptor: int, path: str) -> None:
        self._before("fsync", path)
        self._synced(descriptor)

    def sync_data(self, descriptor: int, path: str) -> None:
        self._before("fdatasync", path)
        self._synced(descriptor)

    def sync_directory(self, path: str) -> None:
        self._before("fsync", path)
        self._ordered = self._tree()
        inode = os.lstat(path).st_ino
        self._names[inode] = self._ordered[inode]
        self._complete_moves(inode)
        while path != self._root:
            path, name = os.path.split(path)
            inode, child = os.lstat(path).st_ino, inode
            self._names[inode] = self._names[inode] | {name: child}

    # The loss

    def lose(self, way: str, into: str) -> None:
        """Makes ``into`` what is left of the root. This disk cannot be used afterwards."""
        now = self._tree()
        tree = {"bare": self._names, "ordered": self._ordered, "scattered": self._names}.get(way, now)
        for inode, synced in self._contents.items():
            self._forget(inode, synced, way)
        pending = [(os.lstat(self._root).st_ino, into)]
        while pending:
            inode, path = pending.pop()
            os.mkdir(path)
            os.chmod(path, self._modes[inode] if way == "bare" else stat.S_IMODE(os.fstat(self._held[inode]).st_mode))
            names = now if way == "scattered" and os.path.basename(path) in ("blobs", "partial") else tree
            for name, there in names.get(inode, {}).items():
                if isinstance(there, str):
                    os.symlink(there, f"{path}/{name}")
                elif there in self._held:
                    pending.append((there, f"{path}/{name}"))
                else:
                    os.link(f"{self._graves}/{there}", f"{path}/{name}")
        self._leave_state(way, f"{into}/modelcached")

    def _forget(self, inode: int, synced: bytes, way: str) -> None:
        grave = f"{self._graves}/{inode}"
        status = os.lstat(grave)
        if way == "bare":
            os.chmod(grave, self._modes[inode])
        if way == "small" and status.st_size <= _SMALL_BYTES:
            return
        left = synced if way == "bare" else synced[: status.st_size].ljust(status.st_size, b"\0")
        with open(grave, "r+b") as file:
            file.write(left)
            file.truncate(len(left))
        os.utime(grave, ns=(status.st_atime_ns, status.st_mtime_ns))  # what the stamp of a blob is compared with

    def _leave_state(self, way: str, private: str) -> None:
        if not os.path.isdir(private):
            return
        for name in _STATE:
            now, path = f"{self._root}/modelcached/{name}", f"{private}/{name}"
            if way == "small":  # written back, and cut in the middle of a frame
                if os.path.exists(now):
                    shutil.copy(now, path)
                    os.truncate(path, os.path.getsize(path) * (2 if name.endswith("-wal") else 3) // 3)
            elif name in self._state and not (way == "ordered" and name.endswith("-wal")):
                Path(path).write_bytes(self._state[name])

"""Files that lie on this machine already, taken into the cache without copying them.

Cloned, where the filesystem shares blocks (btrfs, XFS): what becomes of the other file then is nobody's concern. Else
the inode itself gets a second name here, and only where nobody else may write it: it is ours and read-only, or its
owner gives it away. Either way it lies in staging/ until it is verified, so nothing is left of it after a kill.

Life of a taken file::

    take     staging/<name>: a clone, or a link to the inode
    read     all of it, by whoever hashes it
    publish  ours, 0444, fsync, rename into hub/<repo>/blobs/<digest>, fsync the directory

A linked inode is kept by a read lease (fcntl(2), F_SETLEASE) from before it is read until it is ours: the kernel grants
it only where nobody has the file open for writing, and whoever wants to open it so waits, or takes the lease away,
which is seen before anything is published.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat

from modelcached.model import Digest, RepoId
from modelcached.store.disk import Disk, naming
from modelcached.store.layout import Layout

_READABLE = 0o444
_WRITABLE = 0o222


class TakenAwayError(Exception):
    """Somebody else wants to write the file: it cannot be had without copying it."""


class Taken:
    """One such file, open for reading. Made by ``take``."""

    hard_allocated = True
    """It has its blocks."""

    def __init__(self, disk: Disk, layout: Layout, digest: Digest, path: str, descriptor: int, *, linked: bool) -> None:
        self.digest = digest
        self.linked = linked
        """It is another's inode still."""
        self.published = False
        """It is a blob by now: there is nothing to discard."""
        self._disk = disk
        self._layout = layout
        self._path = path
        self._descriptor = descriptor

    def allocated(self) -> dict[int, int]:
        """Allocated bytes by inode."""
        status = os.fstat(self._descriptor)
        return {status.st_ino: status.st_blocks * 512}

    def read(self, view: memoryview, offset: int) -> int:
        """Reads into view. Any thread. How many bytes there were."""
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            raise naming(error, self._path) from None

    def publish(self, repo_id: RepoId) -> os.stat_result:
        """Moves the verified content into the repository's blobs; its stat there.

        Raises TakenAwayError where somebody may have written it since it was taken; then nothing has changed.
        """
        target = self._layout.blob(repo_id, self.digest)
        directory = os.path.dirname(target)
        self._layout.check_real_directory(directory)
        self._disk.mkdir(os.path.dirname(directory))
        self._disk.mkdir(directory)
        if self.linked:
            self._own()
        self._disk.chmod(self._descriptor, _READABLE, self._path)
        self._disk.sync(self._descriptor, self._path)
        self._disk.rename(self._path, target)
        self.published = True
        self._disk.sync_directory(directory)
        status = os.fstat(self._descriptor)
        # What an earlier try to fetch it left is wanted no more.
        self._disk.unlink(self._layout.partial_data(self.digest))
        self._disk.unlink(self._layout.partial_journal(self.digest))
        return status

    def _own(self) -> None:
        """From here on nobody else may open it for writing; nobody has since it was taken."""
        status = os.fstat(self._descriptor)
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            self._disk.chown(self._descriptor, os.geteuid(), os.getegid(), self._path)
        self._disk.chmod(self._descriptor, _READABLE, self._path)
        if fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            raise TakenAwayError(f"{self._path} is being written by somebody else")

    def close(self) -> None:
        """Ends all use, and what leads to it in staging/ unless it is published; a linked inode stays where it was."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        if not self.published:
            self._disk.unlink(self._path)


def take(disk: Disk, layout: Layout, digest: Digest, size_bytes: int, path: str, *, moves: bool) -> Taken | None:
    """The file in staging/, not yet verified; None where it must be copied. ``moves``: its owner gives it away.

    Blocking. Raises OSError where our own disk is full or broken.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # whoever copies it will say why
    staged = layout.staged(digest.hex)
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
            return None
        return _clone(disk, layout, digest, source, staged) or _link(
            disk, layout, digest, path, source, staged, moves=moves
        )
    finally:
        os.close(source)


def _clone(disk: Disk, layout: Layout, digest: Digest, source: int, staged: str) -> Taken | None:
    target = disk.create(staged)
    try:
        if disk.clone(source, target, staged):
            return Taken(disk, layout, digest, staged, os.dup(target), linked=False)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(staged)
        raise
    finally:
        os.close(target)
    disk.unlink(staged)
    return None


def _link(
    disk: Disk, layout: Layout, digest: Digest, path: str, source: int, staged: str, *, moves: bool
) -> Taken | None:
    status = os.fstat(source)
    # What has another name besides is not only who gives it away's.
    if not (moves and status.st_nlink == 1) and not _is_ours_alone(status):
        return None
    try:
        # The name that a link of the folder's leads to; a link(2) of the link itself would be no file.
        disk.link(os.path.realpath(path), staged)
    except OSError:  # another filesystem, one without, or one whose owner the kernel protects from us
        return None
    descriptor = -1
    try:
        descriptor = os.open(staged, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino) and _lease(descriptor):
            return Taken(disk, layout, digest, staged, descriptor, linked=True)
    except BaseException:
        _give_up(disk, descriptor, staged)
        raise
    _give_up(disk, descriptor, staged)
    return None


def _give_up(disk: Disk, descriptor: int, staged: str) -> None:
    if descriptor >= 0:
        os.close(descriptor)
    disk.unlink(staged)


def _is_ours_alone(status: os.stat_result) -> bool:
    """Nobody may write it, all may read it: linking it changes nothing about it."""
    mode = stat.S_IMODE(status.st_mode)
    return status.st_uid == os.geteuid() and not mode & _WRITABLE and mode & _READABLE == _READABLE


def _lease(descriptor: int) -> bool:
    """Nobody has it open for writing, and we are told before anybody has."""
    try:
        # Whoever wants to write it makes the kernel send a signal: SIGIO would end the daemon, SIGURG does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False  # open for writing, not ours to lease, or a filesystem without leases
    return True

"""One daemon per cache: a lock that names its holder, and the first look at the directory."""

from __future__ import annotations

import fcntl
import os
import socket

from modelcached.errors import CacheError, Reason
from modelcached.store.disk import Disk, storage_error
from modelcached.store.layout import Layout

BALLAST_BYTES = 1 << 20


class OwnerLock:
    """flock on owner.lock; ends with the process. Not shared between hosts on every network filesystem."""

    def __init__(self, disk: Disk, layout: Layout) -> None:
        self._disk = disk
        self._layout = layout
        self._descriptor = -1

    def acquire(self) -> None:
        """Raises CacheError(STORAGE_ERROR) that names the daemon which owns the cache, or says why nobody can."""
        path = self._layout.owner_lock
        descriptor = self._disk.open_or_create(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"{self._layout.cache_dir} is owned by another modelcached: {owner}",
                mend="stop it, or choose another cache.dir",
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"{path} cannot be locked: {error.strerror}",
                mend="choose a filesystem for cache.dir that has flock(2)",
            ) from error
        owner_line = f"pid {os.getpid()} on {socket.gethostname()}\n".encode()
        # Over the old one: on a full disk the block that it gave up could not be had again.
        self._disk.write_at(descriptor, memoryview(owner_line), 0, path)
        self._disk.truncate(descriptor, len(owner_line), path)
        self._descriptor = descriptor

    def release(self) -> None:
        """Lets another daemon have the cache."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def prepare(disk: Disk, layout: Layout) -> None:
    """Creates what is missing below cache.dir, never replaces hub/ (mounts hold its inode)."""
    try:
        disk.make_directories(layout.cache_dir)
        layout.check_real_directory(layout.hub)
        layout.check_real_directory(layout.private)
        disk.mkdir(layout.hub)
        disk.mkdir(layout.private, 0o700)
        disk.chmod_directory(layout.private, 0o700)  # whoever made it
        for path in (layout.partial, layout.staging, layout.trash, layout.quarantine, layout.manifests):
            layout.check_real_directory(path)
            disk.mkdir(path, 0o700)
    except OSError as error:
        raise storage_error(error, "preparing the cache directory") from error


class Ballast:
    """A small file to give up when nothing else can be written, so that eviction still works on a full disk."""

    def __init__(self, disk: Disk, layout: Layout) -> None:
        self._disk = disk
        self._path = f"{layout.private}/ballast"

    def fill(self) -> bool:
        """Allocates it if there is room; whether it is there."""
        try:
            if os.lstat(self._path).st_blocks * 512 >= BALLAST_BYTES:
                return True
            self._disk.unlink(self._path)  # killed between its name and its blocks
        except FileNotFoundError:
            pass
        except OSError:
            return False
        try:
            descriptor = self._disk.create(self._path)
        except OSError:
            return False
        try:
            self._disk.allocate(descriptor, BALLAST_BYTES, self._path)
        except OSError:
            self._disk.unlink(self._path)
            return False
        finally:
            os.close(descriptor)
        return True

    def drop(self) -> None:
        """Gives its blocks back."""
        self._disk.unlink(self._path)

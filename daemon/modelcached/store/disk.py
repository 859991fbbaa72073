"""The one seam for every disk call that changes something.

Nothing else in the daemon may change the filesystem (SQLite's own file apart).
Each method announces itself to ``before`` first, so that a test can stop the
world, fail the call or kill the process at any of them. Reading needs no seam.

Blocking: call it from a disk thread, never from the event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable

from modelcached.errors import CacheError, Reason

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_libc = ctypes.CDLL(None, use_errno=True)
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def storage_error(error: OSError, doing: str) -> CacheError:
    """An OSError of the cache's disk as the daemon's own refusal: what was done, to what, and why it failed."""
    name = f" {error.filename}" if error.filename else ""
    metadata = {"errno": errno.errorcode.get(error.errno or 0, "?")}
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            Reason.NO_SPACE_NOW,
            f"{_what_is_used_up(error)} while {doing}{name}: {error.strerror}",
            metadata=metadata,
            mend="evict models, or remove what others keep there",
        )
    mend = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        mend = f"it must belong to the daemon's user (uid {os.geteuid()}), or be writable for it"
    told = f"{doing}{name} failed: {error.strerror or error}"
    return CacheError(Reason.STORAGE_ERROR, told, metadata=metadata, mend=mend)


def _what_is_used_up(error: OSError) -> str:
    """Inodes are told apart, for then there is free space to be seen."""
    if error.errno == errno.EDQUOT:
        return "the quota below cache.dir is used up"
    if error.filename:
        with contextlib.suppress(OSError):
            status = os.statvfs(os.path.dirname(error.filename))
            if status.f_files and not status.f_favail:
                return f"the filesystem below cache.dir has none of its {status.f_files} inodes left"
    return "the filesystem below cache.dir is full"


def naming(error: OSError, path: str) -> OSError:
    """The same error; calls on descriptors do not say which file it was."""
    if error.filename is None:
        error.filename = path
    return error


_FULL = (errno.ENOSPC, errno.EDQUOT)


def means_full(error: OSError | CacheError) -> bool:
    """The disk, or a quota on it, has no room for what was done."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return error.reason is Reason.NO_SPACE_NOW and error.metadata.get("errno") in [errno.errorcode[n] for n in _FULL]


class Disk:
    """Changes to the filesystem, one method a call."""

    def __init__(self, before: Callable[[str, str], None] | None = None) -> None:
        self._before = before or (lambda _operation, _path: None)

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        """Creates the directory unless it is there; its mode is set whatever the umask."""
        if os.path.isdir(path) and not os.path.islink(path):
            return
        self._before("mkdir", path)
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            if not os.path.isdir(path) or os.path.islink(path):
                raise
            return  # another thread was faster
        self.chmod_directory(path, mode)

    def make_directories(self, path: str) -> None:
        """Creates the directory and what is missing above it; a symlink on the way is the operator's."""
        if os.path.isdir(path):
            return
        self.make_directories(os.path.dirname(path))
        self.mkdir(path)

    def chmod_directory(self, path: str, mode: int) -> None:
        """Sets a directory's mode, where it is another; never follows a symlink."""
        if stat.S_IMODE(os.lstat(path).st_mode) == mode:
            return
        self._before("chmod", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)

    def create(self, path: str, mode: int = 0o600) -> int:
        """A new file for writing; the caller closes the descriptor. Never follows or reuses what is there."""
        self._before("create", path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def open_or_create(self, path: str, mode: int = 0o600) -> int:
        """A file that stays from one daemon to the next, made when missing; the caller closes the descriptor."""
        self._before("create", path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def reopen(self, path: str) -> int:
        """An unfinished file for writing on; the caller closes the descriptor.

        One that was made read-only to be published, by a daemon that was killed before it was, is ours still.
        """
        try:
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self.chmod(descriptor, 0o600, path)
            finally:
                os.close(descriptor)
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def allocate(self, descriptor: int, size_bytes: int, path: str) -> bool:
        """Gives the file its full size with blocks behind it. False where the filesystem cannot: then it is sparse.

        fallocate(2) itself: os.posix_fallocate writes a byte a block where the filesystem lacks it,
        36 million writes for 140 GB.
        """
        self._before("allocate", path)
        if size_bytes == 0:
            return True
        if _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) == 0:
            return True
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), path)
        os.ftruncate(descriptor, size_bytes)
        return False

    def write_at(self, descriptor: int, data: memoryview, offset: int, path: str) -> None:
        """Writes all of data at the offset."""
        self._before("write", path)
        try:
            _pwrite_all(descriptor, data, offset)
        except OSError as error:
            raise naming(error, path) from None

    def write_from_pipe(self, descriptor: int, pipe: int, size_bytes: int, offset: int, path: str) -> None:
        """Writes so many bytes, which the pipe holds, at the offset: splice(2), where the filesystem can."""
        self._before("write", path)
        try:
            while size_bytes:
                try:
                    written = os.splice(pipe, descriptor, size_bytes, offset_dst=offset)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED:
                        raise
                    data = os.read(pipe, size_bytes)  # from here on they are nowhere else
                    _pwrite_all(descriptor, memoryview(data), offset)
                    written = len(data)
                size_bytes, offset = size_bytes - written, offset + written
        except OSError as error:
            raise naming(error, path) from None

    def append(self, descriptor: int, data: bytes, path: str) -> None:
        """Writes all of data where the descriptor stands."""
        self._before("append", path)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            raise naming(error, path) from None

    def truncate(self, descriptor: int, size_bytes: int, path: str) -> None:
        """Cuts the file."""
        self._before("truncate", path)
        os.ftruncate(descriptor, size_bytes)

    def sync(self, descriptor: int, path: str) -> None:
        """Calls fsync. After a failure the file must be thrown away: the kernel has forgotten what was not written."""
        self._before("fsync", path)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise naming(error, path) from None

    def sync_data(self, descriptor: int, path: str) -> None:
        """Calls fdatasync."""
        self._before("fdatasync", path)
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            raise naming(error, path) from None

    def begin_flush(self, descriptor: int, start: int, end: int) -> None:
        """Starts writing [start, end) to the disk; promises nothing, and changes nothing that anybody could see.

        sync_file_range(2) without waiting: dirty pages of 140 GB would else be the last fsync's.
        """
        _libc.sync_file_range(
            descriptor, ctypes.c_int64(start), ctypes.c_int64(end - start), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        )

    def sync_directory(self, path: str) -> None:
        """Makes the directory's entries outlive a power loss."""
        self._before("fsync", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise naming(error, path) from None
        finally:
            os.close(descriptor)

    def chmod(self, descriptor: int, mode: int, path: str) -> None:
        """Sets an open file's mode."""
        self._before("chmod", path)
        os.fchmod(descriptor, mode)

    def touch(self, path: str) -> None:
        """Sets a file's times to now; never follows a symlink."""
        self._before("utime", path)
        os.utime(path, follow_symlinks=False)

    def rename(self, source: str, target: str) -> None:
        """Atomic; replaces a file, or an empty directory, that is there."""
        self._before("rename", target)
        os.rename(source, target)

    def exchange(self, one: str, other: str) -> bool:
        """Swaps two directory entries in one step; False where the filesystem cannot."""
        self._before("exchange", other)
        if not hasattr(_libc, "renameat2"):
            return False
        if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code), other)

    def link(self, source: str, target: str) -> None:
        """A second name for the same inode; never follows a symlink."""
        self._before("link", target)
        os.link(source, target, follow_symlinks=False)

    def clone(self, source: int, target: int, path: str) -> bool:
        """Gives an empty file another's content without copying it; False where the filesystem cannot.

        FICLONE (ioctl_ficlonerange(2)): both share their blocks until one of them is written.
        """
        self._before("clone", path)
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            if error.errno in _FULL or error.errno == errno.EIO:
                raise naming(error, path) from None
            return False  # another filesystem, one without, or one that cannot do it with this file
        return True

    def chown(self, descriptor: int, uid: int, gid: int, path: str) -> None:
        """Gives an open file to another user."""
        self._before("chown", path)
        try:
            os.fchown(descriptor, uid, gid)
        except OSError as error:
            raise naming(error, path) from None

    def symlink(self, text: str, path: str) -> None:
        """A symbolic link at path that says text."""
        self._before("symlink", path)
        os.symlink(text, path)

    def unlink(self, path: str) -> None:
        """Removes a name; no error when it is gone."""
        self._before("unlink", path)
        try:
            os.unlink(path)
        except FileNotFoundError:
            return

    def rmdir(self, path: str) -> bool:
        """Removes an empty directory; False when it is not empty, not there, or none."""
        self._before("rmdir", path)
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    def remove_tree(self, path: str) -> None:
        """Removes whatever is at path, children first; follows no symlink; no error when it is gone."""
        try:
            is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
        except FileNotFoundError:
            return
        if not is_directory:
            self.unlink(path)
            return
        names = []
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            names = [entry.path for entry in entries]
        for name in names:
            self.remove_tree(name)
        self.rmdir(path)

    def replace_file(self, path: str, content: bytes, staging: str, mode: int = 0o644) -> None:
        """The whole content or the old one: written beside, synced, renamed, directory synced.

        ``staging`` is a free path on the same filesystem, out of readers' sight.
        """
        self.unlink(staging)
        descriptor = self.create(staging, mode)
        try:
            try:
                self.append(descriptor, content, staging)
                self.chmod(descriptor, mode, staging)
                self.sync(descriptor, staging)
            finally:
                os.close(descriptor)
            self.rename(staging, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.unlink(staging)  # a full disk must not be filled with tries
            raise
        self.sync_directory(os.path.dirname(path))


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written

"""Unfinished blobs: preallocated, journalled, resumable; and the one way from there into hub/.

Life of a blob, each step of which may be the last before a kill::

    create   partial/<digest> with all its blocks, partial/<digest>.journal
    write    ranges at their offsets, in any order, by several threads
    mark     a range is in the journal after its data is written
    sync     fdatasync, then a checkpoint: what survives a power loss
    publish  0444, fsync, rename into hub/<repo>/blobs/<digest>, fsync both directories, journal removed

Verification stands between write and publish and is the caller's (transfer/): this
module never hashes. Thread-safe where it says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from modelcached.model import Digest, RepoId
from modelcached.store import journal
from modelcached.store.disk import Disk, naming
from modelcached.store.layout import Layout
from modelcached.store.taking import Taken, take


class Partial:
    """One unfinished blob, open for writing. Made by ``PartialStore.open``."""

    def __init__(self, disk: Disk, layout: Layout, digest: Digest, size_bytes: int, boot_id: str) -> None:
        self.digest = digest
        self.size_bytes = size_bytes
        self.resumed = journal.Ranges()
        """What was done before it was opened; content not yet hashed again."""
        self.hard_allocated = True
        """False where the filesystem cannot allocate ahead: writing may still meet a full disk."""
        self.condemned = False
        """The disk has lost some of it. A failed fsync: what the kernel could not write it has forgotten, so nothing
        here can be believed. A failed read: what was done cannot be had back."""
        self._disk = disk
        self._layout = layout
        self._data_path = layout.partial_data(digest)
        self._journal_path = layout.partial_journal(digest)
        self._boot_id = boot_id
        self._data = -1
        self._journal = -1
        self._journal_bytes = 0
        self._named = False  # its directory entries have outlived a power loss
        self._lock = threading.Lock()  # guards the journal's end
        # Ranges are disjoint, so data needs no guard. But the kernel lets one write at a time into a file and makes
        # the others spin for it (rwsem_spin_on_owner): here they sleep. A sixth of a transfer's CPU, with one file.
        self._writing = threading.Lock()
        self._users_lock = threading.Lock()
        self._users = 0
        self._closed = False

    def _create(self) -> None:
        self._disk.unlink(self._journal_path)
        self._disk.unlink(self._data_path)
        # Journal first: a journal without data is refused at the next start, data without a journal too.
        self._journal = self._disk.create(self._journal_path)
        self._append(journal.header(self.digest, self.size_bytes, self._boot_id))
        self._data = self._disk.create(self._data_path)
        self.hard_allocated = self._disk.allocate(self._data, self.size_bytes, self._data_path)

    def _resume(self, reading: journal.Reading) -> None:
        self._journal = self._disk.reopen(self._journal_path)
        self._data = self._disk.reopen(self._data_path)
        self._disk.truncate(self._journal, reading.valid_bytes, self._journal_path)
        os.lseek(self._journal, 0, os.SEEK_END)
        self._journal_bytes = reading.valid_bytes
        self.resumed = reading.trusted
        # A kill between create and allocate leaves less than all blocks.
        self.hard_allocated = self._disk.allocate(self._data, self.size_bytes, self._data_path)
        if reading.boot_id != self._boot_id:
            self._append(journal.rebooted(self._boot_id))

    def _append(self, record: bytes) -> None:
        self._disk.append(self._journal, record, self._journal_path)
        self._journal_bytes += len(record)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """While a thread is within, the descriptors are this file's: their numbers are not given to another."""
        with self._users_lock:
            if self._closed:
                raise OSError(errno.EBADF, "unfinished blob is closed", self._data_path)
            self._users += 1
        try:
            yield
        finally:
            with self._users_lock:
                self._users -= 1
                if self._closed and not self._users:
                    self._give_back()

    @contextlib.contextmanager
    def _flushing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.condemned = True
            raise

    def allocated(self) -> dict[int, int]:
        """Allocated bytes by inode, of data and journal."""
        with self._open():
            found = (os.fstat(descriptor) for descriptor in (self._data, self._journal))
            return {status.st_ino: status.st_blocks * 512 for status in found}

    def write(self, data: memoryview, offset: int) -> None:
        """Writes data at the offset. Any thread."""
        with self._open(), self._writing:
            self._disk.write_at(self._data, data, offset, self._data_path)

    def write_from_pipe(self, pipe: int, size_bytes: int, offset: int) -> None:
        """Writes so many bytes, which the pipe holds, at the offset. Any thread."""
        with self._open(), self._writing:
            self._disk.write_from_pipe(self._data, pipe, size_bytes, offset, self._data_path)

    def mark(self, start: int, end: int) -> None:
        """Journals [start, end), which must be written. Any thread."""
        with self._open(), self._lock:
            self._append(journal.done([(start, end)]))

    def read(self, view: memoryview, offset: int) -> int:
        """Reads back into view. Any thread. How many bytes there were."""
        with self._open():
            try:
                return os.preadv(self._data, [view], offset)
            except OSError as error:
                self.condemned = self.condemned or error.errno == errno.EIO  # else each try would end here again
                raise naming(error, self._data_path) from None

    def begin_flush(self, start: int, end: int) -> None:
        """Lets the disk begin with [start, end), for which nobody waits. Any thread."""
        with self._open():
            self._disk.begin_flush(self._data, start, end)

    def sync(self) -> None:
        """All that is marked now survives a power loss afterwards. Any thread, one at a time."""
        with self._open():
            with self._lock:
                reached = self._journal_bytes
            with self._flushing():
                self._disk.sync_data(self._data, self._data_path)
            with self._lock:
                self._append(journal.checkpoint(reached))
            with self._flushing():
                self._disk.sync_data(self._journal, self._journal_path)
            if not self._named:
                self._disk.sync_directory(self._layout.partial)
                self._named = True

    def restart(self) -> None:
        """Forgets all ranges, keeps the blocks: the content was proven wrong."""
        with self._open(), self._lock:
            self._disk.truncate(self._journal, 0, self._journal_path)
            os.lseek(self._journal, 0, os.SEEK_SET)
            self._journal_bytes = 0
            self._append(journal.header(self.digest, self.size_bytes, self._boot_id))
        self.resumed = journal.Ranges()

    def publish(self, repo_id: RepoId) -> os.stat_result:
        """Moves the verified content into the repository's blobs, whole or not at all; its stat there. Closes it."""
        target = self._layout.blob(repo_id, self.digest)
        directory = os.path.dirname(target)
        self._layout.check_real_directory(directory)
        self._disk.mkdir(os.path.dirname(directory))
        self._disk.mkdir(directory)
        with self._open():
            # Before the fsync, which takes the mode with it: else a power loss could leave a blob that nobody may read.
            self._disk.chmod(self._data, 0o444, self._data_path)
            with self._flushing():
                self._disk.sync(self._data, self._data_path)
            self._disk.rename(self._data_path, target)
            try:
                self._disk.sync_directory(directory)
            finally:
                self._disk.unlink(self._journal_path)  # however it ends, the data is here no longer
            self._disk.sync_directory(self._layout.partial)
            published = os.fstat(self._data)
        self.close()
        return published

    def discard(self) -> None:
        """Removes data and journal. Closes it."""
        self.close()
        self._disk.unlink(self._data_path)
        self._disk.unlink(self._journal_path)

    def close(self) -> None:
        """Ends all use; what is on disk stays. A thread that is still within keeps the descriptors until it is out."""
        with self._users_lock:
            self._closed = True
            if not self._users:
                self._give_back()

    def _give_back(self) -> None:
        for descriptor in (self._data, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._journal = -1


class PartialStore:
    """All unfinished blobs. Blocking: call it from disk threads."""

    def __init__(self, disk: Disk, layout: Layout, boot_id: str) -> None:
        """``boot_id``: of the boot that this process runs in; see journal.py."""
        self._disk = disk
        self._layout = layout
        self._boot_id = boot_id

    def open(self, digest: Digest, size_bytes: int) -> Partial:
        """Resumes the blob where its journal can be trusted, else starts it anew with all its blocks allocated."""
        reading = self._read(digest)
        if reading is not None and reading.size_bytes == size_bytes:
            with contextlib.suppress(FileNotFoundError):  # a journal without data
                return self._opened(digest, size_bytes, lambda partial: partial._resume(reading))  # noqa: SLF001
        return self._opened(digest, size_bytes, lambda partial: partial._create())  # noqa: SLF001

    def _opened(self, digest: Digest, size_bytes: int, begin: Callable[[Partial], None]) -> Partial:
        partial = Partial(self._disk, self._layout, digest, size_bytes, self._boot_id)
        try:
            begin(partial)
        except BaseException:
            partial.close()
            raise
        return partial

    def _read(self, digest: Digest) -> journal.Reading | None:
        try:
            descriptor = os.open(self._layout.partial_journal(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            return journal.read(file.read(), digest, self._boot_id)

    def publish_small(self, repo_id: RepoId, digest: Digest, content: bytes) -> os.stat_result:
        """Puts verified content that fits in memory straight into the repository's blobs; its stat there.

        A journal would cost more than fetching it again.
        """
        target = self._layout.blob(repo_id, digest)
        directory = os.path.dirname(target)
        self._layout.check_real_directory(directory)
        self._disk.mkdir(os.path.dirname(directory))
        self._disk.mkdir(directory)
        self._disk.replace_file(target, content, self._layout.staged(digest.hex), 0o444)
        return os.lstat(target)

    def take(self, digest: Digest, size_bytes: int, path: str, *, moves: bool) -> Taken | None:
        """A file that lies on this machine already, without copying it; None where it must be copied."""
        return take(self._disk, self._layout, digest, size_bytes, path, moves=moves)

    def done_bytes(self, digest: Digest) -> int:
        """How much of an unfinished blob would not be fetched again; 0 where there is none."""
        reading = self._read(digest)
        return reading.trusted.total if reading else 0

    def allocated_bytes(self, digests: Iterable[Digest]) -> dict[Digest, int]:
        """Blocks that unfinished blobs have on disk already: they need not be promised again."""
        found = {}
        for digest in digests:
            size = 0
            for path in (self._layout.partial_data(digest), self._layout.partial_journal(digest)):
                with contextlib.suppress(FileNotFoundError):
                    size += os.lstat(path).st_blocks * 512
            if size:
                found[digest] = size
        return found

    def listed(self) -> dict[Digest, float]:
        """Unfinished blobs on disk, and when each was last written to (seconds since the epoch)."""
        found: dict[Digest, float] = {}
        with os.scandir(self._layout.partial) as entries:
            for entry in entries:
                digest = Digest.parse(entry.name.removesuffix(".journal"))
                if digest is not None:
                    with contextlib.suppress(FileNotFoundError):  # published while we look
                        found[digest] = max(found.get(digest, 0.0), entry.stat(follow_symlinks=False).st_mtime)
        return found

    def remove(self, digest: Digest) -> None:
        """Removes an unfinished blob that no transfer has open."""
        self._disk.unlink(self._layout.partial_data(digest))
        self._disk.unlink(self._layout.partial_journal(digest))

    def sweep(self) -> list[str]:
        """At start: removes data without a journal, journals without data, and strangers; their names."""
        names = set(os.listdir(self._layout.partial))
        kept = {name for name in names if f"{name}.journal" in names and Digest.parse(name)}
        removed = sorted(name for name in names if name.removesuffix(".journal") not in kept)
        for name in removed:
            self._disk.remove_tree(f"{self._layout.partial}/{name}")
        return removed

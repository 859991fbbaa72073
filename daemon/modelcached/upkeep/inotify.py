"""Directories under inotify(7), each by itself, through watchdog's reader of its events.

Not through watchdog's Observer: that starts a thread for each directory, and a cache of 2,000 repositories has
8,000 of them. Nor by one recursive watch: it would enter whatever is mounted below, and every snapshot.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
)

_EVENTS = Mask(
    InotifyConstants.IN_CREATE
    | InotifyConstants.IN_DELETE
    | InotifyConstants.IN_MOVED_FROM
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_DONT_FOLLOW
    | InotifyConstants.IN_EXCL_UNLINK
)
"""What changes a directory's entries, and the end of writing to one. Reading a model must wake nobody."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory as a look found it."""

    path: str
    inode: int
    mtime_ns: int


def look_at(path: str, device: int) -> Directory | None:
    """None for what is no directory of its own on that device. Raises OSError where that cannot be seen."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_dev != device:
        return None
    return Directory(path, status.st_ino, status.st_mtime_ns)


class _Told:
    """What watchdog calls for one directory, from its thread."""

    def __init__(self, tell: Callable[[str], None], lost: Callable[[], None], inode: int) -> None:
        self._tell = tell
        self._lost = lost
        self.inode = inode
        self.descriptor: WatchDescriptor | None = None
        self.ended = False
        """The directory has gone, and its watch with it."""

    def on_event(self, event: InotifyEvent) -> None:
        """Something happened to the entry of that name; an empty one is the directory itself."""
        self._tell(os.fsdecode(event.name))

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """The kernel has ended it."""
        del wd
        self.ended = True

    def on_queue_overflow(self) -> None:
        """Events were lost, nobody knows whose."""
        self._lost()


class Directories:
    """All watches of one inotify instance. Blocking, and used by one thread at a time."""

    def __init__(self, lost: Callable[[], None]) -> None:
        """Raises OSError where this machine gives no instance. ``lost``: called when events were dropped."""
        self._fd = InotifyFD()
        self._fd.start()
        self._lost = lost
        self._watched: dict[str, dict[str, _Told]] = {}
        self._lock = threading.Lock()

    def watch(self, group: str, found: Iterable[Directory], tell: Callable[[str], None]) -> None:
        """From now on exactly these directories of the group. Raises OSError where this machine gives no watch."""
        with self._lock:
            before = self._watched.get(group, {})
            now: dict[str, _Told] = {}
            self._watched[group] = now
            for directory in found:
                told = before.pop(directory.path, None)
                if told is not None and (told.ended or told.inode != directory.inode):
                    self._end(told)
                    told = None
                now[directory.path] = told if told is not None else self._begin(directory, tell)
            for told in before.values():
                self._end(told)
            if not now:
                del self._watched[group]

    def _begin(self, directory: Directory, tell: Callable[[str], None]) -> _Told:
        told = _Told(tell, self._lost, directory.inode)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # gone meanwhile: its parent will tell
            told.descriptor = self._fd.add_callback(os.fsencode(directory.path), _EVENTS, told, CallbackId(id(told)))
        told.ended = told.descriptor is None
        return told

    def _end(self, told: _Told) -> None:
        if told.descriptor is not None and not told.ended:
            self._fd.remove_callbacks([(told.descriptor, CallbackId(id(told)))])
        told.ended = True

    def groups(self) -> frozenset[str]:
        """Those that have a watch."""
        return frozenset(self._watched)

    def close(self) -> None:
        """Ends the instance and its thread."""
        self._fd.stop()
        self._fd.join()

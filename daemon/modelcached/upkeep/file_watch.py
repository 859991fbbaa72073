"""Files that are replaced or written to while the daemon runs: the configuration, the model list.

A ConfigMap is replaced by swapping a symlink beside the file, so the directory is watched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog
from watchdog.events import FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

log = structlog.get_logger()

_SETTLE_SECONDS = 0.3
_EVENTS: list[type[FileSystemEvent]] = [FileCreatedEvent, FileModifiedEvent, FileMovedEvent]


def stamp(file: Path) -> tuple[int, ...] | None:
    """What differs when a file is replaced or written to, through whatever links lead to it; None where it is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class FileWatcher:
    """One thread for all files. The event loop's alone; what is told is told there."""

    def __init__(self) -> None:
        self._observer: BaseObserver | None = None
        self._followed: dict[str, _Followed] = {}

    def follow(self, name: str, file: Path | None, changed: Callable[[], None]) -> None:
        """From now on ``changed`` is called when the file is another; and once for what changed since it was read.

        It takes the place of what was followed by that name; None ends that. Where inotify is out of instances, or
        the directory is not there, the log says so, and it is for others to look.
        """
        before = self._followed.get(name)
        if file == (before.file if before else None):
            return
        if before is not None:
            del self._followed[name]
            self._end(before)
        if file is None:
            return
        followed = self._followed[name] = _Followed(file, changed)
        try:
            followed.watch = self._running().schedule(followed, str(file.parent), event_filter=_EVENTS)
        except OSError as error:
            log.warning("a file is not watched", file=str(file), why=str(error))
        else:
            followed.soon()

    def _end(self, followed: _Followed) -> None:
        followed.end()
        if self._observer is None or followed.watch is None:
            return
        if any(other.watch == followed.watch for other in self._followed.values()):
            self._observer.remove_handler_for_watch(followed, followed.watch)
        else:
            self._observer.unschedule(followed.watch)

    def _running(self) -> BaseObserver:
        if self._observer is None:
            observer = Observer()
            observer.start()
            self._observer = observer
        return self._observer

    def stop(self) -> None:
        """Ends the watching thread."""
        for followed in self._followed.values():
            followed.end()
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()


class _Followed(FileSystemEventHandler):
    """One file."""

    def __init__(self, file: Path, changed: Callable[[], None]) -> None:
        self.file = file
        self.watch: ObservedWatch | None = None
        self._changed = changed
        self._seen: tuple[int, ...] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def on_any_event(self, event: FileSystemEvent) -> None:
        """From watchdog's thread."""
        del event
        self._loop.call_soon_threadsafe(self.soon)

    def soon(self) -> None:
        """An editor writes, renames and touches: one look a while after the first, and again for what follows."""
        if self._timer is None and not self._ended:
            self._timer = self._loop.call_later(_SETTLE_SECONDS, self._look)

    def _look(self) -> None:
        """Other files change in that directory too, our own log perhaps: only the file itself counts."""
        self._timer = None
        found = stamp(self.file)
        if found != self._seen:
            self._seen = found
            self._changed()

    def end(self) -> None:
        """Nothing is told any more."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()

"""Settings that change while the daemon runs: on SIGHUP, and when their file is replaced.

A ConfigMap is replaced by swapping a symlink beside the file, so the directory is watched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog
from watchdog.events import FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from modelcached.config import Config, ConfigError, changed_keys
from modelcached.errors import CacheError

log = structlog.get_logger()

_SETTLE_SECONDS = 0.3


class Reloader(FileSystemEventHandler):
    """Reads the file again and hands a good one to ``apply``; a bad one is reported and changes nothing."""

    def __init__(
        self,
        config: Config,
        read: Callable[[], Config],
        apply: Callable[[Config], None],
        tell: Callable[[str], None],
    ) -> None:
        """``apply`` raises CacheError for what cannot be; ``tell`` gets what is wrong now, or an empty text."""
        self._config = config
        self._read = read
        self._apply = apply
        self._tell = tell
        self._file: Path | None = None
        self._seen: tuple[int, ...] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._observer: BaseObserver | None = None

    def reload(self) -> None:
        """On the event loop; the file is a few kilobytes."""
        try:
            config = self._read()
            now, later = changed_keys(self._config, config)
            if now or later:
                self._apply(config)
        except (ConfigError, CacheError) as error:
            why = error.text if isinstance(error, CacheError) else str(error)
            log.error("new configuration refused, the old settings stay", why=why)  # noqa: TRY400
            self._tell(f"the configuration on disk is refused, older settings are in force: {why}")
            return
        self._config = config
        self._tell("")
        if later:
            log.warning("these settings take effect at the next start", settings=sorted(later))
        if now:
            log.info("configuration reloaded", settings=sorted(now))

    def watch(self, file: Path) -> None:
        """From now on, and once for what changed since it was read; where inotify is out of instances, SIGHUP stays."""
        self._file = file
        try:
            observer = Observer()  # takes an instance of inotify
            observer.schedule(
                self, str(file.parent), event_filter=[FileCreatedEvent, FileModifiedEvent, FileMovedEvent]
            )
            observer.start()
        except OSError as error:
            log.warning("configuration is not watched, use SIGHUP", directory=str(file.parent), why=str(error))
            return
        self._observer = observer
        self._soon()

    def stop(self) -> None:
        """Ends the watching thread."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """From watchdog's thread."""
        del event
        self._loop.call_soon_threadsafe(self._soon)

    def _soon(self) -> None:
        # An editor writes, renames and touches: one look a while after the first of it, and again for what follows.
        if self._timer is None:
            self._timer = self._loop.call_later(_SETTLE_SECONDS, self._look)

    def _look(self) -> None:
        """Other files change in that directory too, our own log perhaps: only the file itself counts."""
        self._timer = None
        assert self._file is not None
        found = _stamp(self._file)
        if found != self._seen:
            self._seen = found
            self.reload()


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What differs when a file is replaced or written to, through whatever links lead to it."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

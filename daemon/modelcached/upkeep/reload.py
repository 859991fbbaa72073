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

    def __init__(self, config: Config, read: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        self._config = config
        self._read = read
        self._apply = apply
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._observer: BaseObserver | None = None
        self.last_error: str | None = None

    def reload(self) -> None:
        """On the event loop; the file is a few kilobytes."""
        self._timer = None
        try:
            config = self._read()
        except ConfigError as error:
            self.last_error = str(error)
            log.error("new configuration refused, the old settings stay", why=str(error))  # noqa: TRY400
            return
        now, later = changed_keys(self._config, config)
        if not now and not later:
            return
        if later:
            log.warning("these settings take effect at the next start", settings=sorted(later))
        try:
            self._apply(config)
        except CacheError as error:
            self.last_error = error.text
            log.error("new configuration refused, the old settings stay", why=error.text)  # noqa: TRY400
            return
        self._config = config
        self.last_error = None
        log.info("configuration reloaded", settings=sorted(now))

    def watch(self, file: Path) -> None:
        """From now on; where inotify is out of instances, SIGHUP remains."""
        observer = Observer()
        try:
            observer.schedule(
                self, str(file.parent), event_filter=[FileCreatedEvent, FileModifiedEvent, FileMovedEvent]
            )
            observer.start()
        except OSError as error:
            log.warning("configuration is not watched, use SIGHUP", directory=str(file.parent), why=str(error))
            return
        self._observer = observer

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
        # An editor writes, renames and touches: once is enough, after the last of it.
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(_SETTLE_SECONDS, self.reload)

"""Settings that change while the daemon runs: on SIGHUP, and when their file is replaced (file_watch.py)."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from modelcached.config import Config, ConfigError, changed_keys, in_force
from modelcached.errors import CacheError

log = structlog.get_logger()


class Reloader:
    """Reads the file again and hands a good one to ``apply``; a bad one is reported and changes nothing."""

    def __init__(
        self,
        config: Config,
        read: Callable[[], Config],
        apply: Callable[[Config], None],
        tell: Callable[[str], None],
    ) -> None:
        """``apply`` takes what can change while running, and raises CacheError for what cannot be.

        ``tell`` gets what is wrong now, or an empty text.
        """
        self._running = config
        self._later: set[str] = set()
        self._refused, self._why = False, ""
        self._read = read
        self._apply = apply
        self._tell = tell

    def reload(self) -> None:
        """On the event loop; the file is a few kilobytes."""
        try:
            written = self._read()
            now, later = changed_keys(self._running, written)
            if now or later != self._later:
                self._apply(written)
        except (ConfigError, CacheError) as error:
            why = error.text if isinstance(error, CacheError) else str(error)
            if not self._refused or why != self._why:  # its watcher and a signal may both have come
                log.error("new configuration refused, the old settings stay", why=why)  # noqa: TRY400
            self._refused, self._why = True, why
            self._tell(f"the configuration on disk is refused, older settings are in force: {why}")
            return
        self._tell("")
        if fresh := later - self._later:
            log.warning("these settings take effect at the next start", settings=sorted(fresh))
        if now:
            log.info("configuration reloaded", settings=sorted(now))
        elif self._refused:
            log.info("configuration accepted again, it says what is in force")
        self._running, self._later, self._refused = in_force(self._running, written), later, False

"""Settings that change while the daemon runs: on SIGHUP, and when their file is replaced (file_watch.py)."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from modelcached.config import Config, ConfigError, changed_keys
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
        """``apply`` raises CacheError for what cannot be; ``tell`` gets what is wrong now, or an empty text."""
        self._config = config
        self._read = read
        self._apply = apply
        self._tell = tell

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

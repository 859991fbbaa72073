"""The cache directory, from the moment that it is ours."""

from __future__ import annotations

import time
from typing import Self

from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.owner import OwnerLock, prepare
from modelcached.store.walker import Walker, hub_folders


class Claim:
    """No other daemon changes what is below cache.dir, and a large hub/ is being read already. ``release`` must follow.

    Light to import: the rest of the daemon is loaded while the process for hub/ is at work.
    """

    def __init__(self, disk: Disk, cache_dir: str) -> None:
        """Creates what is missing. Raises CacheError where it cannot be had, OSError."""
        self.disk = disk
        self.layout = Layout(cache_dir)
        prepare(disk, self.layout)
        self._lock = OwnerLock(disk, self.layout)
        self._lock.acquire()
        self.at = time.time()
        """Since when hub/ is read; seconds since the epoch."""
        try:
            folders, _ = hub_folders(self.layout)
            self.walker = Walker.begin(self.layout, folders)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets another daemon have it. May be called again."""
        self.walker.close()
        self._lock.release()

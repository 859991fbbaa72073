"""The kubelet's pods directory as a witness: a pod is alive while ``<kubelet_pods_dir>/<uid>`` is there."""

from __future__ import annotations

import os
from pathlib import Path

from modelcached.ledger.leases import PodsSeen


class PodsDirectory:
    """Blocking: call it from disk threads."""

    def __init__(self, path: Path | None, own_uid: str) -> None:
        """``own_uid``: the daemon's own pod, where it runs in one; it must always be visible."""
        self.path = path
        self._own_uid = own_uid
        self._proven: tuple[int, int] | None = None  # the directory that has shown a pod known to be there

    def seen(self, uid: str) -> bool:
        """The pod's directory is there at this moment."""
        return self.path is not None and bool(uid) and uid not in (".", "..") and (self.path / uid).is_dir()

    def look(self, known: frozenset[str]) -> PodsSeen:
        """Who is there, and whether an absence would mean anything.

        It does where the directory can be listed, is not empty, and shows our own pod or another known
        one; or has shown one before and is still the same directory. An unmounted one is another.
        """
        if self.path is None:
            return PodsSeen(frozenset(), healthy=False)
        try:
            status = os.stat(self.path)
            names = frozenset(os.listdir(self.path))
        except OSError:
            return PodsSeen(frozenset(), healthy=False)
        identity = (status.st_dev, status.st_ino)
        if names & (known | {self._own_uid}):
            self._proven = identity
        return PodsSeen(names, healthy=bool(names) and identity == self._proven)

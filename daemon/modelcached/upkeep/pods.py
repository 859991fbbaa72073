"""The kubelet's pods directory as a witness: a pod is alive while ``<kubelet_pods_dir>/<uid>`` is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from modelcached.ledger.leases import PodsSeen


class PodsDirectory:
    """Blocking: call it from disk threads."""

    def __init__(
        self, path: Path | None, own_uid: str, *, boot_id: str, proven: str, remember: Callable[[str], None]
    ) -> None:
        """``own_uid``: the daemon's own pod, where it runs in one; it must always be visible.

        ``proven``: what an earlier daemon was told to ``remember``. The last pod may go while no
        daemon runs, and then nobody is left to prove the directory anew. ``remember`` is called from
        disk threads, before the pod that proves the directory has its lease.
        """
        self.path = path
        self._own_uid = own_uid
        self._boot_id = boot_id
        self._proven = proven  # the directory that has shown a pod known to be there
        self._remember = remember

    def seen(self, uid: str) -> bool:
        """The pod's directory is there at this moment."""
        if self.path is None or not uid or uid in (".", ".."):
            return False
        try:
            identity = self._identity(os.stat(self.path))
        except OSError:
            return False
        if not os.path.isdir(self.path / uid):  # not Path's: it raises where the directory may not be searched
            return False
        self._prove(identity)
        return True

    def look(self, known: frozenset[str]) -> PodsSeen:
        """Who is there, and whether an absence would mean anything.

        It does where the directory can be listed, is not empty, and shows our own pod or another known
        one; or has shown one before and is still the same directory. An unmounted one is another. An
        empty one ends nothing, proven or not: a node that runs anything has a pod of its own, so that
        nothing at all is rather a directory that was cleared, or a filesystem that came up without its content.
        """
        if self.path is None:
            return PodsSeen(frozenset(), healthy=False)
        try:
            identity = self._identity(os.stat(self.path))
            names = frozenset(os.listdir(self.path))
        except OSError:
            return PodsSeen(frozenset(), healthy=False)
        if names & (known | {self._own_uid}):
            self._prove(identity)
        return PodsSeen(names, healthy=bool(names) and identity == self._proven)

    def _identity(self, status: os.stat_result) -> str:
        """With the boot, for another one may give the device's number to another filesystem."""
        return f"{self._boot_id} {status.st_dev} {status.st_ino}"

    def _prove(self, identity: str) -> None:
        if identity != self._proven:
            self._proven = identity
            self._remember(identity)

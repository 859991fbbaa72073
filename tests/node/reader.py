"""A reader beside the daemon: it looks at what workloads see, again and again, and keeps what must not be."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

WholeSet = Mapping[str, str]
"""Path in the snapshot to the SHA-256 of its content."""


class Reader:
    """Looks at one snapshot by its name, in a loop, from a thread of its own.

    Each look that was of the published directory must show exactly one of the
    ``allowed`` sets, every file with its true content; or no snapshot at all.
    """

    def __init__(self, snapshot: Path, *allowed: WholeSet, pause_seconds: float = 0.0) -> None:
        self._snapshot = snapshot
        self._pause_seconds = pause_seconds
        self._blobs = snapshot.parent.parent / "blobs"
        self._allowed = [dict(one) for one in allowed]
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self.absent = 0
        """Looks that found no snapshot."""
        self.seen = [0] * len(allowed)
        """Looks that found each of the allowed sets."""
        self.forbidden: frozenset[str] = frozenset()
        """Names that no blob may have."""
        self.wrong: list[str] = []

    @contextmanager
    def looking(self) -> Iterator[Reader]:
        """Within it the reader looks; afterwards AssertionError if it ever saw what must not be."""
        thread = threading.Thread(target=self._loop, name="reader")
        thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            thread.join()
        assert not self.wrong, self.wrong[:5]

    def wait_for(self, number: int | None, looks: int = 3, seconds: float = 30) -> None:
        """Until that set (None: no snapshot) was seen in so many looks from now on."""

        def count() -> int:
            return self.absent if number is None else self.seen[number]

        with self._changed:
            goal = count() + looks
            done = self._changed.wait_for(lambda: count() >= goal or self.wrong, seconds)
        assert not self.wrong, self.wrong[:5]
        assert done, f"not seen {looks} times within {seconds} s: set {number}"

    def _loop(self) -> None:
        while not self._stopped.is_set() and not self.wrong:
            try:
                complaint = self._look()
            except Exception as error:  # noqa: BLE001 - whatever a reader meets is the daemon's fault
                complaint = f"{type(error).__name__}: {error}"
            with self._changed:
                if complaint is not None:
                    self.wrong.append(complaint)
                self._changed.notify_all()
            if self._pause_seconds:
                self._stopped.wait(self._pause_seconds)

    def _look(self) -> str | None:
        for name in self.forbidden:
            if (self._blobs / name).is_symlink() or (self._blobs / name).exists():
                return f"blobs/ holds {name}"
        try:
            directory = os.open(self._snapshot, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            self.absent += 1
            return None
        try:
            listed = {
                os.path.normpath(os.path.join(where, name))
                for where, _, names, _ in os.fwalk(".", dir_fd=directory)
                for name in names
            }
            if not self._is_published(directory):
                return None  # what was opened by name is not what the name says any more: no view of a reader's
            return self._judge(listed, directory)
        finally:
            os.close(directory)

    def _judge(self, listed: set[str], directory: int) -> str | None:
        matching = [number for number, one in enumerate(self._allowed) if one.keys() == listed]
        if not matching:
            return f"a set that is neither: {sorted(listed)}"
        (number,) = matching
        for path, digest in self._allowed[number].items():
            try:
                found = hashlib.sha256((self._snapshot / path).read_bytes()).hexdigest()
            except FileNotFoundError:
                if self._is_published(directory):
                    return f"{path} is listed and not there"
                return self._missing_after(path)
            if found != digest:
                return f"{path} has wrong content"
        self.seen[number] += 1
        return None

    def _missing_after(self, path: str) -> str | None:
        """The snapshot that was looked at has gone meanwhile; what came after it, if anything did, has the file too."""
        try:
            directory = os.open(self._snapshot, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            os.stat(path, dir_fd=directory)
        except FileNotFoundError:
            if self._is_published(directory):
                return f"{path} was there and is not in the snapshot that came after"
        finally:
            os.close(directory)
        return None

    def _is_published(self, directory: int) -> bool:
        try:
            return os.path.samestat(os.fstat(directory), os.stat(self._snapshot))
        except FileNotFoundError:
            return False

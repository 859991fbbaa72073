"""Somebody who only watches the filesystem: the most that was ever taken of it.

``python outside.py DIRECTORY``: looks as often as it can until its stdin ends, then prints one JSON object. A process
of its own, so that whoever is measured cannot keep it from looking.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PAUSE_SECONDS = 0.001


def taken_bytes(directory: Path) -> int:
    """Of the whole filesystem, as statvfs says it now."""
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@dataclass
class Seen:
    """Bytes of the filesystem that were taken; filled in when the watch ends."""

    most: int = 0
    looks: int = 0


@contextmanager
def watched(directory: Path) -> Iterator[Seen]:
    """As long as it lasts."""
    seen = Seen()
    process = subprocess.Popen(
        [sys.executable, __file__, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield seen
    finally:
        said, _ = process.communicate("", timeout=30)
        seen.most, seen.looks = json.loads(said)


def _watch(directory: Path) -> None:
    over = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    most = looks = 0
    while not over.wait(_PAUSE_SECONDS):
        most, looks = max(most, taken_bytes(directory)), looks + 1
    sys.stdout.write(json.dumps([most, looks]))


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))

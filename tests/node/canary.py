"""A tree beside the cache that nothing may touch, and logs that no stranger's text may steer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tests.node.daemon import Node

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def fingerprint(root: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found[str(path)] = (
            status.st_ino,
            status.st_mode,
            status.st_uid,
            status.st_nlink,
            status.st_size,
            times,
            content,
        )
    return found


@dataclass
class Canary:
    root: Path
    before: dict[str, tuple[object, ...]]

    def settle(self) -> None:
        """What it holds now is what must stay."""
        self.before = fingerprint(self.root)

    def assert_untouched(self) -> None:
        now = fingerprint(self.root)
        changed = {path: (self.before.get(path), now.get(path)) for path in self.before.keys() | now.keys()}
        changed = {path: (was, is_now) for path, (was, is_now) in changed.items() if was != is_now}
        assert not changed, f"was, and is now: {changed}"


def assert_log_is_clean(node: Node) -> None:
    assert node.log_text()
    assert CONTROL.search(node.log_file.read_bytes().decode()) is None

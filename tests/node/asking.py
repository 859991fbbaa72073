"""`ensure-model` asked for what may fail: how it ended, why, and how long that took."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .daemon import Node


@dataclass(frozen=True)
class Asked:
    """The end of one run."""

    exit_status: int
    reason: str
    """Empty on success."""
    text: str
    """The last word, as `kubectl describe` shows it."""
    seconds: float
    stderr: str


def ask(node: Node, *arguments: str, env: dict[str, str] | None = None, timeout: float = 60) -> Asked:
    """Runs ensure-model to its end."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "termination-log"
        log.touch()
        began = time.monotonic()
        done = node.run("ensure-model", *arguments, "--termination-log", str(log), env=env, timeout=timeout)
        seconds = time.monotonic() - began
        reason, _, text = log.read_text().partition(": ")
    return Asked(done.returncode, reason, text.strip(), seconds, done.stderr)

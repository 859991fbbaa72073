"""What a check says."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How much it matters."""

    OK = "ok"
    WARNING = "warning"
    """It works, and may cost something."""
    FAILURE = "failure"
    """Something that users want does not work."""
    SKIPPED = "skipped"
    """It could not be looked at, or was not asked for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    level: Level
    check: str
    """A word or two: what was looked at."""
    text: str
    mend: str = ""
    """What to do; empty where there is nothing to be done."""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, check, text)


def warning(check: str, text: str, mend: str) -> Finding:
    """It works, and may cost something."""
    return Finding(Level.WARNING, check, text, mend)


def failure(check: str, text: str, mend: str) -> Finding:
    """Something does not work."""
    return Finding(Level.FAILURE, check, text, mend)


def skipped(check: str, text: str, mend: str = "") -> Finding:
    """Not looked at."""
    return Finding(Level.SKIPPED, check, text, mend)

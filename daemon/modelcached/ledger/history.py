"""What happened, for who asks later: the last few thousand events, in state.db.

A hit leaves no row: it is what nearly every request is, and its time is the model's own (last used).
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from modelcached.events import (
    BlobCondemned,
    DaemonStarted,
    DriftFound,
    Event,
    ModelsFetched,
    OperatorActed,
    RequestEnded,
    SnapshotEvicted,
)
from modelcached.ledger.clock import Clock
from modelcached.ledger.database import Database

ROWS = 5_000
"""A busy node's week; some MB, within what is set aside for state.db."""
_TRIM_EVERY = 100
_LONGEST_DETAIL = 400
_ROWS_A_STEP = 500
"""Read while the event loop does nothing else."""
_BEHIND_ALL = 2**62


class Kind(enum.StrEnum):
    """What happened."""

    STARTED = "started"
    ASKED = "asked"
    REFUSED = "refused"
    FETCHED = "fetched"
    EVICTED = "evicted"
    DAMAGED = "damaged"
    DRIFTED = "drifted"
    PINNED = "pinned"
    UNPINNED = "unpinned"
    RELEASED = "released"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of an event; what it has nothing to say about is empty."""

    kind: Kind
    model: str = ""
    """``org/name@revision``; of several the base."""
    reason: str = ""
    """One word: the outcome, the refusal's reason, why it was evicted."""
    size_bytes: int = 0
    seconds: float = 0.0
    holder: str = ""
    request_id: str = ""
    detail: str = ""
    others: tuple[str, ...] = ()
    """The adapters', as ``model``."""


@dataclass(frozen=True, slots=True)
class Row:
    """An entry where it lies."""

    id: int
    at: float
    """Seconds since the epoch."""
    entry: Entry


class History:
    """The event loop's alone."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._added = 0

    def observe(self, event: Event) -> None:
        """Keeps what operators ask for later. Losing it to a full disk costs nothing else."""
        entry = _entry(event)
        if entry is None:
            return
        fields = {name: value for name, value in asdict(entry).items() if value and name != "kind"}
        body = json.dumps(fields | ({"detail": entry.detail[:_LONGEST_DETAIL]} if entry.detail else {}))
        self._database.write_later(
            (
                "INSERT OR REPLACE INTO history (at, kind, body) VALUES (?, ?, ?)",
                (self._clock.wall(), entry.kind.value, body),
            )
        )
        self._added += 1
        if self._added % _TRIM_EVERY == 1:
            trim = "DELETE FROM history WHERE id <= (SELECT max(id) FROM history) - ?"
            self._database.write_later((trim, (ROWS,)))

    async def newest(self, size: int, before: int | None, wanted: Callable[[Row], bool]) -> tuple[list[Row], bool]:
        """At most so many that are wanted, newest first, of those before that id; and whether there may be more.

        Raises sqlite3.Error.
        """
        sql = "SELECT id, at, kind, body FROM history WHERE id < ? ORDER BY id DESC LIMIT ?"
        found: list[Row] = []
        end = _BEHIND_ALL if before is None else before
        while rows := await self._database.read(sql, (end, _ROWS_A_STEP)):
            for number, at, kind, body in rows:
                end = number
                row = _row(number, at, kind, body)
                if row is None or not wanted(row):
                    continue
                if len(found) == size:
                    return found, True
                found.append(row)
        return found, False


def _row(number: int, at: float, kind: str, body: str) -> Row | None:
    """None for what a newer daemon wrote and this one does not know."""
    try:
        fields = json.loads(body)
        return Row(number, at, Entry(Kind(kind), **fields | {"others": tuple(fields.get("others", ()))}))
    except (ValueError, TypeError):
        return None


def _entry(event: Event) -> Entry | None:  # noqa: PLR0911 - a table
    match event:
        case RequestEnded("hit" | "cancelled"):
            return None
        case RequestEnded(outcome, reason, seconds, models, holder, request_id, message):
            kind = Kind.REFUSED if outcome == "error" else Kind.ASKED
            first, others = _names(models)
            return Entry(kind, first, reason or outcome, 0, seconds, holder, request_id, message, others)
        case ModelsFetched(models, fetched, linked, seconds, _, background):
            first, others = _names(models)
            detail = f"{linked} bytes linked" if linked else ""
            why = "background" if background else ""
            return Entry(Kind.FETCHED, first, why, fetched, seconds, detail=detail, others=others)
        case SnapshotEvicted(repo_id, commit, freed, reason):
            return Entry(Kind.EVICTED, f"{repo_id}@{commit}", reason, max(0, freed))
        case BlobCondemned(repo_id, digest):
            return Entry(Kind.DAMAGED, repo_id, detail=digest)
        case DriftFound(kind, count):
            return Entry(Kind.DRIFTED, reason=kind, detail=f"{count} times" if count > 1 else "")
        case OperatorActed(action, target, detail):
            return Entry(Kind(action), target, "operator", detail=detail)
        case DaemonStarted(version, models, seconds):
            return Entry(Kind.STARTED, seconds=seconds, detail=f"modelcached {version}, {models} models")
        case _:
            return None


def _names(models: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The base model, and the adapters."""
    return (models[0], models[1:]) if models else ("", ())

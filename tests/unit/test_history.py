"""What is kept of what happened, and for how long."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelcached.events import (
    BlobCondemned,
    BytesFetched,
    DaemonStarted,
    DriftFound,
    ModelsFetched,
    OperatorActed,
    RequestEnded,
    SnapshotEvicted,
    UpkeepRan,
)
from modelcached.ledger import database as state
from modelcached.ledger import history as module
from modelcached.ledger.clock import Clock
from modelcached.ledger.database import Database
from modelcached.ledger.history import Entry, History, Kind, Row

COMMIT = "a" * 40


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(state.connect(str(tmp_path / "state.db")))
    yield made
    made.close()


@pytest.fixture
def history(database: Database) -> History:
    return History(database, Clock.system())


async def all_of(history: History) -> list[Entry]:
    rows, more = await history.newest(10_000, None, lambda _: True)
    assert not more
    return [row.entry for row in rows]


@pytest.mark.parametrize(
    ("event", "entry"),
    [
        (
            RequestEnded("error", "GATED_REPO", 1.5, ("org/a@main", "org/b@v1"), "pod x", "r1", "no"),
            Entry(Kind.REFUSED, "org/a@main", "GATED_REPO", 0, 1.5, "pod x", "r1", "no", ("org/b@v1",)),
        ),
        (
            RequestEnded("joined", "", 2.5, ("org/a@main",), "pod x", "r1"),
            Entry(Kind.ASKED, "org/a@main", "joined", 0, 2.5, "pod x", "r1"),
        ),
        (
            ModelsFetched((f"org/a@{COMMIT}",), 5, 7, 3.0, 1.0, background=True),
            Entry(Kind.FETCHED, f"org/a@{COMMIT}", "background", 5, 3.0, detail="7 bytes linked"),
        ),
        (SnapshotEvicted("org/a", COMMIT, 9, "space"), Entry(Kind.EVICTED, f"org/a@{COMMIT}", "space", 9)),
        (BlobCondemned("org/a", "ab"), Entry(Kind.DAMAGED, "org/a", detail="ab")),
        (DriftFound("blob_gone", 3), Entry(Kind.DRIFTED, reason="blob_gone", detail="3 times")),
        (OperatorActed("pinned", "org/a@main"), Entry(Kind.PINNED, "org/a@main", "operator")),
        (DaemonStarted("1.0", 4, 0.5), Entry(Kind.STARTED, seconds=0.5, detail="modelcached 1.0, 4 models")),
    ],
)
async def test_what_is_kept_of_an_event(history: History, event: object, entry: Entry) -> None:
    history.observe(event)  # type: ignore[arg-type]
    assert await all_of(history) == [entry]


@pytest.mark.parametrize(
    "event",
    [RequestEnded("hit", "", 0.1), RequestEnded("cancelled", "", 0.1), BytesFetched("hub", 1), UpkeepRan("x", "ok")],
)
async def test_what_leaves_no_row(history: History, event: object) -> None:
    history.observe(event)  # type: ignore[arg-type]
    assert await all_of(history) == []


async def test_the_oldest_go_and_pages_are_whole(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 700)
    for number in range(1301):
        history.observe(BlobCondemned("org/a", str(number)))
    seen: list[Row] = []
    before: int | None = None
    while True:
        rows, more = await history.newest(90, before, lambda row: int(row.entry.detail) % 2 == 0)
        seen += rows
        assert len(rows) == 90 or not more
        if not more:
            break
        before = rows[-1].id
    numbers = [int(row.entry.detail) for row in seen]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers == list(range(1300, numbers[-1] - 1, -2))
    assert 600 - module._TRIM_EVERY <= numbers[-1] <= 602


async def test_what_a_newer_daemon_wrote_is_passed_over(history: History, database: Database) -> None:
    history.observe(BlobCondemned("org/a", "ab"))
    for kind, body in (("melted", "{}"), ("evicted", '{"colour": 1}'), ("evicted", "no JSON")):
        await database.write(("INSERT INTO history (at, kind, body) VALUES (1, ?, ?)", (kind, body)))
    assert [entry.kind for entry in await all_of(history)] == [Kind.DAMAGED]


async def test_a_long_message_is_cut(history: History) -> None:
    history.observe(RequestEnded("error", "INTERNAL", 1, ("a/b@main",), message="x" * 5000))
    (entry,) = await all_of(history)
    assert len(entry.detail) == module._LONGEST_DETAIL


async def test_a_question_that_is_none_is_told_to_who_asked(database: Database) -> None:
    with pytest.raises(sqlite3.Error):
        await database.read("SELECT nothing FROM nowhere")
    with pytest.raises(OverflowError):  # of Python's, not SQLite's
        await database.read("SELECT ?", (2**64,))
    with pytest.raises(UnicodeEncodeError):
        await database.write(("INSERT INTO meta VALUES (?, 'x')", ("\ud800",)))
    await database.write(("INSERT INTO meta VALUES ('after', 'x')", ()))
    assert await database.read("SELECT value FROM meta WHERE key = 'after'") == [("x",)]

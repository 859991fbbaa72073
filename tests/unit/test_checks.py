"""When each blob was last read outlives a restart, and is forgotten with the blob."""

from __future__ import annotations

from pathlib import Path

from modelcached.ledger.checks import Checks
from modelcached.ledger.database import Database, connect, contents
from modelcached.model import Algorithm, Digest

ONE, TWO = (Digest(Algorithm.SHA256, digit * 64) for digit in "12")


def opened(path: Path) -> tuple[Database, Checks]:
    connection = connect(str(path))
    rows = contents(connection).checks
    database = Database(connection)
    return database, Checks(database, rows)


def test_what_was_read_is_known_after_a_restart(tmp_path: Path) -> None:
    database, checks = opened(tmp_path / "state.db")
    assert checks.last(ONE, 7, written_at=50.0) == 50.0, "nothing is published unread"
    checks.done(ONE, 7, 100.0)
    checks.done(TWO, 8, 200.0)
    assert checks.last(ONE, 8, written_at=50.0) == 50.0, "another inode was not read"
    database.close()
    database, checks = opened(tmp_path / "state.db")
    assert checks.last(ONE, 7, written_at=50.0) == 100.0
    assert checks.last(ONE, 7, written_at=150.0) == 150.0, "it was written anew since"
    checks.keep_only(lambda digest, inode: (digest, inode) == (TWO, 8))
    database.close()
    database, checks = opened(tmp_path / "state.db")
    assert checks.last(ONE, 7, written_at=50.0) == 50.0
    assert checks.last(TWO, 8, written_at=50.0) == 200.0
    database.close()

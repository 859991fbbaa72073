"""state.db: commits are there after a kill, garbage is told from a database, a failure fails only its own."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from modelcached.ledger import database as state
from modelcached.ledger.database import COMPLETE, SCHEMA_VERSION, Database, NewerSchemaError, close, connect, contents

PIN = "INSERT INTO pins VALUES (?, 'main', 'operator', 0)"


def pins(path: Path) -> list[str]:
    connection = connect(str(path))
    try:
        return [repo for repo, *_ in contents(connection).pins]
    finally:
        connection.close()


def open_files() -> list[str]:
    """This process's, those without a name included."""
    descriptors = Path("/proc/self/fd")
    return [os.readlink(link) for link in descriptors.iterdir() if link.is_symlink()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


async def test_what_was_waited_for_survives_a_kill(path: Path, tmp_path: Path) -> None:
    database = Database(connect(str(path)))
    await database.write((PIN, ("org/a",)))
    killed = tmp_path / "killed"
    killed.mkdir()
    for file in (path, Path(f"{path}-wal")):  # what a kill leaves: nothing is closed, nothing checkpointed
        shutil.copy(file, killed / file.name)
    database.close()
    assert pins(killed / path.name) == ["org/a"]


async def test_what_was_not_waited_for_is_there_after_a_clean_end(path: Path) -> None:
    database = Database(connect(str(path)))
    for number in range(2500):  # more than one transaction takes
        database.write_later((PIN, (f"org/{number:04}",)))
    database.close()
    assert len(pins(path)) == 2500


async def test_statements_of_many_callers_go_into_few_transactions_in_their_order(path: Path) -> None:
    database = Database(connect(str(path)))
    sql = "INSERT OR REPLACE INTO pins VALUES ('org/a', 'main', 'operator', ?)"
    await asyncio.gather(*(database.write((sql, (number,))) for number in range(200)))
    database.close()
    connection = connect(str(path))
    assert connection.execute("SELECT pinned_at FROM pins").fetchall() == [(199,)]
    connection.close()


async def test_rows_that_are_written_together_keep_their_order_with_what_else_is_written(path: Path) -> None:
    database = Database(connect(str(path)))
    lease, use = "INSERT OR REPLACE INTO leases VALUES (?, ?)", "INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?)"
    end = "DELETE FROM leases WHERE id = ?"
    database.write_later((lease, ("a", "1")), (use, ("org/a", "c", 1, 1.0)), (lease, ("b", "1")))
    database.write_later((end, ("a",)), (lease, ("b", "2")), (use, ("org/a", "c", 2, 2.0)), (end, ("c",)))
    database.write_later((lease, ("c", "1")), (end, ("b",)), (lease, ("b", "3")))
    await database.write(*((lease, (f"many {number}", "1")) for number in range(1000)))
    database.close()
    connection = connect(str(path))
    found = contents(connection)
    connection.close()
    assert len(found.leases) == 1002
    assert sorted(found.leases)[:2] == [("b", "3"), ("c", "1")]
    assert found.usage == [("org/a", "c", 2, 2.0)]


async def test_a_large_transaction_makes_no_file_elsewhere(path: Path) -> None:
    """What SQLite keeps to take a statement back belongs into memory: not every /var/tmp can be written to."""
    database = Database(connect(str(path)))
    sql = "INSERT OR REPLACE INTO usage VALUES (?, ?, 0, 0)"
    await database.write(*((sql, (f"org/{n % 97}", f"{n:040}")) for n in range(5000)))
    await database.write(*((sql, (f"org/{n % 97}", f"{n:040}")) for n in range(5000)))
    opened = open_files()
    database.close()
    assert str(path) in opened
    assert [file for file in opened if "etilqs" in file] == []


async def test_a_failed_write_raises_changes_nothing_and_is_shown(path: Path) -> None:
    database = Database(connect(str(path)))
    with pytest.raises(sqlite3.Error):
        await database.write((PIN, ("org/a",)), ("INSERT INTO nowhere VALUES (1)", ()))
    assert "nowhere" in str(database.last_error)
    await database.write((PIN, ("org/b",)))
    assert database.last_error is None
    database.close()
    assert pins(path) == ["org/b"]


async def test_one_callers_mistake_is_not_anothers(path: Path) -> None:
    """They may share a transaction: a lease that was answered for must be there all the same."""
    database = Database(connect(str(path)))
    writes = [database.write((PIN, (f"org/{number}",))) for number in range(20)]
    writes.insert(10, database.write(("INSERT INTO nowhere VALUES (1)", ())))
    results = await asyncio.gather(*writes, return_exceptions=True)
    database.close()
    assert [index for index, result in enumerate(results) if result is not None] == [10]
    assert len(pins(path)) == 20


async def test_a_caller_that_has_gone_does_not_stop_the_writer(path: Path) -> None:
    database = Database(connect(str(path)))
    gone = asyncio.create_task(database.write((PIN, ("org/a",))))
    await asyncio.sleep(0)
    gone.cancel()
    await database.write((PIN, ("org/b",)))
    database.close()
    assert pins(path) == ["org/a", "org/b"]


@pytest.mark.parametrize("content", [b"not a database, and long enough to be none" * 100, os.urandom(8192)])
def test_garbage_is_no_database(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(sqlite3.DatabaseError):
        connect(str(path))


def test_a_damaged_page_is_found_at_the_start(path: Path) -> None:
    connection = connect(str(path))
    connection.executemany(PIN, [(f"org/{number}",) for number in range(2000)])
    connection.close()
    with path.open("r+b") as file:
        file.seek(4096 * 6)
        file.write(b"\xff" * 8192)
    with pytest.raises(sqlite3.DatabaseError):
        connect(str(path)).execute("SELECT count(*) FROM pins").fetchall()


def test_a_database_of_a_newer_daemon_is_refused_and_left_as_it_is(path: Path) -> None:
    connection = connect(str(path))
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(NewerSchemaError, match=f"schema {SCHEMA_VERSION + 1}"):
        connect(str(path))
    assert path.read_bytes() == before


def test_no_second_process_writes_to_it(path: Path) -> None:
    first = connect(str(path))
    first.execute(PIN, ("org/a",))
    other = sqlite3.connect(str(path), timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT * FROM pins").fetchall()
    other.close()
    first.close()
    assert not Path(f"{path}-shm").exists(), "hostPath volumes need no shared memory"


# A write-ahead log that is not there


@pytest.fixture
def killed(path: Path, tmp_path: Path) -> Path:
    """What a kill leaves after a start that was finished; the pin stands for a lease since the last checkpoint."""
    connection = connect(str(path))
    for sql, arguments in [COMPLETE, (PIN, ("org/a",))]:
        connection.execute(sql, arguments)
    left = tmp_path / "killed"
    left.mkdir()
    for file in (path, Path(f"{path}-wal")):
        shutil.copy(file, left / file.name)
    close(connection)
    return left / path.name


def found(path: Path) -> tuple[str, list[str]]:
    """Why leases may be missing, and the pins; the file is left as a kill leaves it."""
    connection = connect(str(path))
    try:
        there = contents(connection)
        left = [shutil.copy(file, f"{file}.left") for file in (path, Path(f"{path}-wal")) if file.exists()]
    finally:
        close(connection)
    for copy in left:
        os.replace(copy, copy.removesuffix(".left"))
    return there.lost, [repo for repo, *_ in there.pins]


def test_nothing_is_lost_where_the_log_of_a_killed_daemon_is_there(killed: Path) -> None:
    assert found(killed) == ("", ["org/a"])
    assert found(killed) == ("", ["org/a"]), "killed again before it has written anything"


def test_nothing_is_lost_after_a_clean_end_which_leaves_no_log(path: Path) -> None:
    connection = connect(str(path))
    connection.execute(*COMPLETE)
    close(connection)
    assert not Path(f"{path}-wal").exists()
    assert found(path) == ("", [])


def test_a_file_that_is_new_has_lost_everything(path: Path) -> None:
    assert found(path) == ("state.db was lost", [])


@pytest.mark.parametrize("left", [None, b"", b"\0" * 16, b"\0" * 4096, b"no log" * 1000, "a bit"])
def test_a_log_that_is_gone_or_garbage_after_a_kill_is_noticed_until_it_is_made_up_for(
    killed: Path, left: bytes | str | None
) -> None:
    log = Path(f"{killed}-wal")
    if left is None:
        log.unlink()
    elif isinstance(left, bytes):
        log.write_bytes(left)
    else:
        content = bytearray(log.read_bytes())
        content[20] ^= 1  # of a salt
        log.write_bytes(content)
    for _ in range(2):  # killed before anybody has made up for it: the next start says it again
        why, there = found(killed)
        assert ("write-ahead log is gone or damaged" in why, there) == (True, [])
    connection = connect(str(killed))
    connection.execute(*COMPLETE)
    close(connection)
    assert found(killed) == ("", [])


def test_a_log_that_is_garbage_beside_a_file_that_was_closed_costs_nothing(path: Path) -> None:
    connection = connect(str(path))
    for sql, arguments in [COMPLETE, (PIN, ("org/a",))]:
        connection.execute(sql, arguments)
    close(connection)
    Path(f"{path}-wal").write_bytes(b"no log" * 1000)
    assert found(path) == ("", ["org/a"])


# Files of older daemons


@pytest.fixture
def version_1(path: Path) -> Path:
    """As a daemon of the first version left it at a clean end."""
    path.write_bytes(gzip.decompress((Path(__file__).parent / "state-1.db.gz").read_bytes()))
    return path


def schema(path: Path) -> tuple[int, list[tuple[str, str]]]:
    """Its version, and what its tables are made of."""
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
    connection.close()
    return version, tables


def test_a_file_of_the_first_version_is_taken_over_with_all_that_is_in_it(version_1: Path, tmp_path: Path) -> None:
    assert schema(version_1)[0] == 1
    connection = connect(str(version_1))
    there = contents(connection)
    close(connection)
    assert there.pins == [("org/name", "main", "operator"), ("org/other", "b" * 40, "operator")]
    assert there.usage == [("org/name", "a" * 40, 7, 1_790_000_000.0)]
    assert there.named == [("org/name", "main", "a" * 40, 6)]
    assert [lease_id for lease_id, _ in there.leases] == ["0123456789abcdef0123456789abcdef"]
    assert (there.lost, there.pods_directory) == ("", "boot-1 1 2")
    new = tmp_path / "new.db"
    close(connect(str(new)))
    assert schema(version_1) == schema(new), "old or new, the same from then on"
    assert schema(new)[0] == SCHEMA_VERSION
    connection = connect(str(version_1))
    assert contents(connection) == there, "and once only"
    assert connection.execute("SELECT pinned_at FROM pins").fetchall() == [(1_790_000_000.5,), (1_790_000_001.5,)]
    close(connection)


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    version_1: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what it had done by then, and the versions before it: the next start begins with a whole file."""
    before = schema(version_1)
    with monkeypatch.context() as broken:
        steps = (*state._MIGRATIONS, "CREATE TABLE more (id INTEGER); INSERT INTO nowhere VALUES (1);")
        broken.setattr(state, "_MIGRATIONS", steps)
        broken.setattr(state, "SCHEMA_VERSION", 1 + len(steps))
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            connect(str(path))
    assert schema(version_1) == before
    connection = connect(str(path))
    assert len(contents(connection).pins) == 2
    close(connection)


def test_a_migration_that_was_killed_is_done_by_the_next_start(version_1: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    connection = connect(str(version_1))  # migrated, and nothing of it is in the file yet but what the mark took along
    for file in (version_1, Path(f"{version_1}-wal")):
        shutil.copy(file, killed / file.name)
    close(connection)
    connection = connect(str(killed / version_1.name))
    there = contents(connection)
    assert (len(there.pins), there.lost) == (2, "")
    close(connection)

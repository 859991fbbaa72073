"""state.db: what files cannot say. Order of use, leases, pins, which commits a ref has named, history.

One writer thread owns the connection; statements queued meanwhile go into one
transaction (group commit). WAL with synchronous=NORMAL: a commit survives a
kill, and after a power loss the database is whole, perhaps a moment older.

While a daemon has it open, the file itself (not only its WAL) carries a mark
that a clean end takes away. A file with the mark and without a WAL has lost
what was committed since the last checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modelcached.ledger import wal

_SCHEMA = """
CREATE TABLE usage (repo_id TEXT, commit_id TEXT, tick INTEGER NOT NULL, used_at REAL NOT NULL,
                    PRIMARY KEY (repo_id, commit_id)) WITHOUT ROWID;
CREATE TABLE leases (id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE pins (repo_id TEXT, revision TEXT, pinned_at REAL NOT NULL,
                   PRIMARY KEY (repo_id, revision)) WITHOUT ROWID;
CREATE TABLE named (repo_id TEXT, revision TEXT, commit_id TEXT, tick INTEGER NOT NULL,
                    PRIMARY KEY (repo_id, revision, commit_id)) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE history (id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL);
"""
"""Version 1, as it was. A new file is made as this and then migrated like any other: one way, always tested."""

_MIGRATIONS = (
    # 2: a pin has an owner, so that the model list takes away its own and no other.
    """
    ALTER TABLE pins RENAME TO pins_1;
    CREATE TABLE pins (repo_id TEXT, revision TEXT, owner TEXT, pinned_at REAL NOT NULL,
                       PRIMARY KEY (repo_id, revision, owner)) WITHOUT ROWID;
    INSERT INTO pins SELECT repo_id, revision, 'operator', pinned_at FROM pins_1;
    DROP TABLE pins_1;
    """,
    # 3: when each blob was last read and found right.
    """
    CREATE TABLE checks (digest TEXT, inode INTEGER, checked_at REAL NOT NULL,
                         PRIMARY KEY (digest, inode)) WITHOUT ROWID;
    """,
)
"""Each makes the next version from the one before. Append only: files of every version are out there."""

SCHEMA_VERSION = 1 + len(_MIGRATIONS)


Statement = tuple[str, Sequence[Any]]
_End = tuple[asyncio.Future[None], Exception | None]

_PUT = "INSERT OR REPLACE INTO "
"""Rows that are put into tables in any order, one table's in their own: no trigger or key connects two tables."""
_ROWS = 200
"""In one statement."""

_COMPLETE, _NEW = "yes", "state.db was lost"
COMPLETE: Statement = ("INSERT OR REPLACE INTO meta VALUES ('complete', ?)", (_COMPLETE,))
"""Written with the leases of a first start; a file without it, or with another value that says why, counts as lost."""


def proven_pods_directory(identity: str) -> Statement:
    """The kubelet's pods directory that has shown a known pod; the next start begins with it."""
    return ("INSERT OR REPLACE INTO meta VALUES ('pods_directory', ?)", (identity,))


def hub_identity(identity: str) -> Statement:
    """Which directory hub/ is; the next start asks whether it still is."""
    return ("INSERT OR REPLACE INTO meta VALUES ('hub', ?)", (identity,))


class NewerSchemaError(Exception):
    """state.db was written by a newer daemon."""


@dataclass(slots=True)
class Contents:
    """Everything that was in the file when it was opened."""

    usage: list[tuple[str, str, int, float]] = field(default_factory=list)
    leases: list[tuple[str, str]] = field(default_factory=list)
    """Id and body."""
    pins: list[tuple[str, str, str]] = field(default_factory=list)
    """Repository, revision and owner."""
    named: list[tuple[str, str, str, int]] = field(default_factory=list)
    lost: str = _NEW
    """Why leases may be missing from the file; empty once a start has made up for them."""
    checks: list[tuple[str, int, float]] = field(default_factory=list)
    """Digest, inode, when it was last read and found right."""
    pods_directory: str = ""
    """What ``proven_pods_directory`` kept; empty where it never did."""
    hub: str = ""
    """What ``hub_identity`` kept; empty where it never did."""


def connect(path: str) -> sqlite3.Connection:
    """Opens or creates the file.

    Raises sqlite3.DatabaseError where it is none, NewerSchemaError where it is too new.
    """
    has_wal = wal.has_header(path)  # before SQLite looks, and begins a new one
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        # EXCLUSIVE before WAL: then the -shm file is not needed, and hostPath volumes need no mmap.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        # What a savepoint keeps to be taken back: in a file of /var/tmp otherwise, which may be read-only or full.
        connection.execute("PRAGMA temp_store=MEMORY")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise NewerSchemaError(f"{path} has schema {version}, this daemon knows up to {SCHEMA_VERSION}")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        _migrate(connection, version)
        _mark_open(connection, cut_off=not has_wal)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """Up to this daemon's version, all of it or nothing: the version is written in the same transaction."""
    steps = (_SCHEMA, *_MIGRATIONS)[version:]
    if steps:
        connection.executescript(f"BEGIN; {''.join(steps)} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")


def _mark_open(connection: sqlite3.Connection, *, cut_off: bool) -> None:
    """From here on the file must have a WAL beside it, until ``close``.

    What is found lost is written down at once: the new WAL would hide it from the next start.
    """
    was_open = connection.execute("SELECT 1 FROM meta WHERE key = 'open'").fetchone() is not None
    if was_open and cut_off:
        why = "state.db was not closed, and its write-ahead log is gone or damaged"
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('complete', ?)", (why,))
    elif not was_open:
        connection.execute("INSERT INTO meta VALUES ('open', 'yes')")
        connection.execute("PRAGMA wal_checkpoint(FULL)").fetchall()  # into the file itself, and onto the disk


def close(connection: sqlite3.Connection) -> None:
    """A clean end: all is in the file, and the mark is gone. Where that fails the mark stays: leases last longer."""
    with contextlib.suppress(sqlite3.Error):
        # RESTART: the frame after it takes the place of an old one, so that a full disk has room for it.
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        connection.execute("DELETE FROM meta WHERE key = 'open'")
    connection.close()


_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """The file itself is bad; not a disk that is full, a lock, or an I/O error that may pass."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return (code & 0xFF) in _DAMAGED


def may_be_full(error: sqlite3.DatabaseError) -> bool:
    """The disk may have no room for what a start writes; a quota (EDQUOT) is an I/O error to SQLite (os_unix.c)."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


def contents(connection: sqlite3.Connection) -> Contents:
    """Reads all of it; it is small."""
    meta: dict[str, str] = dict(connection.execute("SELECT key, value FROM meta"))
    return Contents(
        usage=connection.execute("SELECT repo_id, commit_id, tick, used_at FROM usage").fetchall(),
        leases=connection.execute("SELECT id, body FROM leases").fetchall(),
        pins=connection.execute("SELECT repo_id, revision, owner FROM pins").fetchall(),
        checks=connection.execute("SELECT digest, inode, checked_at FROM checks").fetchall(),
        named=connection.execute("SELECT repo_id, revision, commit_id, tick FROM named").fetchall(),
        lost="" if meta.get("complete") == _COMPLETE else meta.get("complete", _NEW),
        pods_directory=meta.get("pods_directory", ""),
        hub=meta.get("hub", ""),
    )


@dataclass(slots=True)
class _Job:
    statements: list[Statement]
    done: asyncio.Future[None] | None
    loop: asyncio.AbstractEventLoop | None


@dataclass(slots=True)
class _Question:
    statement: Statement
    answer: asyncio.Future[list[tuple[Any, ...]]]
    loop: asyncio.AbstractEventLoop


class Database:
    """The writer. ``write`` waits for the commit, ``write_later`` does not."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[_Job | _Question | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()
        self.last_error: str | None = None
        """Why the last transaction failed; None when it did not."""

    async def write(self, *statements: Statement) -> None:
        """Commits. Raises sqlite3.Error when the file cannot be written; nothing is then changed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._queue.put(_Job(list(statements), done, loop))
        await done

    def write_later(self, *statements: Statement) -> None:
        """Commits with the next transaction; a failure only costs order or history, and shows in ``last_error``."""
        self._queue.put(_Job(list(statements), None, None))

    async def read(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows, what was written before included. Raises sqlite3.Error."""
        loop = asyncio.get_running_loop()
        question = _Question((sql, arguments), loop.create_future(), loop)
        self._queue.put(question)
        return await question.answer

    def close(self) -> None:
        """Writes what is queued, then closes the file."""
        self._queue.put(None)
        self._thread.join()
        close(self._connection)

    def _run(self) -> None:
        running = True
        while running:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < 1000:
                    batch.append(self._queue.get_nowait())
            running = None not in batch
            jobs = [job for job in batch if isinstance(job, _Job)]
            if jobs:
                self._commit(jobs)
            for question in batch:
                if isinstance(question, _Question):
                    self._answer(question)

    def _answer(self, question: _Question) -> None:
        rows: list[tuple[Any, ...]] = []
        failed: Exception | None = None
        try:
            rows = self._connection.execute(*question.statement).fetchall()
        except Exception as error:  # noqa: BLE001 - who asked is told; the thread goes on, for leases need it
            failed = error

        def settle() -> None:
            if question.answer.done():
                return
            if failed is not None:
                question.answer.set_exception(failed)
            else:
                question.answer.set_result(rows)

        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody waits any more
            question.loop.call_soon_threadsafe(settle)

    def _commit(self, jobs: list[_Job]) -> None:
        """One transaction for all; a job whose statements fail takes back only its own."""
        errors: dict[int, Exception] = {}
        try:
            if not self._transact_together(jobs):
                errors = self._transact_apart(jobs)
        except Exception as error:  # noqa: BLE001 - also what is no value for SQLite: the thread goes on
            errors = dict.fromkeys(range(len(jobs)), error)
        self.last_error = str(next(iter(errors.values()))) if errors else None
        ends: dict[asyncio.AbstractEventLoop, list[_End]] = {}
        for number, job in enumerate(jobs):
            if job.done is not None and job.loop is not None:
                ends.setdefault(job.loop, []).append((job.done, errors.get(number)))
        for loop, ended in ends.items():
            with contextlib.suppress(RuntimeError):  # the loop has gone: nobody waits any more
                loop.call_soon_threadsafe(_settle, ended)

    def _transact_together(self, jobs: list[_Job]) -> bool:
        """Whether it was committed; nearly always it is, and needs no savepoints. Nothing has changed where not.

        Rows for the same table go in one statement: with each the thread gives the GIL away, and waits to have it back.
        """
        rows: dict[str, list[Sequence[Any]]] = {}
        try:
            self._connection.execute("BEGIN")
            for job in jobs:
                for sql, arguments in job.statements:
                    if not sql.startswith(_PUT):
                        self._put(rows)
                        self._connection.execute(sql, arguments)
                    else:
                        rows.setdefault(sql, []).append(arguments)
            self._put(rows)
            self._connection.execute("COMMIT")
        except Exception:  # noqa: BLE001 - whose it is shows when each is tried apart
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            return False
        return True

    def _put(self, rows: dict[str, list[Sequence[Any]]]) -> None:
        for sql, several in rows.items():
            head, values, row = sql.partition(" VALUES ")
            for begin in range(0, len(several), _ROWS):
                few = several[begin : begin + _ROWS]
                self._connection.execute(f"{head}{values}{', '.join([row] * len(few))}", list(itertools.chain(*few)))
        rows.clear()

    def _transact_apart(self, jobs: list[_Job]) -> dict[int, Exception]:
        """Each in a savepoint of its own; the jobs that failed. Raises sqlite3.Error where nothing was committed."""
        errors: dict[int, Exception] = {}
        try:
            self._connection.execute("BEGIN")
            for number, job in enumerate(jobs):
                try:
                    self._run_job(job)
                except Exception as error:
                    if not self._connection.in_transaction:  # a full disk ends all of it
                        raise
                    errors[number] = error
            self._connection.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        return errors

    def _run_job(self, job: _Job) -> None:
        self._connection.execute("SAVEPOINT job")
        try:
            for sql, arguments in job.statements:
                self._connection.execute(sql, arguments)
        except Exception:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK TO job")
                self._connection.execute("RELEASE job")
            raise
        self._connection.execute("RELEASE job")


def _settle(ended: list[_End]) -> None:
    for done, error in ended:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

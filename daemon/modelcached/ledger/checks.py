"""When the content of each blob was last read and found right, so that a restart does not begin anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from modelcached.ledger.database import Database, Statement
from modelcached.model import Digest

Checked = tuple[str, int]
"""A digest's hex, and an inode: what one reading proves."""


class Checks:
    """The event loop's alone."""

    def __init__(self, database: Database, rows: Iterable[tuple[str, int, float]]) -> None:
        self._database = database
        self._at: dict[Checked, float] = {(digest, inode): at for digest, inode, at in rows}

    def last(self, digest: Digest, inode: int, written_at: float) -> float:
        """When it was last read; it was when it was written, for nothing is published unread. Seconds, epoch."""
        return max(self._at.get((digest.hex, inode), 0.0), written_at)

    def done(self, digest: Digest, inode: int, at: float) -> None:
        """It was read and is right. Losing the note costs one reading."""
        self._at[digest.hex, inode] = at
        self._database.write_later(("INSERT OR REPLACE INTO checks VALUES (?, ?, ?)", (digest.hex, inode, at)))

    def keep_only(self, is_there: Callable[[Digest, int], bool]) -> None:
        """Forgets what is cached no more."""
        gone = [key for key in self._at if (digest := Digest.parse(key[0])) is None or not is_there(digest, key[1])]
        statements: list[Statement] = []
        for key in gone:
            del self._at[key]
            statements.append(("DELETE FROM checks WHERE digest = ? AND inode = ?", key))
        if statements:
            self._database.write_later(*statements)

"""SQLite's write-ahead log as a file: whether an end that was not clean has left one.

What can be proven from outside: after our first commit the file begins with a
header (https://sqlite.org/fileformat2.html#walformat), which a kill leaves, and
a power loss too, for SQLite syncs it; only a clean end removes the file. So a
file that is gone, is short, or begins with something else has lost what was
committed since the last checkpoint. SQLite says nothing: it begins a new one.

Another program that opens the file of a killed daemon takes the log into it and
removes the log: nothing is lost then, and it counts as lost all the same.

What cannot: SQLite reads frames up to the first whose checksum is wrong, and
both the rest of an earlier round and the last write before a kill look like
that. Frames that were damaged behind a whole header go unnoticed.
"""

from __future__ import annotations

import struct

_HEADER_BYTES = 32
_MAGIC = 0x377F0682
"""Its lowest bit says that the checksums are over big-endian words."""


def has_header(path: str) -> bool:
    """There is a log beside the database, and its beginning is what SQLite wrote. Raises OSError."""
    try:
        with open(f"{path}-wal", "rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return False
    if len(header) < _HEADER_BYTES:
        return False
    magic, *_, first, second = struct.unpack(">8I", header)
    if magic & ~1 != _MAGIC:
        return False
    return _checksum(struct.unpack(f"{'>' if magic & 1 else '<'}6I", header[:24])) == (first, second)


def _checksum(words: tuple[int, ...]) -> tuple[int, int]:
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second

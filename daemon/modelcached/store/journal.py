"""Which ranges of an unfinished blob are done, in a form that survives a kill and knows what survives a power loss.

A text file, one record a line, each with a CRC-32 so that a torn or stale
line ends the reading instead of misleading it::

    {"format_version":1,"digest":"…","size":…,"boot_id":"…"} crc
    d <start> <end> crc      the range is written
    s <offset> crc           the lines that end at or before this offset were fdatasynced
    b <boot_id> crc          from here on another boot

After a restart in the same boot all records count: the page cache outlived the
process. In another boot only those that an ``s`` covers do.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelcached.model import Digest

FORMAT_VERSION = 1
_DONE = re.compile(r"d (\d+) (\d+)")


@dataclass(slots=True)
class Ranges:
    """A set of byte positions as sorted, disjoint, half-open ranges."""

    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> None:
        """Adds [start, end); overlaps and neighbours melt together."""
        if start >= end:
            return
        merged: list[tuple[int, int]] = []
        for low, high in self.spans:
            if high < start or low > end:
                merged.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        merged.append((start, end))
        merged.sort()
        self.spans = merged

    @property
    def total(self) -> int:
        """How many bytes are in the set."""
        return sum(end - start for start, end in self.spans)

    @property
    def prefix(self) -> int:
        """How far the set reaches without a gap from 0."""
        return self.spans[0][1] if self.spans and self.spans[0][0] == 0 else 0

    def missing(self, size: int) -> list[tuple[int, int]]:
        """The gaps below size."""
        gaps, position = [], 0
        for start, end in self.spans:
            if position < min(start, size):
                gaps.append((position, min(start, size)))
            position = max(position, end)
        if position < size:
            gaps.append((position, size))
        return gaps


def _line(text: str) -> bytes:
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def header(digest: Digest, size_bytes: int, boot: str) -> bytes:
    """The first line."""
    fields = {"format_version": FORMAT_VERSION, "digest": digest.hex, "size": size_bytes, "boot_id": boot}
    return _line(json.dumps(fields, separators=(",", ":")))


def done(ranges: Iterable[tuple[int, int]]) -> bytes:
    """Records that ranges are written."""
    return b"".join(_line(f"d {start} {end}") for start, end in ranges)


def checkpoint(offset: int) -> bytes:
    """Records that all lines up to the offset speak of synced data; others may have come in meanwhile."""
    return _line(f"s {offset}")


def rebooted(boot: str) -> bytes:
    """Records that what follows is written under another boot."""
    return _line(f"b {boot}")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a journal says."""

    size_bytes: int
    trusted: Ranges
    boot_id: str
    """The boot that wrote last."""
    valid_bytes: int
    """Where the good lines end; anything behind is cut off before appending."""


def read(content: bytes, digest: Digest, current_boot: str) -> Reading | None:
    """What can be trusted now; None where it is no journal of this digest."""
    reading_boot, size = "", -1
    synced = Ranges()
    pending: list[tuple[int, int, int]] = []  # offset behind the line, start, end
    valid = 0
    for raw in content.splitlines(keepends=True):
        text, _, crc = raw.decode("ascii", "replace").rstrip("\n").rpartition(" ")
        if not raw.endswith(b"\n") or crc != f"{zlib.crc32(text.encode()):08x}":
            break
        if valid == 0:
            try:
                fields = json.loads(text)
                if fields["format_version"] != FORMAT_VERSION or fields["digest"] != digest.hex:
                    return None
                size, reading_boot = int(fields["size"]), str(fields["boot_id"])
            except (ValueError, KeyError, TypeError):
                return None
        elif text.startswith("s "):
            reached = int(text[2:])
            for line_end, start, end in pending:
                if line_end <= reached:
                    synced.add(start, end)
            pending = [entry for entry in pending if entry[0] > reached]
        elif text.startswith("b "):
            pending, reading_boot = [], text[2:]
        elif match := _DONE.fullmatch(text):
            pending.append((valid + len(raw), int(match[1]), min(int(match[2]), size)))
        else:
            break
        valid += len(raw)
    if size < 0:
        return None
    if reading_boot == current_boot:
        for _, start, end in pending:
            synced.add(start, end)
    return Reading(size, synced, reading_boot, valid)

"""I5: a journal never claims a byte that is not there, and forgets none that a kill leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelcached.model import Algorithm, Digest
from modelcached.store import journal

SIZE = 200
unhurried = settings(deadline=None, database=None)  # a busy machine is no failure
DIGEST = Digest(Algorithm.SHA256, "ab" * 32)
spans = st.tuples(st.integers(0, SIZE + 20), st.integers(0, SIZE + 20)).map(lambda pair: (min(pair), max(pair)))


def positions(ranges: journal.Ranges) -> set[int]:
    return {position for start, end in ranges.spans for position in range(start, end)}


@unhurried
@given(st.lists(spans, max_size=12))
def test_ranges_are_a_set_of_positions(added: list[tuple[int, int]]) -> None:
    ranges, expected = journal.Ranges(), set[int]()
    for start, end in added:
        ranges.add(start, end)
        expected |= set(range(start, end))
        assert positions(ranges) == expected
        assert ranges.total == len(expected)
        assert ranges.prefix == next(n for n in range(SIZE + 30) if n not in expected)
        gaps = ranges.missing(SIZE)
        assert {n for low, high in gaps for n in range(low, high)} == set(range(SIZE)) - expected
        assert all(low < high for low, high in gaps + ranges.spans)
        assert ranges.spans == sorted(ranges.spans)
        assert all(one[1] < other[0] for one, other in zip(ranges.spans, ranges.spans[1:], strict=False))


@dataclass
class Written:
    """A journal as it was written, with what each of its records means."""

    content: bytes = b""
    records: list[tuple[int, str, tuple[int, int]]] = field(default_factory=list)  # where it ends, kind, meaning

    def add(self, kind: str, record: bytes, meaning: tuple[int, int] = (0, 0)) -> None:
        self.content += record
        self.records.append((len(self.content), kind, meaning))

    def trusted(self, cut: int, *, same_boot: bool) -> set[int]:
        """By the rule in words: all of this boot; of an earlier one what a checkpoint covers."""
        whole = [record for record in self.records if record[0] <= cut]
        trusted: set[int] = set()
        boots = [end for end, kind, _ in whole if kind == "boot"]
        for end, kind, (start, stop) in whole:
            if kind != "done":
                continue
            next_boot = min((boot for boot in boots if boot > end), default=None)
            covered = any(
                k == "checkpoint" and upto >= end and e > end and (next_boot is None or e < next_boot)
                for e, k, (upto, _) in whole
            )
            if covered or (same_boot and next_boot is None):
                trusted |= set(range(start, min(stop, SIZE)))
        return trusted


@st.composite
def journals(draw: st.DrawFn) -> Written:
    written = Written()
    written.add("header", journal.header(DIGEST, SIZE, "boot-0"))
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["done", "done", "done", "checkpoint", "boot"]))
        if kind == "done":
            span = draw(spans)
            written.add("done", journal.done([span]), span)
        elif kind == "checkpoint":
            upto = draw(st.sampled_from([end for end, _, _ in written.records]))
            written.add("checkpoint", journal.checkpoint(upto), (upto, 0))
        else:
            written.add("boot", journal.rebooted(f"boot-{number + 1}"))
    return written


def last_boot(written: Written, cut: int) -> str:
    names = [line.split(b" ")[1].decode() for line in written.content[:cut].split(b"\n")[:-1] if line[:2] == b"b "]
    return names[-1] if names else "boot-0"


@unhurried
@given(journals(), st.data())
def test_a_journal_torn_anywhere_means_what_its_whole_lines_mean(written: Written, data: st.DataObject) -> None:
    first_line = written.records[0][0]
    cut = data.draw(st.integers(first_line, len(written.content)))
    whole = max(end for end, _, _ in written.records if end <= cut)
    for same_boot in (True, False):
        boot = last_boot(written, whole) if same_boot else "another boot"
        reading = journal.read(written.content[:cut], DIGEST, boot)
        assert reading is not None
        assert positions(reading.trusted) == written.trusted(cut, same_boot=same_boot)
        assert (reading.valid_bytes, reading.size_bytes) == (whole, SIZE)


@unhurried
@given(journals(), st.data())
def test_what_stands_behind_a_damaged_line_is_not_believed(written: Written, data: st.DataObject) -> None:
    at = data.draw(st.integers(written.records[0][0], len(written.content)))
    damage = data.draw(st.integers(1, 255))
    damaged = bytearray(written.content)
    if at == len(damaged):
        damaged += bytes([damage])
    else:
        damaged[at] ^= damage
    before = max(end for end, _, _ in written.records if end <= at)
    reading = journal.read(bytes(damaged), DIGEST, last_boot(written, before))
    assert reading is not None
    assert reading.valid_bytes == before
    assert positions(reading.trusted) == written.trusted(before, same_boot=True)


def test_a_checkpoint_speaks_of_what_was_marked_before_its_flush_began() -> None:
    first = journal.header(DIGEST, SIZE, "boot") + journal.done([(0, 10)])
    content = first + journal.done([(10, 20)]) + journal.checkpoint(len(first))
    reading = journal.read(content, DIGEST, "another boot")
    assert reading is not None
    assert reading.trusted.spans == [(0, 10)]


def test_ranges_that_overlap_are_counted_once() -> None:
    content = journal.header(DIGEST, SIZE, "boot") + journal.done([(0, 60), (40, 100), (100, 120), (130, 999)])
    reading = journal.read(content, DIGEST, "boot")
    assert reading is not None
    assert reading.trusted.spans == [(0, 120), (130, SIZE)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b" 00000000\n",
        journal.done([(0, 10)]),
        journal.header(DIGEST, SIZE, "boot")[:-1],
        journal.header(Digest(Algorithm.SHA256, "cd" * 32), SIZE, "boot"),
    ],
    ids=["empty", "zeros", "a line of nothing", "no header", "torn header", "another blob's"],
)
def test_what_is_no_journal_of_the_blob_is_none(content: bytes) -> None:
    assert journal.read(content, DIGEST, "boot") is None


def test_a_line_of_nothing_with_its_right_checksum_ends_the_reading() -> None:
    content = journal.header(DIGEST, SIZE, "boot") + journal.done([(0, 10)])
    reading = journal.read(content + b" 00000000\n" + journal.done([(10, 20)]), DIGEST, "boot")
    assert reading is not None
    assert (reading.trusted.spans, reading.valid_bytes) == ([(0, 10)], len(content))

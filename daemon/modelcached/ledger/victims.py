"""Which snapshots go when space is wanted: the first of an order, and what du would lose by each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from modelcached.ledger.space import NOTHING, Amount
from modelcached.model import Digest, RepoId, SnapshotId


class Name(NamedTuple):
    """One name of a blob: the digest in a repository's blobs/."""

    repo_id: RepoId
    digest: Digest


class Blob(Protocol):
    """What lies behind a name."""

    @property
    def inode(self) -> int:
        """Its number."""

    @property
    def allocated_bytes(self) -> int:
        """What du sees of it."""

    @property
    def link_count(self) -> int:
        """Names anywhere on the filesystem; those that are not ours keep the bytes alive."""


@dataclass(frozen=True, slots=True)
class Books:
    """Of one repository."""

    others: Counter[Digest]
    """How many of its snapshots and requests need a blob besides one; what is not in it is one's own."""
    blobs: Mapping[Digest, Blob]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot that might go."""

    id: SnapshotId
    digests: frozenset[Digest]
    """The blobs of its repository that it links to."""
    own_bytes: int
    """Blocks of its directories and links."""
    own_inodes: int = 0
    """Those, and its record's."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A snapshot that goes, and what du loses with it, after those before it have gone."""

    id: SnapshotId
    freed_bytes: int
    freed_inodes: int = 0


class Shares:
    """Who shares what: counts names down as snapshots go, and says when an inode's last one went."""

    def __init__(self, open_books: Callable[[RepoId], Books]) -> None:
        """Books are opened for repositories that are asked about, for a cache has many more; then they are ours."""
        self._open_books = open_books
        self._books: dict[RepoId, Books] = {}
        self._names_gone: Counter[int] = Counter()

    def sizes(self, candidate: Candidate) -> tuple[int, int]:
        """What du sees of the candidate's blobs, and what it would lose if only the candidate went.

        In one pass, for a list has thousands of them.
        """
        books = self._of(candidate.id.repo_id)
        others, blobs = books.others, books.blobs.get
        size = freed = 0
        several: dict[int, tuple[int, int, int]] = {}
        for digest in candidate.digests:
            blob = blobs(digest)
            if blob is None:
                continue
            own = not others or others[digest] <= 0  # most repositories share nothing within
            if blob.link_count > 1:
                *_, gone = several.get(blob.inode, (0, 0, self._names_gone[blob.inode]))
                several[blob.inode] = blob.allocated_bytes, blob.link_count, gone + own
                continue
            size += blob.allocated_bytes
            if own:
                freed += blob.allocated_bytes
        for allocated, names, gone in several.values():
            size += allocated
            if gone == names:
                freed += allocated
        return size, candidate.own_bytes + freed

    def remove(self, candidate: Candidate) -> Victim:
        """Takes the candidate away; what du loses by that."""
        books = self._of(candidate.id.repo_id)
        others, blobs = books.others, books.blobs.get
        freed, inodes = candidate.own_bytes, candidate.own_inodes
        several: dict[int, Blob] = {}
        for digest in candidate.digests:
            if others and (more := others[digest]) > 0:
                others[digest] = more - 1
                continue
            if (blob := blobs(digest)) is None:
                continue
            if blob.link_count > 1:
                several[blob.inode] = blob
                self._names_gone[blob.inode] += 1
                continue
            freed += blob.allocated_bytes
            inodes += 1
        for inode, blob in several.items():  # with the last of its names
            if self._names_gone[inode] == blob.link_count:
                freed += blob.allocated_bytes
                inodes += 1
        return Victim(candidate.id, freed, inodes)

    def _of(self, repo_id: RepoId) -> Books:
        books = self._books.get(repo_id)
        if books is None:
            books = self._books[repo_id] = self._open_books(repo_id)
        return books


def choose(in_order: Iterable[Candidate], shares: Shares, wanted: Amount) -> tuple[list[Victim], Amount]:
    """The fewest from the front of the order that free as much; and what they free.

    If all together free less, all are returned: the caller sees the sum and decides.
    """
    victims: list[Victim] = []
    freed, left = NOTHING, iter(in_order)
    while not freed.covers(wanted) and (candidate := next(left, None)) is not None:
        victim = shares.remove(candidate)
        victims.append(victim)
        freed += Amount(victim.freed_bytes, victim.freed_inodes)
    return victims, freed

"""Which snapshots go when space is wanted: least recently used first, and what du would lose by each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modelcached.model import Digest, RepoId, SnapshotId


@dataclass(frozen=True, slots=True)
class Name:
    """One name of a blob: the digest in a repository's blobs/."""

    repo_id: RepoId
    digest: Digest


@dataclass(frozen=True, slots=True)
class Inode:
    """What lies behind a name."""

    number: int
    allocated_bytes: int
    link_count: int
    """Names anywhere on the filesystem; those that are not ours keep the bytes alive."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A snapshot that might go."""

    id: SnapshotId
    names: frozenset[Name]
    own_bytes: int
    """Blocks of its directories and links."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A snapshot that goes, and what du loses with it, after those before it have gone."""

    id: SnapshotId
    freed_bytes: int


class Shares:
    """Who shares what: counts names down as snapshots go, and says when an inode's last one went."""

    def __init__(self, users: Mapping[Name, int], inodes: Mapping[Name, Inode]) -> None:
        """``users``: how many snapshots of its repository link to each name."""
        self._users = Counter(users)
        self._inodes = inodes
        self._names_left = {inode.number: inode.link_count for inode in inodes.values()}

    def alone(self, candidate: Candidate) -> int:
        """What du would lose if only the candidate went."""
        gone: Counter[int] = Counter()
        freed = candidate.own_bytes
        for name in candidate.names:
            inode = self._inodes.get(name)
            if inode is None or self._users[name] > 1:
                continue
            gone[inode.number] += 1
            if gone[inode.number] == self._names_left[inode.number]:
                freed += inode.allocated_bytes
        return freed

    def remove(self, candidate: Candidate) -> Victim:
        """Takes the candidate away; what du loses by that."""
        freed = candidate.own_bytes
        for name in candidate.names:
            self._users[name] -= 1
            inode = self._inodes.get(name)
            if self._users[name] > 0 or inode is None:
                continue
            self._names_left[inode.number] -= 1
            if self._names_left[inode.number] == 0:
                freed += inode.allocated_bytes
        return Victim(candidate.id, freed)


def choose(in_order: Iterable[Candidate], shares: Shares, wanted_bytes: int) -> tuple[list[Victim], int]:
    """The fewest from the front of the order that free ``wanted_bytes``; and what they free.

    If all together free less, all are returned: the caller sees the sum and decides.
    """
    victims: list[Victim] = []
    freed = 0
    for candidate in in_order:
        if freed >= wanted_bytes:
            break
        victim = shares.remove(candidate)
        victims.append(victim)
        freed += victim.freed_bytes
    return victims, freed

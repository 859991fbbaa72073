"""The model: what should be in the cache, who protects what, and whose turn it is to go. A few dictionaries."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from modelcached.ledger.leases import LeaseKind
from modelcached.model import Commit, RepoId, Revision, SnapshotId, as_commit

from tests.property.truth import Name, Truth

BLOCK = 4096
GRACE_SECONDS = 60.0
ABSENCES = 2


@dataclass
class Kept:
    """A snapshot that the daemon knows of."""

    paths: dict[str, str]
    """Path -> the blob's name."""
    profiles: set[str] = field(default_factory=set)
    """Those that are complete."""
    ours: bool = True
    """Written or adopted by the daemon."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.paths.values())

    @property
    def own_bytes(self) -> int:
        """A block each for links and directories: what the daemon reckons with, whatever the filesystem takes."""
        folders = {path.rpartition("/")[0] for path in self.paths}
        return BLOCK * (len(self.paths) + len(folders))


@dataclass
class PlainLease:
    kind: LeaseKind
    models: tuple[tuple[SnapshotId, str], ...]
    ttl: float | None
    since: float
    pod: str = ""
    streams: int = 0
    gone: float | None = None

    def is_over(self, now: float) -> bool:
        if self.kind is LeaseKind.STREAM:
            return not self.streams and self.gone is not None and now - self.gone >= GRACE_SECONDS
        return self.ttl is not None and now >= self.since + self.ttl


@dataclass(eq=False)
class Plain:
    known: dict[SnapshotId, Kept] = field(default_factory=dict)
    used: dict[SnapshotId, int] = field(default_factory=dict)
    """When it was last asked for; what never was comes first."""
    refs: dict[tuple[RepoId, Revision], Commit] = field(default_factory=dict)
    named: dict[tuple[RepoId, Revision], dict[Commit, int]] = field(default_factory=dict)
    """Commits that a branch has named, and when it last began to."""
    leases: dict[str, PlainLease] = field(default_factory=dict)
    pins: set[tuple[RepoId, Revision]] = field(default_factory=set)
    absent: Counter[str] = field(default_factory=Counter)
    """How often in a row a pod was missed."""
    ticks: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def copy(self) -> Plain:
        """As it is now; lists that change are copied too."""
        named = {ref: dict(commits) for ref, commits in self.named.items()}
        return Plain(
            dict(self.known), dict(self.used), dict(self.refs), named, dict(self.leases), set(self.pins), self.absent
        )

    # Protection

    def keepers(self, snapshot: SnapshotId) -> list[str]:
        """Who keeps it; nobody: it may go."""
        found = []
        for lease_id, lease in self.leases.items():
            for leased, revision in lease.models:
                now = self.refs.get((leased.repo_id, Revision(revision))) if revision else None
                if leased == snapshot or (leased.repo_id == snapshot.repo_id and now == snapshot.commit):
                    found.append(lease_id)
        for repo_id, revision in self.pins:
            named = self.refs.get((repo_id, revision)) or as_commit(revision)
            if repo_id == snapshot.repo_id and named == snapshot.commit:
                found.append(f"pin {revision}")
        return found

    def protected_names(self, snapshots: Iterable[SnapshotId]) -> dict[Name, list[str]]:
        """Blobs of those that a lease or a pin keeps."""
        found: dict[Name, list[str]] = {}
        for snapshot in snapshots:
            if keepers := self.keepers(snapshot):
                for name in self.known[snapshot].names:
                    found.setdefault((snapshot.repo_id, name), []).extend(keepers)
        return found

    # Order

    def order(self, snapshots: Iterable[SnapshotId]) -> list[SnapshotId]:
        """The one that was not wanted for longest goes first."""
        return sorted(snapshots, key=lambda snapshot: (self.used.get(snapshot, 0), snapshot))

    def candidates(self, held: frozenset[SnapshotId] = frozenset()) -> list[SnapshotId]:
        """Those that may go, in the order in which they do: what branches have left behind is before all."""
        free = self.order(s for s in self.known if s not in held and not self.keepers(s))
        left = [snapshot for snapshot in free if self.left_behind(snapshot)]
        return left + [snapshot for snapshot in free if snapshot not in left]

    def left_behind(self, snapshot: SnapshotId) -> bool:
        """No branch names it; one that did had begun to name another when it was last asked for, or has since."""
        used = self.used.get(snapshot, 0)
        branches = {ref: now for ref, now in self.refs.items() if ref[0] == snapshot.repo_id}
        if snapshot.commit in branches.values():
            return False
        histories = [(self.named.get(ref, {}), now) for ref, now in branches.items()]
        return any(history.get(now, 0) > used for history, now in histories if snapshot.commit in history)

    def take_over(
        self, used: Mapping[SnapshotId, int], named: Mapping[tuple[RepoId, Revision], Mapping[Commit, int]]
    ) -> None:
        """The daemon's own times, where the model cannot know what came first; what comes is later."""
        self.used, self.named = dict(used), {ref: dict(commits) for ref, commits in named.items()}
        times = [*self.used.values(), *(at for commits in self.named.values() for at in commits.values())]
        self.ticks = itertools.count(max(times, default=0) + 1)

    def touch(self, snapshot: SnapshotId) -> None:
        self.used[snapshot] = next(self.ticks)

    # Branches

    def point(self, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
        self.refs[repo_id, revision] = commit
        self.named.setdefault((repo_id, revision), {})[commit] = next(self.ticks)

    def gone(self, snapshots: Iterable[SnapshotId]) -> None:
        """Evicted: what pointed there points to the newest that is left, or is no more."""
        going = set(snapshots)
        for snapshot in going:
            self.known.pop(snapshot, None)
            self.used.pop(snapshot, None)
        for (repo_id, revision), commit in list(self.refs.items()):
            if SnapshotId(repo_id, commit) in going:
                history = self.named.get((repo_id, revision), {})
                left = [c for c in history if SnapshotId(repo_id, c) in self.known]
                if left:
                    self.refs[repo_id, revision] = max(left, key=history.__getitem__)
                else:
                    del self.refs[repo_id, revision]
        for (repo_id, _), history in self.named.items():
            for commit in [commit for commit in history if SnapshotId(repo_id, commit) in going]:
                del history[commit]

    # Leases

    def look(self, now: float, pods: frozenset[str]) -> set[str]:
        """Ends the leases whose time is up or whose pod is gone; which."""
        missed = set()
        for uid in {lease.pod for lease in self.leases.values() if lease.kind is LeaseKind.POD}:
            self.absent[uid] = 0 if uid in pods else self.absent[uid] + 1
            if self.absent[uid] >= ABSENCES:
                missed.add(uid)
                del self.absent[uid]
        over = {i for i, lease in self.leases.items() if lease.is_over(now) or (lease.pod and lease.pod in missed)}
        for lease_id in over:
            del self.leases[lease_id]
        return over

    def supersede(self, snapshots: set[SnapshotId]) -> None:
        """A new proof of use replaces those that were only recovered."""
        for lease_id, lease in list(self.leases.items()):
            if lease.kind is LeaseKind.RECOVERED and {snapshot for snapshot, _ in lease.models} <= snapshots:
                del self.leases[lease_id]

    def restarted(self, now: float, *, another_boot: bool) -> None:
        """Streams begin to be gone; another boot begins all times anew."""
        self.absent.clear()
        for lease in self.leases.values():
            lease.streams = 0
            lease.gone = now if lease.kind is LeaseKind.STREAM else None
            if another_boot:
                lease.since = now


@dataclass(frozen=True)
class Shelf:
    """Who shares which inode, as du would see it."""

    links: Mapping[Name, int]
    """Inode."""
    inodes: Mapping[int, tuple[int, int]]
    """Allocated bytes, and names anywhere."""

    @classmethod
    def of(cls, truth: Truth, also: Mapping[Name, Name]) -> Shelf:
        """``also``: names that a request has made since, and whose inode each is."""
        links = {name: status.st_ino for name, status in truth.blobs.items()}
        inodes = {status.st_ino: (status.st_blocks * 512, status.st_nlink) for status in truth.blobs.values()}
        for name, donor in also.items():
            number = links[name] = links[donor]
            size, names = inodes[number]
            inodes[number] = (size, names + 1)
        return cls(links, inodes)


def lost_by(plain: Plain, shelf: Shelf, going: Iterable[SnapshotId], held: frozenset[Name]) -> int:
    """What du loses when all of them go: blobs with no name left, links and directories."""
    gone = set(going)
    stays = {(s.repo_id, name) for s, kept in plain.known.items() if s not in gone for name in kept.names} | held
    names = {(s.repo_id, name) for s in gone for name in plain.known[s].names} - stays
    left = Counter(shelf.links[name] for name in names if name in shelf.links)
    blobs = sum(shelf.inodes[number][0] for number, count in left.items() if count == shelf.inodes[number][1])
    return blobs + sum(plain.known[snapshot].own_bytes for snapshot in gone)


def plain_lru(
    plain: Plain, shelf: Shelf, gone: list[SnapshotId], wanted: int, held: frozenset[SnapshotId], names: frozenset[Name]
) -> tuple[list[SnapshotId], int]:
    """The fewest of those that may go, the longest unused first, that give ``wanted`` bytes; and how much they give.

    ``gone`` went before. Brute force, for there are ten of them.
    """
    order = [snapshot for snapshot in plain.candidates(held) if snapshot not in gone]
    before = lost_by(plain, shelf, gone, names)
    given = 0
    for count in range(len(order) + 1):
        given = lost_by(plain, shelf, [*gone, *order[:count]], names) - before
        if given >= wanted:
            return order[:count], given
    return order, given

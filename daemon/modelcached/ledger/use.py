"""Who uses what: order of use, holds, leases, pins, and which commits a ref has named.

The single place that says whether a snapshot may go (invariant 3). Everything
here happens on the event loop, so a check and what follows from it are one step.
"""

from __future__ import annotations

import enum
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from modelcached.ledger.clock import Clock
from modelcached.ledger.database import Contents, Database, Statement
from modelcached.ledger.leases import Lease, LeasedModel, LeaseKind
from modelcached.ledger.victims import Name
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, as_commit

K = TypeVar("K")
T = TypeVar("T")
Refs = Mapping[RepoId, dict[Revision, Commit]]
_UNKNOWN_HOLDER = "unknown: "


@dataclass(frozen=True, slots=True)
class Protection:
    """Why a snapshot may not go."""

    kind: str
    """pinned, leased or held."""
    who: str

    def __str__(self) -> str:
        return f"{self.kind} by {self.who}" if self.who else self.kind


@dataclass(frozen=True, slots=True)
class Usage:
    """When a snapshot was last asked for."""

    tick: int
    """Logical clock: what the order is made from."""
    used_at: float
    """Seconds since the epoch: what is shown."""


class PinOwner(enum.StrEnum):
    """Who takes a pin away again."""

    OPERATOR = "operator"
    LIST = "list"
    """The model list: its pin goes with its line."""

    @classmethod
    def of(cls, text: str) -> PinOwner:
        """What state.db says; a pin that is nobody's else is a person's to take away."""
        return cls.LIST if text == cls.LIST else cls.OPERATOR


@dataclass(frozen=True, slots=True)
class Pin:
    """What a name means is never evicted. The same name may be pinned by both owners."""

    repo_id: RepoId
    revision: Revision
    owner: PinOwner = PinOwner.OPERATOR

    def __str__(self) -> str:
        name = f"{self.repo_id}@{self.revision}"
        return name if self.owner is PinOwner.OPERATOR else f"{name} of the model list"


class _Hold:
    """What requests under way hold that hold the same. Derived when it is asked for: of a hit's it hardly ever is."""

    def __init__(self, names: frozenset[Name]) -> None:
        self.requests = 0
        self._names = names

    @cached_property
    def digests(self) -> frozenset[Digest]:
        return frozenset(name.digest for name in self._names)

    @cached_property
    def repos(self) -> frozenset[RepoId]:
        return frozenset(name.repo_id for name in self._names)


class UseLedger:
    """Not thread-safe: the event loop's alone."""

    def __init__(self, database: Database, contents: Contents, clock: Clock, reconnect_grace_seconds: float) -> None:
        self._database = database
        self._clock = clock
        self._grace = reconnect_grace_seconds
        self.usage = {
            SnapshotId(RepoId(repo), Commit(commit)): Usage(tick, at) for repo, commit, tick, at in contents.usage
        }
        self.freed: Callable[[], None] = lambda: None
        """Called in the step in which something may go that could not before."""
        self._tick = max((usage.tick for usage in self.usage.values()), default=0)
        self._holding: dict[frozenset[Name], _Hold] = {}  # many requests hold the same hundreds of names
        self._held_snapshots: dict[SnapshotId, int] = {}
        # By repository: to choose victims each snapshot is asked about, and a node has thousands of leases and pins.
        self._pins_in: dict[RepoId, dict[Pin, None]] = {}
        for repo, revision, owner in contents.pins:
            pin = Pin(RepoId(repo), Revision(revision), PinOwner.of(owner))
            self._pins_in.setdefault(pin.repo_id, {})[pin] = None
        self.leases: dict[str, Lease] = {}
        self._leases_in: dict[RepoId, dict[str, None]] = {}  # ids, oldest first
        self._recovered: dict[str, None] = {}  # ids, oldest first; few of them
        self._recovered_in: dict[RepoId, dict[str, None]] = {}
        self._of_pods: dict[str, dict[str, None]] = {}  # pod's uid -> ids of its leases
        self._streams: Counter[str] = Counter()  # lease id -> connected HoldModel streams
        self._gone_since: dict[str, float] = {}  # stream lease id -> when its last stream went
        self.unreadable: list[str] = []
        """Ids of leases that nobody can read: each may have been on any snapshot, until ``recover``."""
        for lease_id, body in contents.leases:
            try:
                lease = Lease.from_json(body)
            except (ValueError, KeyError, TypeError):
                self.unreadable.append(lease_id)
                continue
            if lease.id != lease_id:  # its end would leave the row, and the next start bring it back
                self.unreadable.append(lease_id)
                continue
            if lease.boot_id != clock.boot_id:  # another boot starts a lease's time anew
                lease = lease.renewed(clock.boottime(), clock.boot_id)
                database.write_later(_put(lease))
            self._enter(lease)
            if lease.kind is LeaseKind.STREAM:
                self._gone_since[lease.id] = clock.boottime()
        self._named: dict[RepoId, dict[Revision, dict[Commit, int]]] = {}
        for repo, revision, commit, tick in contents.named:
            self._named_by(RepoId(repo), Revision(revision))[Commit(commit)] = tick
            self._tick = max(self._tick, tick)

    # Order of use

    def touch(self, snapshot: SnapshotId) -> Statement:
        """Used now. The statement is for the caller to commit; losing it costs order only."""
        self._tick += 1
        usage = Usage(self._tick, self._clock.wall())
        self.usage[snapshot] = usage
        row = (snapshot.repo_id, snapshot.commit, usage.tick, usage.used_at)
        return ("INSERT OR REPLACE INTO usage VALUES (?, ?, ?, ?)", row)

    def forget(self, snapshot: SnapshotId) -> None:
        """Evicted."""
        self.usage.pop(snapshot, None)
        key = (snapshot.repo_id, snapshot.commit)
        self._database.write_later(
            ("DELETE FROM usage WHERE repo_id = ? AND commit_id = ?", key),
            ("DELETE FROM named WHERE repo_id = ? AND commit_id = ?", key),
        )
        for commits in self._named.get(snapshot.repo_id, {}).values():  # a duplicated repository has the same commits
            commits.pop(snapshot.commit, None)

    def order(self, snapshots: Iterable[SnapshotId]) -> list[SnapshotId]:
        """Least recently used first; what was never asked for goes before all."""
        return sorted(
            snapshots, key=lambda snapshot: (usage.tick if (usage := self.usage.get(snapshot)) else 0, snapshot)
        )

    def used_within(self, seconds: float) -> Callable[[SnapshotId], bool]:
        """Whether a snapshot was asked for within that time. By the wall clock; a use in its future is none of late."""
        now = self._clock.wall()

        def is_young(snapshot: SnapshotId) -> bool:
            usage = self.usage.get(snapshot)
            return usage is not None and 0 <= now - usage.used_at < seconds

        return is_young

    def eviction_order(self, snapshots: Iterable[SnapshotId], refs: Refs) -> list[SnapshotId]:
        """What a branch has left behind, then the rest; each part least recently used first."""
        left_behind: list[SnapshotId] = []
        rest: list[SnapshotId] = []
        for snapshot in self.order(snapshots):
            (left_behind if self.superseded(snapshot, refs) else rest).append(snapshot)
        return left_behind + rest

    # Refs

    def named(self, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
        """The ref points to this commit from now on."""
        self._tick += 1
        self._named_by(repo_id, revision)[commit] = self._tick
        self._database.write_later(
            ("INSERT OR REPLACE INTO named VALUES (?, ?, ?, ?)", (repo_id, revision, commit, self._tick))
        )

    def formerly(self, repo_id: RepoId, revision: Revision) -> list[Commit]:
        """Commits that the ref has named, newest first."""
        commits = self._named.get(repo_id, {}).get(revision, {})
        return sorted(commits, key=lambda commit: -commits[commit])

    def _named_by(self, repo_id: RepoId, revision: Revision) -> dict[Commit, int]:
        return self._named.setdefault(repo_id, {}).setdefault(revision, {})

    def superseded(self, snapshot: SnapshotId, refs: Refs) -> bool:
        """A branch that named it names another commit by now, none names it, and nobody asked for it since."""
        repo_id, commit = snapshot
        own, named = refs.get(repo_id), self._named.get(repo_id)
        if not own or not named or commit in own.values():
            return False
        usage = self.usage.get(snapshot)
        used = usage.tick if usage else 0
        for revision, commits in named.items():
            if commit in commits and (now := own.get(revision)) is not None and commits.get(now, 0) > used:
                return True
        return False

    # Holds

    @contextmanager
    def hold(self, snapshots: Iterable[SnapshotId], names: frozenset[Name]) -> Iterator[None]:
        """For the time of a request: what it is about to use is never a victim.

        Blobs are held by name: another snapshot with the same tokenizer may go, and this name of it stays.
        """
        snapshots = list(snapshots)
        for snapshot in snapshots:
            self._held_snapshots[snapshot] = self._held_snapshots.get(snapshot, 0) + 1
        held = self._holding.get(names)
        if held is None:
            held = self._holding[names] = _Hold(names)
        held.requests += 1
        try:
            yield
        finally:
            for snapshot in snapshots:
                self._held_snapshots[snapshot] -= 1
                if self._held_snapshots[snapshot] == 0:
                    del self._held_snapshots[snapshot]
            held.requests -= 1
            if held.requests == 0:
                del self._holding[names]

    def holds(self, name: Name) -> bool:
        """A request is about to link to that name of a blob."""
        return any(name in names for names in self._holding)

    def is_held(self, snapshot: SnapshotId) -> bool:
        """A request is about to use the snapshot."""
        return snapshot in self._held_snapshots

    def holds_in(self, repo_id: RepoId) -> bool:
        """A request is about to put something into the repository."""
        return any(repo_id in held.repos for held in self._holding.values())

    def held(self, digest: Digest) -> bool:
        """A request is about to use the blob, in whichever repository: what there is of it unfinished stays."""
        return any(digest in held.digests for held in self._holding.values())

    def holding(self) -> bool:
        """Some request is under way."""
        return bool(self._holding)

    # Leases

    def lease(
        self,
        kind: LeaseKind,
        holder: str,
        models: tuple[LeasedModel, ...],
        *,
        ttl_seconds: float | None,
        pod_uid: str = "",
    ) -> tuple[Lease, list[Statement]]:
        """Grants a lease, in force at once; its statements are for the caller to commit before the answer leaves.

        The same pod asking again for the same models gets the lease that it has. A new proof of use
        replaces recovered leases on the same snapshots.
        """
        statements: list[Statement] = []
        snapshots = {model.snapshot for model in models}
        if self._recovered:
            recovered = {each for model in models for each in self._recovered_in.get(model.snapshot.repo_id, ())}
            for old in [self.leases[lease_id] for lease_id in sorted(recovered)]:
                if snapshots.issuperset(model.snapshot for model in old.models):
                    statements += self.drop(old.id)
        own = (self.leases[lease_id] for lease_id in self._of_pods.get(pod_uid, ()))
        same = next((old for old in own if old.models == models), None)
        now = self._clock.boottime()
        if same is not None:
            lease = replace(same, ttl_seconds=ttl_seconds).renewed(now, self._clock.boot_id)
        else:
            lease = Lease(
                os.urandom(16).hex(),
                kind,
                holder,
                models,
                self._clock.wall(),
                ttl_seconds,
                self._clock.boot_id,
                now,
                pod_uid,
            )
        self._enter(lease)
        if kind is LeaseKind.STREAM:
            self._gone_since[lease.id] = now
        return lease, [*statements, _put(lease)]

    def _enter(self, lease: Lease) -> None:
        self.leases[lease.id] = lease
        for repo_id in {model.snapshot.repo_id for model in lease.models}:
            self._leases_in.setdefault(repo_id, {})[lease.id] = None
            if lease.kind is LeaseKind.RECOVERED:
                self._recovered_in.setdefault(repo_id, {})[lease.id] = None
        if lease.kind is LeaseKind.RECOVERED:
            self._recovered[lease.id] = None
        if lease.pod_uid:
            self._of_pods.setdefault(lease.pod_uid, {})[lease.id] = None

    def of_pod(self, pod_uid: str) -> frozenset[str]:
        """Ids of the pod's leases."""
        return frozenset(self._of_pods.get(pod_uid, ()))

    def renew(self, lease_id: str) -> tuple[Lease, Statement] | None:
        """Begins its time anew; the statement is for the caller to commit. None where there is no such lease."""
        lease = self.leases.get(lease_id)
        if lease is None:
            return None
        renewed = lease.renewed(self._clock.boottime(), self._clock.boot_id)
        self.leases[lease_id] = renewed
        return renewed, _put(renewed)

    def drop(self, lease_id: str) -> list[Statement]:
        """Ends a lease at once; its statements are for the caller to commit."""
        self._gone_since.pop(lease_id, None)
        lease = self.leases.pop(lease_id, None)
        if lease is None:
            return []
        self.freed()
        self._recovered.pop(lease_id, None)
        for repo_id in {model.snapshot.repo_id for model in lease.models}:
            _leave(self._leases_in, repo_id, lease_id)
            _leave(self._recovered_in, repo_id, lease_id)
        if lease.pod_uid:
            _leave(self._of_pods, lease.pod_uid, lease_id)
        return [("DELETE FROM leases WHERE id = ?", (lease_id,))]

    def recover(self, snapshots: Iterable[SnapshotId], why: str) -> list[Statement]:
        """Proofs of use were lost: every snapshot may be in use, so each gets a lease that only a person ends.

        Leases that cannot be read are replaced by these, in the same transaction; otherwise
        what a person has ended would come back with each start.
        """
        statements: list[Statement] = [("DELETE FROM leases WHERE id = ?", (lease_id,)) for lease_id in self.unreadable]
        self.unreadable = []
        for snapshot in snapshots:
            lease, put = self.lease(
                LeaseKind.RECOVERED, f"{_UNKNOWN_HOLDER}{why}", (LeasedModel(snapshot),), ttl_seconds=None
            )
            del lease
            statements += put
        return statements

    def recovered(self) -> tuple[int, list[str]]:
        """How many leases stand for proofs of use that were lost, and why they were."""
        holders = [self.leases[lease_id].holder for lease_id in self._recovered]
        return len(holders), sorted({holder.removeprefix(_UNKNOWN_HOLDER) for holder in holders})

    @contextmanager
    def stream(self, lease_id: str) -> Iterator[None]:
        """A HoldModel stream is connected."""
        self._streams[lease_id] += 1
        self._gone_since.pop(lease_id, None)
        try:
            yield
        finally:
            self._streams[lease_id] -= 1
            if self._streams[lease_id] == 0:
                del self._streams[lease_id]
                if lease_id in self.leases:
                    self._gone_since[lease_id] = self._clock.boottime()

    def expired(self) -> list[Lease]:
        """Leases whose time is up (pods that are gone are the witness's to say)."""
        now, ended = self._clock.boottime(), []
        for lease in self.leases.values():
            left = self._left(lease, now)
            if left is not None and left <= 0:
                ended.append(lease)
        return ended

    def seconds_left(self, lease: Lease) -> float | None:
        """Until it ends by itself, as far as time alone ends it: a stream's too, when the stream has gone."""
        left = self._left(lease, self._clock.boottime())
        return None if left is None else max(0.0, left)

    def _left(self, lease: Lease, now: float) -> float | None:
        left, gone = lease.expires_in(now, self._clock.boot_id), self._gone_since.get(lease.id)
        if lease.kind is not LeaseKind.STREAM or gone is None:
            return left
        grace = gone + self._grace - now
        return grace if left is None else min(left, grace)

    def set_grace(self, seconds: float) -> None:
        """A reload changed ``leases.reconnect_grace``."""
        self._grace = seconds

    def leases_on(self, snapshot: SnapshotId, refs: Refs) -> list[Lease]:
        """The leases that cover the snapshot."""
        return list(self._covering(snapshot, refs))

    def leased(self, snapshot: SnapshotId, refs: Refs) -> bool:
        """Whether any lease covers it."""
        return next(self._covering(snapshot, refs), None) is not None

    def _covering(self, snapshot: SnapshotId, refs: Refs) -> Iterator[Lease]:
        own = refs.get(snapshot.repo_id, {})
        for lease_id in self._leases_in.get(snapshot.repo_id, ()):
            if self.leases[lease_id].covers(snapshot, own):
                yield self.leases[lease_id]

    def used_repos(self) -> set[RepoId]:
        """Repositories that have a lease or a pin, whether it covers any snapshot or not."""
        return self._leases_in.keys() | self._pins_in.keys()

    # Pins

    def pin(self, pin: Pin) -> Statement:
        """Never evict what this names; by branch it follows the branch."""
        self._pins_in.setdefault(pin.repo_id, {})[pin] = None
        row = (pin.repo_id, pin.revision, pin.owner.value, self._clock.wall())
        return ("INSERT OR REPLACE INTO pins VALUES (?, ?, ?, ?)", row)

    def unpin(self, pin: Pin) -> Statement | None:
        """None where there is no such pin."""
        if pin not in self._pins_in.get(pin.repo_id, {}):
            return None
        _leave(self._pins_in, pin.repo_id, pin)
        self.freed()
        row = (pin.repo_id, pin.revision, pin.owner.value)
        return ("DELETE FROM pins WHERE repo_id = ? AND revision = ? AND owner = ?", row)

    def pins_on(self, snapshot: SnapshotId, refs: Refs) -> list[Pin]:
        """The pins that cover the snapshot."""
        own = refs.get(snapshot.repo_id, {})
        found = (
            pin
            for pin in self._pins_in.get(snapshot.repo_id, ())
            if (own.get(pin.revision) or as_commit(pin.revision)) == snapshot.commit
        )
        return sorted(found, key=str)

    @property
    def pins(self) -> set[Pin]:
        """All of them."""
        return {pin for pins in self._pins_in.values() for pin in pins}

    # The question

    def protected(self, snapshot: SnapshotId, refs: Refs) -> bool:
        """Whether anything keeps the snapshot from going; ``protections`` says what."""
        return snapshot in self._held_snapshots or bool(self.pins_on(snapshot, refs)) or self.leased(snapshot, refs)

    def protections(self, snapshot: SnapshotId, refs: Refs) -> list[Protection]:
        """Everything that keeps the snapshot from going; empty means it may."""
        found = [Protection("pinned", str(pin)) for pin in self.pins_on(snapshot, refs)]
        found += [Protection("leased", str(lease)) for lease in self.leases_on(snapshot, refs)]
        if snapshot in self._held_snapshots:
            found.append(Protection("held", "a request under way"))
        return found


def _leave(kept: dict[K, dict[T, None]], key: K, member: T) -> None:
    """Takes the member from the key's, and the key with its last."""
    members = kept.get(key)
    if members is not None:
        members.pop(member, None)
        if not members:
            del kept[key]


def _put(lease: Lease) -> Statement:
    return ("INSERT OR REPLACE INTO leases VALUES (?, ?)", (lease.id, lease.to_json()))

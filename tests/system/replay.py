"""What tests/node/recording.py wrote, read again by a plain model: was each that went the one whose turn it was?"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelcached.ledger.leases import LeaseKind
from modelcached.model import Commit, RepoId, Revision, SnapshotId

from tests.property.plain import Kept, Plain, PlainLease, Shelf, plain_lru
from tests.property.truth import Name


@dataclass
class Replay:
    """The order of use and who keeps what are its own; snapshots, refs and sizes are those that were believed."""

    plain: Plain = field(default_factory=Plain)
    holds: dict[int, tuple[list[SnapshotId], list[Name]]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    chosen: list[SnapshotId] = field(default_factory=list)
    """The last choice, which may be condemned in the same step."""

    def read(self, file: Path) -> None:
        """All of it. AssertionError where another should have gone, or one went that somebody kept."""
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                getattr(self, f"_{said.pop('event').replace(' ', '_')}")(**said)

    def _used(self, snapshot: list[str]) -> None:
        self.plain.touch(_snapshot(snapshot))

    def _forgotten(self, snapshot: list[str]) -> None:
        gone = _snapshot(snapshot)
        self.plain.used.pop(gone, None)
        for (repo_id, _), history in self.plain.named.items():
            if repo_id == gone.repo_id:
                history.pop(gone.commit, None)

    def _named(self, repo: str, revision: str, commit: str) -> None:
        self.plain.point(RepoId(repo), Revision(revision), Commit(commit))

    def _lease(self, id: str, models: list[list[str]]) -> None:  # noqa: A002 - as it is written
        leased = tuple((SnapshotId(RepoId(repo), Commit(commit)), revision) for repo, commit, revision in models)
        self.plain.leases[id] = PlainLease(LeaseKind.TTL, leased, None, 0.0)

    def _ended(self, id: str) -> None:  # noqa: A002
        self.plain.leases.pop(id, None)

    def _pinned(self, repo: str, revision: str, owner: str) -> None:
        assert owner == "operator"
        self.plain.pins.add((RepoId(repo), Revision(revision)))

    def _unpinned(self, repo: str, revision: str, owner: str) -> None:
        del owner
        self.plain.pins.discard((RepoId(repo), Revision(revision)))

    def _held(self, number: int, snapshots: list[list[str]], names: list[list[str]]) -> None:
        self.holds[number] = [_snapshot(s) for s in snapshots], [(RepoId(repo), digest) for repo, digest in names]

    def _let_go(self, number: int) -> None:
        del self.holds[number]

    def _planned(self, wanted: int, victims: list[list[str]], freed: int, **believed: Any) -> None:
        plain, shelf = self.plain, _shelf(believed["blobs"])
        plain.known = {
            SnapshotId(RepoId(repo), Commit(commit)): Kept(links) for repo, commit, links in believed["snapshots"]
        }
        plain.refs = {(RepoId(repo), Revision(revision)): Commit(commit) for repo, revision, commit in believed["refs"]}
        snapshots, names = self._all_held()
        self.chosen = [_snapshot(victim) for victim in victims]
        order, given = plain_lru(plain, shelf, [], wanted, snapshots, names)
        assert self.chosen == order, f"{self.chosen} were chosen, a plain LRU picks {order}"
        assert freed == given, f"{self.chosen} were said to free {freed} bytes, and free {given}"
        self.counts["choices"] += 1
        self.counts["too little could go"] += freed < wanted
        self.counts["victims that a branch had left"] += sum(map(plain.left_behind, self.chosen))

    def _condemned(self, snapshots: list[list[str]], reason: str) -> None:
        going = [_snapshot(snapshot) for snapshot in snapshots]
        if reason != "operator":
            assert going == self.chosen
            assert going or reason == "full"
        held, _ = self._all_held()
        for snapshot in going:
            assert snapshot not in held, f"{snapshot} went, and a request was about to use it"
            assert not self.plain.keepers(snapshot), f"{snapshot} went, kept by {self.plain.keepers(snapshot)}"
            self.counts[f"gone ({reason})"] += 1

    def _all_held(self) -> tuple[frozenset[SnapshotId], frozenset[Name]]:
        snapshots = frozenset(snapshot for held, _ in self.holds.values() for snapshot in held)
        return snapshots, frozenset(name for _, names in self.holds.values() for name in names)


def _snapshot(pair: list[str]) -> SnapshotId:
    repo_id, commit = pair
    return SnapshotId(RepoId(repo_id), Commit(commit))


def _shelf(blobs: list[Any]) -> Shelf:
    return Shelf(
        {(RepoId(repo), digest): inode for repo, digest, inode, _, _ in blobs},
        {inode: (size, names) for _, _, inode, size, names in blobs},
    )

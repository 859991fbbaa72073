"""Who shares blobs within a repository."""

from __future__ import annotations

from collections import Counter

from modelcached.model import Algorithm, Commit, Digest, RepoId, SnapshotId
from modelcached.store.index import Repo, Snapshot, SnapshotState

OWN, COMMON, EVERYWHERE = (Digest(Algorithm.SHA256, letter * 64) for letter in "abc")


def repo(*contents: tuple[Digest, ...]) -> Repo:
    made = Repo()
    for number, digests in enumerate(contents, 1):
        commit = Commit(str(number) * 40)
        links = {f"{place}.bin": digest for place, digest in enumerate(digests)}
        made.snapshots[commit] = Snapshot(SnapshotId(RepoId("org/name"), commit), links, None, SnapshotState.READY)
    return made


def test_a_snapshot_alone_shares_nothing() -> None:
    assert repo().shared() == Counter()
    assert repo((OWN, COMMON, COMMON)).shared() == Counter()


def test_what_others_need_is_counted_once_for_each_besides_one() -> None:
    assert repo((OWN, COMMON), (COMMON,)).shared() == Counter({COMMON: 1})
    three = repo((OWN, COMMON, EVERYWHERE), (COMMON, EVERYWHERE), (EVERYWHERE,))
    assert three.shared() == Counter({COMMON: 1, EVERYWHERE: 2})


def test_a_snapshot_that_is_going_needs_nothing_any_more() -> None:
    two = repo((OWN, COMMON), (COMMON,))
    two.snapshots[Commit("1" * 40)].state = SnapshotState.CONDEMNED
    assert two.shared() == Counter()

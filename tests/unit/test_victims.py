"""Which snapshots go, and what du loses by each, blobs with several names included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from modelcached.ledger.space import NOTHING, Amount
from modelcached.ledger.victims import Books, Candidate, Shares, Victim, choose
from modelcached.model import Algorithm, Commit, Digest, RepoId, SnapshotId

BIG, SMALL = Digest(Algorithm.SHA256, "b" * 64), Digest(Algorithm.SHA256, "5" * 64)
OWN, OWN_INODES = 10, 4


@dataclass(frozen=True)
class Inode:
    inode: int
    allocated_bytes: int
    link_count: int


def snapshot(repo: str, *digests: Digest, commit: str = "1") -> Candidate:
    return Candidate(SnapshotId(RepoId(repo), Commit(commit * 40)), frozenset(digests), OWN, OWN_INODES)


def books(users: Mapping[tuple[str, Digest], int], inodes: Mapping[tuple[str, Digest], Inode]) -> Shares:
    """By repository and digest; ``users``: how many snapshots need each."""
    return Shares(
        lambda repo_id: Books(
            Counter({digest: count - 1 for (repo, digest), count in users.items() if repo == repo_id}),
            {digest: inode for (repo, digest), inode in inodes.items() if repo == repo_id},
        )
    )


def alone(*candidates: Candidate, size: int = 1000) -> Shares:
    """Each name an inode of its own."""
    users = Counter((candidate.id.repo_id, digest) for candidate in candidates for digest in candidate.digests)
    return books(users, {name: Inode(number, size, 1) for number, name in enumerate(users)})


def freed(victims: list[Victim]) -> list[tuple[str, int]]:
    return [(victim.id.repo_id, victim.freed_bytes) for victim in victims]


def test_the_fewest_from_the_front_go() -> None:
    order = [snapshot(repo, BIG) for repo in "abc"]
    victims, total = choose(order, alone(*order), Amount(1500))
    assert freed(victims) == [("a", 1010), ("b", 1010)]
    assert total == Amount(2020, 10)


def test_they_go_for_inodes_as_for_bytes() -> None:
    order = [snapshot(repo, BIG, SMALL) for repo in "abc"]
    for wanted in (Amount(0, 7), Amount(2500, 7), Amount(2500, -100)):
        victims, total = choose(order, alone(*order), wanted)
        assert [victim.freed_inodes for victim in victims] == [6, 6]
        assert total == Amount(4020, 12)


def test_an_inode_with_another_name_is_not_freed() -> None:
    linked = {("a", BIG): Inode(1, 1000, 2), ("b", BIG): Inode(1, 1000, 2)}
    shares = books(dict.fromkeys(linked, 1), linked)
    assert [shares.remove(snapshot(repo, BIG)).freed_inodes for repo in "ab"] == [4, 5]


def test_nothing_goes_for_nothing() -> None:
    order = [snapshot("a", BIG)]
    assert choose(order, alone(*order), NOTHING) == ([], NOTHING)
    assert choose(order, alone(*order), Amount(-5, -3)) == ([], NOTHING)


def test_all_are_named_when_all_are_not_enough() -> None:
    order = [snapshot(repo, BIG) for repo in "ab"]
    victims, total = choose(order, alone(*order), Amount(10**9))
    assert [victim.id.repo_id for victim in victims] == ["a", "b"]
    assert total == Amount(2020, 10)


def test_a_blob_that_another_snapshot_of_its_repository_needs_stays() -> None:
    older, newer = snapshot("a", BIG, SMALL, commit="1"), snapshot("a", BIG, commit="2")
    shares = alone(older, newer)
    assert shares.sizes(older) == (2000, OWN + 1000), "only what it has to itself"
    assert shares.remove(older).freed_bytes == OWN + 1000
    assert shares.remove(newer).freed_bytes == OWN + 1000, "the last user takes the blob along"


def linked(link_count: int) -> Shares:
    inode = Inode(7, 1000, link_count)
    return books({("a", BIG): 1, ("b", BIG): 1}, {("a", BIG): inode, ("b", BIG): inode})


def test_a_linked_blob_is_freed_by_the_last_of_its_names() -> None:
    shares = linked(2)
    assert shares.sizes(snapshot("a", BIG))[1] == OWN
    assert shares.remove(snapshot("a", BIG)).freed_bytes == OWN
    assert shares.remove(snapshot("b", BIG)).freed_bytes == OWN + 1000


def test_a_name_outside_the_cache_keeps_the_bytes() -> None:
    shares = linked(3)
    assert [shares.remove(snapshot(repo, BIG)).freed_bytes for repo in "ab"] == [OWN, OWN]


def test_two_names_in_one_snapshot_are_freed_together() -> None:
    inode = Inode(7, 1000, 2)
    both = books({("a", BIG): 1, ("a", SMALL): 1}, {("a", BIG): inode, ("a", SMALL): inode})
    assert both.sizes(snapshot("a", BIG, SMALL)) == (1000, OWN + 1000), "du sees the inode once"
    assert both.remove(snapshot("a", BIG, SMALL)).freed_bytes == OWN + 1000


def test_looking_at_what_one_would_free_takes_nothing_away() -> None:
    shares = linked(1)
    first = shares.sizes(snapshot("a", BIG))[1]
    assert shares.sizes(snapshot("a", BIG))[1] == first == OWN + 1000


def test_a_name_without_a_blob_frees_nothing() -> None:
    shares = books({("a", BIG): 1}, {})
    assert shares.remove(snapshot("a", BIG)).freed_bytes == OWN

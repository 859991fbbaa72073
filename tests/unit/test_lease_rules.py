"""When a lease ends, what it covers, and when a pod is proven gone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from modelcached.ledger.leases import Lease, LeasedModel, LeaseKind, PodsSeen, PodWitness
from modelcached.model import Commit, RepoId, Revision, SnapshotId

REPO, OTHER = RepoId("org/name"), RepoId("org/other")
A, B = Commit("a" * 40), Commit("b" * 40)
MAIN = Revision("main")


def lease(*models: LeasedModel, kind: LeaseKind = LeaseKind.TTL, ttl: float | None = 100.0) -> Lease:
    return Lease("id", kind, "host", models, 5.0, ttl, "boot-1", 1000.0)


def seen(*uids: str, healthy: bool = True) -> PodsSeen:
    return PodsSeen(frozenset(uids), healthy)


def test_a_ttl_runs_from_the_last_renewal() -> None:
    granted = lease()
    assert granted.expires_in(1030.0, "boot-1") == 70
    assert granted.renewed(1030.0, "boot-1").expires_in(1030.0, "boot-1") == 100
    assert granted.expires_in(1100.5, "boot-1") == -0.5


def test_another_boot_begins_the_time_anew_never_ends_it() -> None:
    assert lease().expires_in(5.0, "boot-2") == 100
    assert lease().expires_in(10**9, "boot-2") == 100


def test_a_lease_without_a_ttl_does_not_end_by_time() -> None:
    assert lease(ttl=None).expires_in(10**9, "boot-1") is None


def test_a_lease_by_commit_covers_that_commit_alone() -> None:
    granted = lease(LeasedModel(SnapshotId(REPO, A)))
    assert granted.covers(SnapshotId(REPO, A), {MAIN: B})
    assert not granted.covers(SnapshotId(REPO, B), {MAIN: B})
    assert not granted.covers(SnapshotId(OTHER, A), {})


def test_a_lease_by_branch_covers_its_commit_and_what_the_branch_points_to_now() -> None:
    granted = lease(LeasedModel(SnapshotId(REPO, A), "main"))
    assert granted.covers(SnapshotId(REPO, A), {MAIN: B})
    assert granted.covers(SnapshotId(REPO, B), {MAIN: B})
    assert not granted.covers(SnapshotId(REPO, B), {Revision("dev"): B})
    assert not granted.covers(SnapshotId(OTHER, B), {MAIN: B}), "another repository's main is another branch"


def test_a_lease_covers_its_base_and_every_adapter() -> None:
    granted = lease(LeasedModel(SnapshotId(REPO, A)), LeasedModel(SnapshotId(OTHER, B)))
    assert granted.covers(SnapshotId(REPO, A), {})
    assert granted.covers(SnapshotId(OTHER, B), {})


@pytest.mark.parametrize("kind", list(LeaseKind))
def test_a_lease_comes_back_from_json_as_it_was(kind: LeaseKind) -> None:
    granted = replace(lease(LeasedModel(SnapshotId(REPO, A), "main"), kind=kind), pod_uid="uid", ttl_seconds=None)
    assert Lease.from_json(granted.to_json()) == granted


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"kind": "forever"}', "\x00"])
def test_what_is_no_lease_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Lease.from_json(text)


@pytest.mark.parametrize(
    "damage",
    [
        {"models": []},
        {"models": [["org/name", "a" * 40]]},
        {"models": [["org/name", 5, ""]]},
        {"models": None},
        {"ttl_seconds": "100"},
        {"renewed_boottime": None},
        {"boot_id": 1},
        {"strange": 1},
    ],
)
def test_a_lease_that_is_only_half_one_is_refused(damage: dict[str, object]) -> None:
    whole = json.loads(lease(LeasedModel(SnapshotId(REPO, A))).to_json())
    assert Lease.from_json(json.dumps(whole))
    with pytest.raises((ValueError, KeyError, TypeError)):
        Lease.from_json(json.dumps({**whole, **damage}))


def test_a_pod_is_gone_after_two_looks_in_a_row() -> None:
    witness = PodWitness()
    assert witness.look(seen("other"), {"pod"}) == set()
    assert witness.look(seen("other"), {"pod"}) == {"pod"}


def test_a_pod_seen_in_between_begins_the_count_anew() -> None:
    witness = PodWitness()
    looks = [seen("other"), seen("pod"), seen("other")]
    assert [witness.look(look, {"pod"}) for look in looks] == [set(), set(), set()]
    assert witness.look(seen("other"), {"pod"}) == {"pod"}


def test_an_unhealthy_look_counts_for_nothing() -> None:
    witness = PodWitness()
    for look in [seen(healthy=False)] * 5:
        assert witness.look(look, {"pod"}) == set()
    assert witness.look(seen("other"), {"pod"}) == set(), "the first look that means anything"


def test_each_pod_is_counted_by_itself() -> None:
    witness = PodWitness()
    witness.look(seen("b"), {"a", "b"})
    assert witness.look(seen("x"), {"a", "b"}) == {"a"}
    assert witness.look(seen("x"), {"b"}) == {"b"}


def test_a_holder_is_named_with_its_pod_once() -> None:
    granted = replace(lease(kind=LeaseKind.POD), pod_uid="u-1")
    assert str(granted) == "host (pod lease id, pod u-1)"
    assert str(replace(granted, holder="pod u-1")) == "pod u-1 (pod lease id)"
    assert str(replace(granted, holder="", pod_uid="")) == "unnamed (pod lease id)"

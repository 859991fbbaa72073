"""Who uses what, over a real database: order, holds, leases, pins, and what survives a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from modelcached.ledger.clock import Clock
from modelcached.ledger.database import Database, Statement, connect, contents
from modelcached.ledger.leases import Lease, LeasedModel, LeaseKind
from modelcached.ledger.use import Pin, PinOwner, UseLedger
from modelcached.ledger.victims import Name
from modelcached.model import Algorithm, Commit, Digest, RepoId, Revision, SnapshotId

REPO, OTHER = RepoId("org/name"), RepoId("org/other")
A, B, C = (Commit(letter * 40) for letter in "abc")
MAIN = Revision("main")
BLOB = Digest(Algorithm.SHA256, "d" * 64)


def of(commit: Commit, repo: RepoId = REPO) -> SnapshotId:
    return SnapshotId(repo, commit)


@dataclass(frozen=True)
class StoppedClock(Clock):
    """Goes on when it is told to."""

    now: list[float]

    def boottime(self) -> float:
        return self.now[0]

    def wall(self) -> float:
        return 1_800_000_000 + self.now[0]


class Daemon:
    """A ledger and its database, which can be stopped and started again."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self.now = [1000.0]
        self.boot = "boot-1"
        self.start()

    def start(self) -> None:
        connection = connect(self._path)
        found = contents(connection)
        self._database = Database(connection)
        self.use = UseLedger(self._database, found, StoppedClock(self.boot, self.now), reconnect_grace_seconds=60)

    def stop(self) -> None:
        self._database.close()

    def restart(self, after: float = 1.0, boot: str | None = None) -> UseLedger:
        self.stop()
        self.now[0] += after
        self.boot = boot or self.boot
        self.start()
        return self.use

    def commit(self, *statements: Statement | None) -> None:
        self._database.write_later(*[statement for statement in statements if statement is not None])

    def touch(self, snapshot: SnapshotId) -> None:
        self.commit(self.use.touch(snapshot))

    def grant(
        self, kind: LeaseKind, *models: LeasedModel, ttl_seconds: float | None = None, pod_uid: str = ""
    ) -> Lease:
        lease, statements = self.use.lease(kind, "host", models, ttl_seconds=ttl_seconds, pod_uid=pod_uid)
        self.commit(*statements)
        return lease

    def ended(self) -> list[str]:
        return [lease.id for lease in self.use.expired()]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "state.db")
    yield made
    made.stop()


def kinds(use: UseLedger, snapshot: SnapshotId, refs: dict[Revision, Commit] | None = None) -> list[str]:
    return [protection.kind for protection in use.protections(snapshot, {snapshot.repo_id: refs or {}})]


# Order


def test_the_order_is_of_use_and_what_was_never_used_is_first(daemon: Daemon) -> None:
    for commit in (A, B, A):
        daemon.touch(of(commit))
    assert daemon.use.order([of(A), of(B), of(C)]) == [of(C), of(B), of(A)]
    assert daemon.restart().order([of(A), of(B), of(C)]) == [of(C), of(B), of(A)]


def test_a_wall_clock_that_jumps_back_changes_no_order(daemon: Daemon) -> None:
    daemon.touch(of(A))
    daemon.now[0] -= 500
    daemon.touch(of(B))
    assert daemon.use.order([of(B), of(A)]) == [of(A), of(B)]


def test_what_was_used_after_a_restart_is_newer_than_all_before(daemon: Daemon) -> None:
    for commit in (A, B):
        daemon.touch(of(commit))
    daemon.restart()
    daemon.touch(of(A))
    assert daemon.use.order([of(A), of(B)]) == [of(B), of(A)]


def test_a_forgotten_snapshot_is_forgotten_in_its_own_repository_only(daemon: Daemon) -> None:
    for repo in (REPO, OTHER):
        daemon.touch(of(A, repo))
        daemon.use.named(repo, MAIN, A)
    daemon.use.forget(of(A))
    for use in (daemon.use, daemon.restart()):
        assert set(use.usage) == {of(A, OTHER)}
        assert use.formerly(REPO, MAIN) == []
        assert use.formerly(OTHER, MAIN) == [A], "a duplicated repository has the same commits"


def test_a_ref_remembers_what_it_named_newest_first(daemon: Daemon) -> None:
    for commit in (A, B, C, A):
        daemon.use.named(REPO, MAIN, commit)
    assert daemon.restart().formerly(REPO, MAIN) == [A, C, B]
    assert daemon.use.formerly(REPO, Revision("dev")) == []


# Holds


def test_a_held_snapshot_may_not_go_until_the_last_request_ends(daemon: Daemon) -> None:
    with daemon.use.hold([of(A)], frozenset()):
        with daemon.use.hold([of(A)], frozenset()):
            assert kinds(daemon.use, of(A)) == ["held"]
        assert kinds(daemon.use, of(A)) == ["held"]
        assert kinds(daemon.use, of(B)) == []
    assert kinds(daemon.use, of(A)) == []


def test_a_blob_is_held_by_its_name_in_a_repository(daemon: Daemon) -> None:
    name = Name(REPO, BLOB)
    with daemon.use.hold([], frozenset({name})):
        assert daemon.use.holds(name)
        assert not daemon.use.holds(Name(OTHER, BLOB)), "another model may go although it shares a tokenizer"
        assert daemon.use.held(BLOB), "what there is of it unfinished stays, whoever asked first"
        assert (daemon.use.holds_in(REPO), daemon.use.holds_in(OTHER)) == (True, False)
    assert [daemon.use.holds(name), daemon.use.held(BLOB), daemon.use.holds_in(REPO)] == [False] * 3


def test_what_several_requests_hold_is_held_until_the_last_of_them_ends(daemon: Daemon) -> None:
    one, two = Name(REPO, BLOB), Name(OTHER, BLOB)
    with daemon.use.hold([], frozenset({one})):
        with daemon.use.hold([], frozenset({one})), daemon.use.hold([], frozenset({one, two})):
            assert (daemon.use.holds(one), daemon.use.holds(two)) == (True, True)
        assert (daemon.use.holds(one), daemon.use.holds(two), daemon.use.held(BLOB)) == (True, False, True)
    assert (daemon.use.holds(one), daemon.use.held(BLOB)) == (False, False)


def test_what_is_held_is_true_at_each_moment_it_is_asked(daemon: Daemon) -> None:
    name = Name(REPO, BLOB)
    for _ in range(2):
        assert [daemon.use.holds(name), daemon.use.held(BLOB), daemon.use.holds_in(REPO)] == [False] * 3
        with daemon.use.hold([], frozenset({name})):
            assert [daemon.use.holds(name), daemon.use.held(BLOB), daemon.use.holds_in(REPO)] == [True] * 3


def test_a_request_that_fails_holds_nothing_any_more(daemon: Daemon) -> None:
    with suppress(RuntimeError), daemon.use.hold([of(A)], frozenset({Name(REPO, BLOB)})):
        raise RuntimeError
    assert kinds(daemon.use, of(A)) == []
    assert not daemon.use.held(BLOB)


# Leases


def test_a_lease_survives_a_restart_and_protects_at_once(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=100)
    assert kinds(daemon.use, of(A)) == ["leased"]
    use = daemon.restart()
    assert use.leases == {lease.id: lease}
    assert kinds(use, of(A)) == ["leased"]


def test_a_ttl_lease_ends_after_its_ttl_over_a_restart(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=100)
    daemon.restart(after=99)
    assert daemon.ended() == []
    daemon.now[0] += 1
    assert daemon.ended() == [lease.id]
    daemon.commit(*daemon.use.drop(lease.id))
    assert daemon.restart().leases == {}


def test_a_renewal_survives_a_restart(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=100)
    daemon.now[0] += 90
    renewed = daemon.use.renew(lease.id)
    assert renewed is not None
    daemon.commit(renewed[1])
    daemon.restart(after=90)
    assert daemon.ended() == []
    assert daemon.use.renew("unknown") is None


def test_another_boot_begins_every_ttl_anew(daemon: Daemon) -> None:
    daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=100)
    daemon.now[0] = 3.0  # CLOCK_BOOTTIME begins at nothing
    daemon.restart(after=0, boot="boot-2")
    daemon.now[0] = 102.0
    assert daemon.ended() == []
    daemon.now[0] = 103.0
    assert len(daemon.ended()) == 1


def test_a_pod_that_asks_again_keeps_its_lease(daemon: Daemon) -> None:
    first = daemon.grant(LeaseKind.POD, LeasedModel(of(A), "main"), pod_uid="u")
    assert daemon.grant(LeaseKind.POD, LeasedModel(of(A), "main"), pod_uid="u").id == first.id
    assert daemon.grant(LeaseKind.POD, LeasedModel(of(B), "main"), pod_uid="u").id != first.id
    assert daemon.grant(LeaseKind.POD, LeasedModel(of(A), "main"), pod_uid="v").id != first.id
    assert len(daemon.use.leases) == 3


def test_callers_without_a_pod_have_a_lease_each(daemon: Daemon) -> None:
    ids = {daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=9).id for _ in range(3)}
    assert len(ids) == 3


def test_a_stream_lease_lives_while_a_stream_is_open_and_the_grace_after_it(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.STREAM, LeasedModel(of(A)))
    with daemon.use.stream(lease.id):
        daemon.now[0] += 10_000
        assert daemon.ended() == []
        with daemon.use.stream(lease.id):
            pass
        daemon.now[0] += 10_000
        assert daemon.ended() == [], "one of two has gone"
    daemon.now[0] += 59
    assert daemon.ended() == []
    daemon.now[0] += 1
    assert daemon.ended() == [lease.id]


def test_a_stream_lease_that_nobody_opens_ends_after_the_grace(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.STREAM, LeasedModel(of(A)))
    daemon.now[0] += 60
    assert daemon.ended() == [lease.id]


def test_the_grace_runs_anew_after_a_restart(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.STREAM, LeasedModel(of(A)))
    daemon.restart(after=10_000)
    daemon.now[0] += 59
    assert daemon.ended() == []
    daemon.now[0] += 1
    assert daemon.ended() == [lease.id]
    daemon.use.set_grace(100)
    assert daemon.ended() == [], "a reload may lengthen it"


def test_a_new_proof_of_use_replaces_a_recovered_lease_on_the_same_snapshot(daemon: Daemon) -> None:
    daemon.commit(*daemon.use.recover([of(A), of(B)], "state.db was lost"))
    assert [lease.kind for lease in daemon.restart().leases.values()] == [LeaseKind.RECOVERED] * 2
    daemon.now[0] += 10**9
    assert daemon.ended() == [], "no time ends it"
    daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=100)
    left = {(lease.kind, lease.models[0].snapshot) for lease in daemon.restart().leases.values()}
    assert left == {(LeaseKind.TTL, of(A)), (LeaseKind.RECOVERED, of(B))}


def test_a_lease_that_cannot_be_read_may_be_on_any_snapshot_until_a_person_says_that_it_is_not(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.TTL, LeasedModel(of(A)), ttl_seconds=100)
    daemon.commit(("INSERT INTO leases VALUES ('x', '{')", ()))
    daemon.commit(("INSERT INTO leases VALUES ('y', ?)", (lease.to_json(),)))  # whose end would leave the row
    use = daemon.restart()
    assert set(use.leases) == {lease.id}, "it costs no other lease"
    assert use.unreadable == ["x", "y"]
    assert daemon.restart().unreadable == ["x", "y"], "a start that was killed knows it again"
    daemon.commit(*daemon.use.recover([of(A), of(B)], "two were lost"))

    use = daemon.restart()
    assert (use.unreadable, use.recovered()) == ([], (2, ["two were lost"]))
    assert kinds(use, of(A)) == ["leased", "leased"]
    assert kinds(use, of(B)) == ["leased"]
    for found in [found for found in use.leases.values() if found.kind is LeaseKind.RECOVERED]:
        daemon.commit(*use.drop(found.id))
    assert set(daemon.restart().leases) == {lease.id}, "what a person has ended does not come back"


# Pins


def test_a_pin_by_branch_follows_it_and_one_by_commit_does_not(daemon: Daemon) -> None:
    daemon.commit(daemon.use.pin(Pin(REPO, MAIN)), daemon.use.pin(Pin(REPO, Revision(C))))
    for use in (daemon.use, daemon.restart()):
        assert kinds(use, of(A), {MAIN: A}) == ["pinned"]
        assert kinds(use, of(A), {MAIN: B}) == []
        assert kinds(use, of(B), {MAIN: B}) == ["pinned"]
        assert kinds(use, of(C), {MAIN: B}) == ["pinned"]
        assert kinds(use, of(C, OTHER), {MAIN: C}) == []


def test_a_pin_taken_away_is_gone(daemon: Daemon) -> None:
    daemon.commit(daemon.use.pin(Pin(REPO, MAIN)))
    assert daemon.use.unpin(Pin(REPO, Revision("dev"))) is None
    daemon.commit(daemon.use.unpin(Pin(REPO, MAIN)))
    assert kinds(daemon.use, of(A), {MAIN: A}) == []
    assert daemon.restart().pins == set()


def test_the_same_name_may_be_pinned_by_an_operator_and_by_the_list_each_takes_away_its_own(daemon: Daemon) -> None:
    listed = Pin(REPO, MAIN, PinOwner.LIST)
    daemon.commit(daemon.use.pin(Pin(REPO, MAIN)), daemon.use.pin(listed))
    use = daemon.restart()
    said = [str(found) for found in use.protections(of(A), {REPO: {MAIN: A}})]
    assert said == ["pinned by org/name@main", "pinned by org/name@main of the model list"]
    daemon.commit(use.unpin(listed))
    assert daemon.restart().pins == {Pin(REPO, MAIN)}
    assert daemon.use.unpin(listed) is None


# Superseded


def test_a_commit_is_superseded_when_its_branch_went_on_and_nobody_asked_for_it_since(daemon: Daemon) -> None:
    use, dev = daemon.use, Revision("dev")
    use.named(REPO, MAIN, A)
    daemon.touch(of(A))
    assert not use.superseded(of(A), {REPO: {MAIN: A}})
    use.named(REPO, MAIN, B)
    for ledger in (use, daemon.restart()):
        assert ledger.superseded(of(A), {REPO: {MAIN: B}})
        assert not ledger.superseded(of(A), {REPO: {MAIN: B, dev: A}}), "another branch names it still"
        assert not ledger.superseded(of(B), {REPO: {MAIN: B}})
        assert not ledger.superseded(of(C), {REPO: {MAIN: B}}), "no branch ever named it"
        assert not ledger.superseded(of(A, OTHER), {OTHER: {MAIN: B}}), "another repository's branch"
        assert not ledger.superseded(of(A), {REPO: {}}), "nothing took its place"
    daemon.touch(of(A))
    assert not daemon.use.superseded(of(A), {REPO: {MAIN: B}}), "somebody asks for it by commit"


def test_what_was_used_of_late_is_known_by_the_wall_clock(daemon: Daemon) -> None:
    began = daemon.now[0]
    daemon.touch(of(A))
    for ledger in (daemon.use, daemon.restart()):
        assert ledger.used_within(60)(of(A))
        assert not ledger.used_within(0)(of(A))
        assert not ledger.used_within(60)(of(B)), "nobody ever asked for it"
    for later, young in ((59, True), (61, False), (-3600, False)):
        daemon.now[0] = began + later
        assert daemon.use.used_within(60)(of(A)) is young


def test_what_a_branch_has_left_behind_goes_before_what_is_unused_for_longer(daemon: Daemon) -> None:
    use, refs = daemon.use, {REPO: {MAIN: B}, OTHER: {MAIN: C}}
    use.named(OTHER, MAIN, C)
    daemon.touch(of(C, OTHER))
    use.named(REPO, MAIN, A)
    daemon.touch(of(A))
    use.named(REPO, MAIN, B)
    daemon.touch(of(B))
    for ledger in (use, daemon.restart()):
        assert ledger.eviction_order([of(B), of(A), of(C, OTHER)], refs) == [of(A), of(C, OTHER), of(B)]
    daemon.touch(of(A))
    assert daemon.use.eviction_order([of(B), of(A), of(C, OTHER)], refs) == [of(C, OTHER), of(B), of(A)]


def test_everything_that_keeps_a_snapshot_is_named(daemon: Daemon) -> None:
    lease = daemon.grant(LeaseKind.TTL, LeasedModel(of(A), "main"), ttl_seconds=100)
    daemon.use.pin(Pin(REPO, MAIN))
    with daemon.use.hold([of(A)], frozenset()):
        found = daemon.use.protections(of(A), {REPO: {MAIN: A}})
    said: Callable[[object], str] = str
    assert list(map(said, found)) == [
        "pinned by org/name@main",
        f"leased by host (ttl lease {lease.id})",
        "held by a request under way",
    ]

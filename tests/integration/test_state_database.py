"""state.db between two steps: a start that was killed, a file that cannot be opened for now."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from modelcached.ledger import database

from tests.hub import Hub
from tests.hub.models import tiny_llama
from tests.node import Node


def test_a_database_without_the_mark_of_a_finished_start_counts_as_lost(hub: Hub, node: Node) -> None:
    """As a kill between the making of state.db and the recovered leases leaves it."""
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    node.terminate()
    for file in node.private.glob("state.db*"):
        file.unlink()
    database.connect(str(node.private / "state.db")).close()
    node.start()
    with node.admin() as admin:
        kinds = [lease.kind for lease in admin.leases()]
    assert kinds == [4], "one lease, recovered"
    assert node.run("cachectl", "evict", "org/tiny", "--yes").returncode == 75


def test_a_lease_that_cannot_be_read_costs_no_model_in_use(hub: Hub, node: Node) -> None:
    for name in ("org/leased", "org/other"):
        hub.create_repo(name).commit(tiny_llama())
    (lost,) = node.ensure("org/leased")
    (kept,) = node.ensure("org/other")
    node.kill()
    with closing(sqlite3.connect(node.private / "state.db", isolation_level=None)) as connection:
        connection.execute("UPDATE leases SET body = substr(body, 5) WHERE id = ?", (lost["lease_id"],))
    node.start()
    found = node.ctl("leases")
    assert [lease["kind"] for lease in found if lease["id"] != kept["lease_id"]] == ["recovered"] * 2
    assert node.run("cachectl", "evict", "org/leased", "--yes").returncode == 75
    (told,) = node.log_lines("proofs of use were lost")
    assert told["unreadable"] == [lost["lease_id"]]
    assert any("leases in state.db cannot be read: 2 recovered" in why for why in node.status().degraded)

    node.ctl("release", "--recovered")
    assert not node.status().degraded
    node.kill()
    node.start()
    assert [lease["id"] for lease in node.ctl("leases")] == [kept["lease_id"]], "an operator has spoken"
    assert node.run("cachectl", "evict", "org/leased", "--yes").returncode == 0


def test_a_database_that_cannot_be_opened_for_now_is_not_thrown_away(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    (ready,) = node.ensure("org/tiny")
    node.terminate()
    holder = sqlite3.connect(node.private / "state.db", isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        node.start(wait=False)
        assert node.process is not None
        assert node.process.wait(30) == 74
    finally:
        holder.close()
    assert "state.db cannot be opened" in node.log_text()
    node.start()
    with node.admin() as admin:
        assert [lease.id for lease in admin.leases()] == [ready["lease_id"]]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY])
def test_what_may_pass_is_no_damage(code: int) -> None:
    error = sqlite3.OperationalError("for now")
    error.sqlite_errorcode = code
    assert not database.is_damage(error)

"""state.db between two steps: a start that was killed, a file that cannot be opened for now."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

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
    node.terminate()
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


def leases(node: Node) -> list[tuple[str, str]]:
    return [(lease["kind"], lease["id"]) for lease in node.ctl("leases")]


@pytest.mark.parametrize("damage", ["gone", "garbage"])
def test_a_write_ahead_log_that_is_lost_costs_no_model_in_use(hub: Hub, node: Node, damage: str) -> None:
    """state.db itself is whole, and older than the lease."""
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    node.kill()
    log = node.private / "state.db-wal"
    if damage == "gone":
        log.unlink()
    else:
        log.write_bytes(b"no log" * 1000)
    node.start()
    assert [kind for kind, _ in leases(node)] == ["recovered"]
    assert any("write-ahead log is gone" in why for why in node.status().degraded)
    assert node.run("cachectl", "evict", "org/tiny", "--yes").returncode == 75
    node.ctl("release", "--recovered")
    node.kill()
    node.start()
    assert (leases(node), list(node.status().degraded)) == ([], [])


def test_neither_a_kill_nor_a_clean_end_nor_a_refused_start_loses_a_lease(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    (ready,) = node.ensure("org/tiny")
    granted = [("ttl", ready["lease_id"])]
    for _ in range(2):
        node.kill()
        node.start()
        assert leases(node) == granted
    assert node.terminate() == 0
    assert not (node.private / "state.db-wal").exists()
    socket = node.cache_socket
    socket.unlink(missing_ok=True)
    (socket.parent / f"{socket.name}.lock").unlink(missing_ok=True)
    socket.mkdir()
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(30) != 0, "a start that fails after it has opened the file"
    socket.rmdir()
    node.start()
    assert (leases(node), list(node.status().degraded)) == (granted, [])


def test_a_database_that_cannot_be_read_is_replaced_by_one_that_keeps_its_leases(hub: Hub, node: Node) -> None:
    """A text that is none (here a pin's) spoils the whole reading."""
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    node.terminate()
    with closing(sqlite3.connect(node.private / "state.db", isolation_level=None)) as connection:
        connection.execute("INSERT INTO pins VALUES ('org/tiny', CAST(x'ff' AS TEXT), 'operator', 0)")
    node.start()
    assert [kind for kind, _ in leases(node)] == ["recovered"]
    assert node.log_lines("state.db is damaged, starting a new one")
    (ready,) = node.ensure("org/tiny")
    node.kill()
    node.start()
    assert leases(node) == [("ttl", ready["lease_id"])]


@pytest.fixture
def on_a_small_disk(make_node: Callable[..., Node]) -> Iterator[Node]:
    node = make_node(cache={"min_free": "0B", "budget": "64MB"})
    node.cache_dir.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(node.cache_dir)], check=True)
    yield node
    node.stop()
    subprocess.run(["umount", "--lazy", str(node.cache_dir)], check=True)


def fill(directory: Path) -> None:
    """Nothing is left for anybody."""
    free = os.statvfs(directory)
    if free.f_bavail:
        with (directory / f"filled-{free.f_bavail}").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    assert os.statvfs(directory).f_bavail == 0


def test_a_full_disk_keeps_no_daemon_from_starting(hub: Hub, on_a_small_disk: Node) -> None:
    node = on_a_small_disk.start()
    hub.create_repo("org/tiny").commit(tiny_llama())
    (ready,) = node.ensure("org/tiny")
    assert node.terminate() == 0
    fill(node.cache_dir)
    node.start()
    assert leases(node) == [("ttl", ready["lease_id"])]
    node.kill()
    node.start()
    assert leases(node) == [("ttl", ready["lease_id"])], "nor does it lose its leases there"
    fill(node.cache_dir)
    assert node.terminate() == 0
    node.start()
    assert leases(node) == [("ttl", ready["lease_id"])], "a clean end needs no room either"


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

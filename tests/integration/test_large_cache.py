"""A daemon over 2,000 snapshots with 100,000 files: it is soon there, small, right about all of them, and evicts.

How soon is shown by `make bench CASE=scale`, and what it costs is counted in tests/unit/test_scale.py. Here are bounds
of the daemon's CPU time, which hardly depends on what else the machine does, at three times of what was measured.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from modelcached.model import SnapshotId

from tests.hub import MIB, Hub, Synthetic
from tests.integration.test_status_page import told
from tests.node import Node
from tests.node.filling import Filling, fill, repo_ids, snapshots
from tests.node.manager import Manager

FILLING = Filling()
PATIENCE_SECONDS = 90
READY_CPU_SECONDS = 6
STATUS_CPU_SECONDS = 0.3
LIST_CPU_SECONDS = 0.6
MOST_BYTES = 200 * MIB


def cpu_seconds(node: Node) -> float:
    """The daemon's and that of processes that it started and has seen end."""
    times = node.ps.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


@contextmanager
def within_cpu_seconds(node: Node, bound: float) -> Iterator[None]:
    before = cpu_seconds(node)
    yield
    assert cpu_seconds(node) - before < bound


def resident_bytes(node: Node) -> int:
    return int(node.ps.memory_info().rss)


def in_order_of_use() -> list[SnapshotId]:
    return [snapshot for repo_id in repo_ids(FILLING) for snapshot in snapshots(repo_id)]


_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 2 << 30


@pytest.fixture
def filled(hub: Hub) -> Iterator[Node]:
    """A node with a cache for its daemon to find; in memory where there is room, for a disk takes a minute for it."""
    roomy = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES
    with tempfile.TemporaryDirectory(prefix="modelcached-scale-", dir=_MEMORY if roomy else None) as root:
        node = Node(Path(root), hub.endpoint)
        fill(node.cache_dir, FILLING)
        try:
            yield node
        finally:
            node.stop()


@pytest.mark.timeout(300)
def test_a_large_cache_is_served_soon_looked_at_fast_and_evicted_in_order(hub: Hub, filled: Node) -> None:
    node = filled
    node.settings["cache"]["budget"] = f"{node.du() + 16 * MIB}B"
    assert FILLING.snapshots >= 2000
    assert FILLING.links >= 100_000
    with Manager() as manager:
        manager.start(node, PATIENCE_SECONDS)
    assert cpu_seconds(node) < READY_CPU_SECONDS

    with node.admin() as admin:
        with within_cpu_seconds(node, STATUS_CPU_SECONDS):
            status = admin.status()
        assert (status.models, status.leases) == (FILLING.snapshots, FILLING.leased)
        assert list(status.degraded) == []
        with within_cpu_seconds(node, LIST_CPU_SECONDS):
            models = list(admin.cache.list_models())
    with within_cpu_seconds(node, LIST_CPU_SECONDS):
        assert len(told(node)["models"]) == FILLING.snapshots
    assert [(m.repo_id, m.commit) for m in models] == sorted((s.repo_id, s.commit) for s in in_order_of_use())
    assert sum(m.pinned for m in models) == FILLING.pinned
    assert sum(bool(m.lease_ids) for m in models) == FILLING.leased
    node.assert_disk_truth()
    assert resident_bytes(node) < MOST_BYTES

    kept = {(m.repo_id, m.commit) for m in models if m.pinned or m.lease_ids}
    left_behind = {snapshots(repo_id)[0] for repo_id in repo_ids(FILLING)}  # main means the other one
    in_order = sorted(in_order_of_use(), key=lambda snapshot: snapshot not in left_behind)
    free = [(s.repo_id, s.commit) for s in in_order if (s.repo_id, s.commit) not in kept]
    hub.create_repo("org/new").commit({"config.json": b"{}", "model.safetensors": Synthetic(32 * MIB, 1)})
    node.ensure("org/new")
    with node.client() as client:
        left = {(m.repo_id, m.commit) for m in client.list_models() if m.repo_id != "org/new"}
    gone = [one for one in free if one not in left]
    assert len(gone) > 20
    assert gone == free[: len(gone)], "what branches have left, the least recently used of it, and no other"
    assert len(left) == FILLING.snapshots - len(gone)
    node.assert_disk_truth()
    assert resident_bytes(node) < MOST_BYTES

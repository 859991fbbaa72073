"""I1, I3, I4, I8 under load: 200 models over a budget of 20, and 32 who come and go. On a filesystem of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from modelcached.cache.core import SET_ASIDE_BYTES

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.daemon import reference
from tests.node.disks import Ext4
from tests.node.outside import taken_bytes, watched
from tests.node.recording import recording
from tests.system.churn import Churn, Models
from tests.system.replay import Replay

CACHED = 20
OWN_BYTES = 8 * MIB
"""For the daemon itself."""
LEFTOVER_SECONDS = 3
LEAST_LOOKS_A_SECOND = 50
LEAST_EVICTED_A_SECOND = 1
GRACE_SECONDS = 40
"""Until the last pod is proven gone, and the last stream's grace is over."""


@pytest.mark.timeout(1200)
def test_nothing_in_use_goes_nothing_is_over_nothing_leaks_and_each_goes_in_its_turn(
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
    hub: Hub,
    private_mounts: None,
    make_node: Callable[..., Node],
    tmp_path: Path,
) -> None:
    del private_mounts
    seconds: float = request.config.getoption("--churn-seconds")
    models = Models(hub)
    models.publish()
    budget = CACHED * models.mean_bytes + OWN_BYTES
    with Ext4(tmp_path / "disk", budget + 64 * MIB) as disk:
        before = taken_bytes(disk.mount)
        node = make_node(
            cache={
                "dir": str(disk.path),
                "budget": f"{budget}B",
                "min_free": "0B",
                "partial_ttl": f"{LEFTOVER_SECONDS}s",
                "high_watermark": "95%",
                "low_watermark": "85%",
            },
            hub={"resolve_ttl": "1s", "timeout": "30s"},
            leases={"reconnect_grace": "5s"},
            transfer={"models": 8, "stall_timeout": "30s", "retry_timeout": "60s"},
            log={"level": "info"},
        )
        node.program = recording(tmp_path / "decisions", LEFTOVER_SECONDS)
        node.start()
        churn = Churn(node, models, request.config.getoption("--churn-seed"))
        try:
            with watched(disk.mount) as seen:
                churn.run(seconds)
                node.wait_until(lambda: not list(node.status().transfers), GRACE_SECONDS, "all transfers end")
            assert seen.most - before <= budget, f"{seen.most - before} bytes were taken, the budget is {budget}"
            assert seen.looks > seconds * LEAST_LOOKS_A_SECOND
            node.wait_until(lambda: not _leases(node), GRACE_SECONDS, "what nobody uses is not leased")
            node.wait_until(lambda: not _unfinished(node), GRACE_SECONDS, "what nobody wants is not kept")
            assert list(node.status().degraded) == []
            assert node.status().reserved_bytes == 0
            node.assert_disk_truth()
            assert taken_bytes(disk.mount) - before == node.du()
            _assert_nothing_leaked(hub, node, budget)
        finally:
            node.stop()
        assert [line for line in node.log_lines() if line.get("level") in ("error", "critical")] == []
    replay = Replay()
    replay.read(tmp_path / "decisions")
    counts = churn.counts + replay.counts
    counts["looks from outside"] = seen.looks
    counts["KiB at the most below the budget"] = (budget - seen.most + before) // 1024
    record_property("count", "\n".join(f"{count:7} {name}" for name, count in sorted(counts.items())))
    assert replay.counts["gone (space)"] > seconds * LEAST_EVICTED_A_SECOND
    assert replay.counts["choices"]
    assert churn.counts["looks in use"] > seconds / 2


def _leases(node: Node) -> list[str]:
    with node.admin() as admin:
        return [lease.id for lease in admin.leases()]


def _unfinished(node: Node) -> list[Path]:
    return [path for name in ("partial", "staging", "trash", "quarantine") for path in (node.private / name).iterdir()]


def _assert_nothing_leaked(hub: Hub, node: Node, budget: int) -> None:
    """Without its models the cache is as at first, and all of the budget can be had."""
    with node.admin() as admin:
        models = {model.repo_id for model in admin.cache.list_models()}
        admin.evict([reference(repo_id) for repo_id in sorted(models)], dry_run=False)
    assert len(models) > CACHED / 2
    left = sorted(path.relative_to(node.hub_dir).as_posix() for path in node.hub_dir.rglob("*"))
    assert left == []
    assert list((node.private / "manifests").iterdir()) == []
    node.assert_disk_truth()
    weights = Synthetic(budget - SET_ASIDE_BYTES - node.du() - MIB // 4, 7)
    hub.create_repo("org/giant").commit({"config.json": b"{}", "model.safetensors": weights})
    node.ensure("org/giant")
    node.assert_disk_truth()

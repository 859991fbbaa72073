"""What a service manager is told: how far a start is, what is done, that the event loop lives. Invariant 6."""

from __future__ import annotations

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.manager import Manager


def _publish(hub: Hub, name: str, size: int = 1 * MIB) -> str:
    hub.create_repo(f"org/{name}").commit({"config.json": b"{}", "model.safetensors": Synthetic(size, len(name))})
    return f"org/{name}"


def test_a_start_tells_how_far_it_is_and_asks_for_time(hub: Hub, node: Node) -> None:
    for name in ("one", "three"):
        node.ensure(_publish(hub, name))
    node.terminate()
    with Manager() as manager:
        node.environment |= manager.environment
        node.start(wait=False)
        heard = manager.hears("READY=1")
        assert heard[:2] == ["STATUS=recovering the cache", "STATUS=recovering the cache: 2 of 2 repositories"]
        assert "EXTEND_TIMEOUT_USEC=300000000" in heard
        heard = manager.hears("STATUS=serving 2 models, ")
        node.terminate()
        assert "STATUS=stopping: what downloads have is kept" in manager.hears("STOPPING=1")


def test_the_status_says_what_is_downloaded_and_nothing_twice(hub: Hub, node: Node) -> None:
    node.terminate()
    with Manager() as manager:
        manager.start(node)
        manager.hears("STATUS=serving 0 models, ")
        hub.rate = 2 * MIB
        caller = node.popen("ensure-model", "--quiet", _publish(hub, "slow", 16 * MIB))
        (said,) = manager.hears("STATUS=serving 0 models, ")
        assert "; downloading org/slow, " in said
        hub.rate = None
        assert caller.wait(30) == 0
        heard = manager.hears("STATUS=serving 1 model, ")
        assert "org/slow" not in heard[-1]
        with pytest.raises(TimeoutError):
            manager.hears("STATUS=", within_seconds=5)


def test_the_event_loop_feeds_the_watchdog(node: Node) -> None:
    node.terminate()
    with Manager() as manager:
        node.environment |= {"WATCHDOG_USEC": "400000"}
        manager.start(node)
        for _ in range(3):
            manager.hears("WATCHDOG=1", within_seconds=2)

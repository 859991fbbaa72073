"""transfer.rate_limit is the node's, whatever the bytes come by, can be changed in mid-transfer, and holds nobody back
who is to end (invariant 6)."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.daemon import in_threads

PIECES = 4 * MIB
"""What may be on its way between a connection and the disk when the clock starts: generous, and a fraction of all."""


def publish(hub: Hub, name: str, size: int, *, xet: bool = False) -> None:
    weights = Synthetic(size, int.from_bytes(name.encode(), "big") % 1_000_003)
    hub.create_repo(f"org/{name}").commit(
        {"config.json": f'"{name}"'.encode(), f"{name}.safetensors": weights}, xet=xet
    )


def set_rate(node: Node, rate: str) -> None:
    node.settings["transfer"]["rate_limit"] = rate
    node.write_config()


def done_bytes(node: Node) -> int:
    return sum(transfer.bytes_done for transfer in node.status().transfers)


def test_it_holds_over_models_and_connections_together(hub: Hub, make_node: Callable[..., Node]) -> None:
    rate, size, names = 8 * MIB, 12 * MIB, ("one", "two", "three")
    node = make_node(transfer={"rate_limit": "8MiB"}).start()
    for name in names:
        publish(hub, name, size)
    began = time.monotonic()
    in_threads(len(names), lambda number: node.ensure(f"org/{names[number]}"))
    seconds = time.monotonic() - began
    assert (len(names) * size - PIECES) / rate <= seconds < 30
    assert max(hub.body_bytes(f"org/{name}", f"{name}.safetensors") for name in names) == size


def test_it_holds_for_xet(hub: Hub, make_node: Callable[..., Node]) -> None:
    rate, size = 8 * MIB, 32 * MIB
    node = make_node(transfer={"rate_limit": "8MiB"}).start()
    publish(hub, "xet", size, xet=True)
    began = time.monotonic()
    node.ensure("org/xet")
    assert (size - PIECES) / rate <= time.monotonic() - began < 30
    assert node.metric("modelcached_fetched_bytes_total", origin="xet") == size
    assert node.log_lines("retrying a range") == [], "who is slow because we are is not stalled"


def test_it_can_be_raised_in_mid_transfer(hub: Hub, make_node: Callable[..., Node]) -> None:
    """By the file alone, as a ConfigMap does it."""
    node = make_node(transfer={"rate_limit": "128KiB"}).start()
    publish(hub, "model", 32 * MIB)  # four minutes
    waiting = node.popen("ensure-model", "org/model")
    node.wait_until(lambda: 0 < done_bytes(node) < 16 * MIB, 20, "it is under way")
    set_rate(node, "0B")
    assert waiting.wait(30) == 0
    waiting.communicate()
    assert node.log_lines("configuration reloaded")[0]["settings"] == ["transfer.rate_limit"]


def test_it_can_be_lowered_in_mid_transfer(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node().start()
    publish(hub, "model", 256 * MIB)
    hub.rate = 16 * MIB
    node.popen("ensure-model", "org/model")
    node.wait_until(lambda: done_bytes(node) > 8 * MIB, 20, "it is under way")
    set_rate(node, "64KiB")
    node.ps.send_signal(signal.SIGHUP)
    node.wait_until(lambda: node.log_lines("configuration reloaded"), 20, "the rate is in force")
    before = done_bytes(node)
    time.sleep(2)  # in which 32 MiB would have come
    assert done_bytes(node) - before < 8 * MIB


def open_partials(node: Node) -> list[str]:
    """Unfinished blobs that the daemon has open."""
    return [file.path for file in node.ps.open_files() if file.path.startswith(f"{node.private}/partial/")]


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_who_waits_for_its_share_can_be_ended(hub: Hub, make_node: Callable[..., Node], end: str) -> None:
    node = make_node(transfer={"rate_limit": "1KiB"}).start()  # a piece takes minutes
    publish(hub, "model", 64 * MIB)
    waiting = node.popen("ensure-model", "org/model")
    node.wait_until(lambda: done_bytes(node) > 0, 20, "it is under way")
    assert open_partials(node)
    began = time.monotonic()
    if end == "cancel":
        node.ctl("cancel", "org/model")
        assert waiting.wait(15) == 75
        node.wait_until(lambda: not open_partials(node), 15, "no connection writes to it any more")
    else:
        assert node.terminate() == 0
    assert time.monotonic() - began < 15
    waiting.kill()
    waiting.communicate()

"""Small files come first, so that a config error shows before the weights have come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.node import Node
from tests.node.asking import ask

SIZE = 512 * MIB


def publish(hub: Hub) -> Fault:
    """A model whose config can never be right, and whose weights would come first by name and by age."""
    hub.create_repo("org/model").commit(
        {"a.safetensors": Synthetic(SIZE, 1), "config.json": b'{"model_type": "llama"}'}
    )
    return hub.faults.add(Fault(FaultKind.WRONG_BYTES, path="config.json"))


def test_a_request_whose_config_is_wrong_ends_before_its_weights_begin(
    hub: Hub, make_node: Callable[..., Node]
) -> None:
    node = make_node(transfer={"stall_timeout": "60s", "retry_timeout": "120s"}).start()
    wrong = publish(hub)
    hub.gate.close("a.safetensors")
    asked = ask(node, "org/model")
    assert (asked.exit_status, asked.reason) == (65, "DIGEST_MISMATCH")
    assert wrong.fired == 2
    assert hub.body_bytes("org/model", "a.safetensors") == 0
    node.wait_until(lambda: not node.status().transfers, 20, "nothing is left of it")
    assert node.visible("org/model") == []


@pytest.mark.parametrize(
    ("transfer", "hub_rate"),
    [
        ({"connections": 1}, 8 * MIB),
        ({"rate_limit": "8MiB"}, None),
        ({"connections": 1, "rate_limit": "8MiB"}, None),
    ],
    ids=["one connection", "rate limit", "both"],
)
def test_it_shows_early_on_a_slow_link(
    hub: Hub, make_node: Callable[..., Node], transfer: dict[str, Any], hub_rate: float | None
) -> None:
    node = make_node(transfer=transfer).start()
    publish(hub)
    hub.rate = hub_rate
    asked = ask(node, "org/model")
    assert (asked.exit_status, asked.reason) == (65, "DIGEST_MISMATCH")
    assert hub.body_bytes("org/model", "a.safetensors") < SIZE / 2

"""Memory is bounded whatever the model: buffers for each connection and each hash thread, nothing for each byte."""

from __future__ import annotations

from pathlib import Path

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node

BOUND = 48 * MIB
"""Eight connections with 256 KiB and what TLS and http.client keep, two hash threads with 4 MiB, and what malloc
rounds up; docs/design.md says so too."""


def peak_bytes(node: Node) -> int:
    """Most resident memory since the last reset (proc(5), VmHWM)."""
    status = Path(f"/proc/{node.ps.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak(node: Node) -> None:
    """proc(5): writing 5 to clear_refs resets VmHWM to what is resident."""
    Path(f"/proc/{node.ps.pid}/clear_refs").write_text("5")


def test_a_model_in_many_pieces_costs_no_more_memory_than_its_buffers(hub: Hub, node: Node) -> None:
    shards = {f"model-{number}.safetensors": Synthetic(192 * MIB, number) for number in range(3)}
    hub.create_repo("org/large").commit({"config.json": b"{}", **shards})
    hub.create_repo("org/warm").commit({"config.json": b"{ }", "model.safetensors": Synthetic(8 * MIB, 9)})
    node.ensure("org/warm")  # every thread and every library is there
    reset_peak(node)
    idle = peak_bytes(node)
    node.ensure("org/large", "--profile", "full")
    assert peak_bytes(node) - idle < BOUND

"""I5: a LICENSE that fails costs the weights nothing: what of them has come stays, and only the rest is fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from modelcache.reasons import Reason

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.node import Node
from tests.node.asking import ask

MODEL, LARGE, SMALL = "org/model", "model.safetensors", "LICENSE"
SIZE = 128 * MIB
RATE = 16 * MIB
"""Bytes a second: far from whole when the small file has failed."""
LOST_BYTES = 4 * MIB
"""What four connections may have had in their sockets when they were ended."""


@dataclass(frozen=True)
class Failure:
    """How the small file fails, for ever."""

    fault: Fault
    reason: Reason


FAILURES = {
    "permanent": Failure(Fault(FaultKind.STATUS, path=SMALL, status=403, error_code="GatedRepo"), Reason.GATED_REPO),
    "transient": Failure(Fault(FaultKind.STATUS, path=SMALL, status=503), Reason.UPSTREAM_UNAVAILABLE),
    "wrong content": Failure(Fault(FaultKind.WRONG_BYTES, path=SMALL), Reason.DIGEST_MISMATCH),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_small_file_that_fails_leaves_the_large_one_its_progress(
    hub: Hub, make_node: Callable[..., Node], failure: Failure
) -> None:
    hub.create_repo(MODEL).commit({"config.json": b"{}", SMALL: b"Apache", LARGE: Synthetic(SIZE, 4)})
    node = make_node(transfer={"connections": 4, "retry_timeout": "3s"}).start()
    hub.rate = RATE
    # Its turn is first, so that an error shows early; here it fails when the weights have been under way for a while.
    failure.fault.after = hub.faults.add(Fault(FaultKind.STATUS, path=SMALL, status=503, retry_after=2, times=1))
    hub.faults.add(failure.fault)
    asked = ask(node, MODEL, "--profile", "full")
    assert asked.reason == failure.reason
    assert SMALL in asked.text
    assert hub.wait_until(lambda: all(request.finished for request in hub.requests()))
    came = hub.body_bytes(MODEL, LARGE)
    assert 2 * LOST_BYTES < came < SIZE
    hub.faults.clear()
    hub.rate = None
    (ready,) = node.ensure(MODEL, "--profile", "full")
    assert SIZE <= hub.body_bytes(MODEL, LARGE) <= SIZE + LOST_BYTES
    assert ready["bytes_fetched"] <= SIZE + MIB
    found = hashlib.sha256((Path(ready["path"]) / LARGE).read_bytes()).hexdigest()
    assert found == hub.find_repo(MODEL).files()[LARGE].sha256

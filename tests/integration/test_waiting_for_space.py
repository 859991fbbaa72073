"""--wait-for-space: who may wait is served when others end what they hold, and stands in nobody's way meanwhile."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node

SIZE = 8 * MIB
SECONDS = 20.0
PATIENT = {"stall_timeout": "30s", "retry_timeout": "60s"}


def publish(hub: Hub, **sizes: int) -> None:
    for number, (name, size) in enumerate(sizes.items()):
        weights = Synthetic(size, 77 + number)
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": weights})


@pytest.fixture
def full(hub: Hub, make_node: Callable[..., Node]) -> Node:
    """Room for one model, which is taken by one that is leased."""
    node = make_node(cache={"budget": f"{SIZE + 7 * MIB}B"}, transfer={"models": 1, **PATIENT}).start()
    publish(hub, taken=SIZE, wanted=SIZE, also=SIZE, small=MIB // 2, huge=3 * SIZE)
    assert node.run("ensure-model", "org/taken").returncode == 0
    return node


def patient(node: Node, name: str, seconds: str = "60s") -> subprocess.Popen[str]:
    """A caller that waits for space; returns once it does."""
    asked = node.popen("ensure-model", f"org/{name}", "--wait-for-space", seconds)
    node.wait_until(lambda: waits(node, name), SECONDS, f"{name} waits for space")
    return asked


def waits(node: Node, name: str) -> bool:
    shown = [transfer for transfer in node.status().transfers if transfer.repo_id == f"org/{name}"]
    return bool(shown) and "waits for space" in shown[0].detail


def cached(node: Node) -> set[str]:
    return {model["repo_id"].removeprefix("org/") for model in node.ctl("ls")}


def end(asked: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = asked.communicate(timeout=SECONDS)
    return asked.returncode, said


def test_it_goes_on_when_a_lease_ends(hub: Hub, full: Node) -> None:
    asked = patient(full, "wanted")
    assert hub.request_count(repo="org/wanted", kind="cdn") == 0
    full.release_all()
    status, said = end(asked)
    assert status == 0, said
    assert cached(full) == {"wanted"}
    full.assert_disk_truth()


def test_it_goes_on_when_a_pin_ends(full: Node) -> None:
    full.ctl("pin", "org/taken")
    full.release_all()
    asked = patient(full, "wanted")
    full.ctl("unpin", "org/taken")
    assert end(asked)[0] == 0
    assert cached(full) == {"wanted"}


def test_it_goes_on_when_a_transfer_is_given_up(hub: Hub, full: Node) -> None:
    full.release_all()
    hub.gate.close("model.safetensors")
    first = full.popen("ensure-model", "org/also")
    assert hub.gate.wait_for_waiting(1)
    full.settings["transfer"]["models"] = 2
    full.write_config()
    full.ps.send_signal(1)
    asked = patient(full, "wanted")
    full.ctl("cancel", "org/also")
    assert end(first)[0] != 0
    hub.gate.open()
    status, said = end(asked)
    assert status == 0, said
    assert cached(full) == {"wanted"}


def test_its_patience_is_bounded(full: Node) -> None:
    began = time.monotonic()
    status, said = end(full.popen("ensure-model", "org/wanted", "--wait-for-space", "1500ms"))
    assert status == 75
    assert re.search(r"waited \d s for others to make room", said)
    assert "leased" in said
    assert 1.4 < time.monotonic() - began < 10
    assert full.status().transfers == []
    assert cached(full) == {"taken"}


def test_what_never_fits_is_told_at_once(full: Node) -> None:
    done = full.run("ensure-model", "org/huge", "--wait-for-space", "60s", timeout=SECONDS)
    assert done.returncode == 73


def test_without_patience_it_is_refused_at_once_though_another_waits_for_the_same(full: Node) -> None:
    asked = patient(full, "wanted")
    done = full.run("ensure-model", "org/wanted", timeout=SECONDS)
    assert done.returncode == 75
    assert "waited" not in done.stderr
    full.wait_until(lambda: waits(full, "wanted"), SECONDS, "the other waits on")
    full.release_all()
    assert end(asked)[0] == 0


def test_it_stands_in_nobodys_way(hub: Hub, full: Node) -> None:
    """Neither in the line for space nor, with transfer.models = 1, in that for downloading."""
    hub.create_repo("org/fits").commit({"config.json": b"{}", "model.safetensors": Synthetic(MIB // 2, 3)})
    asked = patient(full, "wanted")
    done = full.run("ensure-model", "org/fits", timeout=SECONDS)
    assert done.returncode == 0
    full.wait_until(lambda: waits(full, "wanted"), SECONDS, "it has tried again, when the other had ended")
    full.release_all()
    assert end(asked)[0] == 0


def test_who_waits_longest_is_served_first(full: Node) -> None:
    first = patient(full, "wanted")
    second = patient(full, "also")
    full.release_all()
    assert end(first)[0] == 0
    full.wait_until(lambda: waits(full, "also"), SECONDS, "the second waits for the first")
    assert cached(full) == {"wanted"}
    full.release_all()
    assert end(second)[0] == 0
    assert cached(full) == {"also"}


def test_whoever_goes_away_waits_no_more(full: Node) -> None:
    asked = patient(full, "wanted")
    asked.terminate()
    assert end(asked)[0] == 143
    full.wait_until(lambda: not full.status().transfers, SECONDS, "nothing waits for nobody")
    full.release_all()
    # Who waited longest would be served first: this one comes through the line behind it.
    assert full.run("ensure-model", "org/small", timeout=SECONDS).returncode == 0
    assert cached(full) == {"taken", "small"}, "and nothing was evicted for it"


def test_a_daemon_that_stops_sends_it_away(full: Node) -> None:
    asked = patient(full, "wanted")
    began = time.monotonic()
    full.terminate()
    assert time.monotonic() - began < 10
    full.start()
    full.wait_until(lambda: waits(full, "wanted"), SECONDS, "the client has come again")
    full.release_all()
    assert end(asked)[0] == 0


@pytest.mark.parametrize("text", ["soon", "-1s"])
def test_a_patience_that_is_none_is_a_usage_error(full: Node, text: str) -> None:
    done = full.run("ensure-model", "org/wanted", f"--wait-for-space={text}")
    assert done.returncode == 64
    assert "--wait-for-space" in done.stderr

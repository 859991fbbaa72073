"""I2: however many ask, every byte is fetched once; and when they have gone, nothing of them is left."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio
import pytest
from modelcache.client import reference
from modelcache.v1 import cache_pb2, cache_pb2_grpc

from tests.hub import MIB, Fault, FaultKind, Hub
from tests.hub.models import paced_model
from tests.node import Node
from tests.node.daemon import in_threads

CALLERS = 64
STREAMS = 1000
CHANNELS = 10
CANCELLED = 100
ROUNDS = 5
MOST_GROWTH = 24 * MIB
"""12 KiB for each stream of two rounds; what malloc keeps goes up and down by 15 MiB from round to round."""
MOST_UPSTREAM = 3 * 8 + 2
"""A connection each of 8 Hub threads and of 8 movers to two hosts; the metrics port, and a scrape."""
WEIGHTS = "*.safetensors"

STOPPED_READER = """
import sys
from modelcache.client import Client, reference
with Client(sys.argv[1]) as client:
    for event in client.ensure(reference(sys.argv[2])):
        pass
print("ready")
"""


@pytest.fixture
def patient_node(make_node: Callable[..., Node]) -> Node:
    """A gate that is closed for a while is no stall to it, and a Hub that is slow beside all this no failure."""
    return make_node(transfer={"stall_timeout": "60s"}, hub={"timeout": "60s"}).start()


def waiters(node: Node) -> int:
    """Callers registered with the one transfer under way."""
    transfers = node.status().transfers
    return int(transfers[0].waiters) if transfers else 0


def weight_bytes_sent(hub: Hub) -> int:
    """Content of weights given to the network so far."""
    return sum(r.bytes_sent for r in hub.requests() if r.is_content and r.file.endswith(".safetensors"))


def assert_each_file_was_sent_once(hub: Hub, repo_id: str, commit: str) -> None:
    """I2: every file that was fetched: one GET of its content, its size in bytes."""
    repo = hub.find_repo(repo_id)
    assert repo is not None
    files = repo.files(commit)
    sent = [(r.file, r.bytes_sent) for r in hub.requests() if r.is_content and r.repo == repo_id]
    assert sorted(sent) == sorted((file, files[file].size) for file in {file for file, _ in sent})
    assert {file for file, _ in sent} >= {file for file in files if file.endswith(".safetensors")}


@pytest.mark.deep
def test_sixty_four_cold_processes_cost_one_download(hub: Hub, patient_node: Node) -> None:
    node = patient_node
    commit = hub.create_repo("org/paced").commit(paced_model(64 * MIB, 8))
    hub.gate_bodies.close(WEIGHTS)
    callers = [node.popen("ensure-model", "--json", "org/paced") for _ in range(CALLERS)]
    try:
        node.wait_until(
            lambda: waiters(node) == CALLERS or any(caller.poll() is not None for caller in callers),
            60,
            "all processes wait for the same transfer",
        )
        assert [caller.communicate() for caller in callers if caller.poll() is not None] == [], "none has ended"
        assert weight_bytes_sent(hub) == 0, "all are registered before the first weight byte"
        hub.rate = 32 * MIB
        hub.gate_bodies.open()
        answers = [caller.communicate(timeout=60) for caller in callers]
    finally:
        for caller in callers:
            caller.kill()
            caller.wait()
    assert [caller.returncode for caller in callers] == [0] * CALLERS, answers
    ready = [json.loads(stdout) for stdout, _ in answers]
    assert {answer["commit"] for answer in ready} == {commit}
    outcomes = [answer["outcome"] for answer in ready]
    assert outcomes.count("downloaded") == 1
    assert outcomes.count("joined") == CALLERS - 1
    assert sum(answer["bytes_fetched"] for answer in ready) <= ready[0]["bytes_total"]
    assert_each_file_was_sent_once(hub, "org/paced", commit)
    assert len({answer["lease_id"] for answer in ready}) == CALLERS
    node.assert_disk_truth()


def upstream_and_descriptors(node: Node) -> tuple[int, int]:
    """How many TCP connections, and how many descriptors with them; of one moment, for idle connections are closed."""
    while True:
        before = node.ps.net_connections("tcp")
        descriptors = node.ps.num_fds()
        if node.ps.net_connections("tcp") == before:
            return len(before), descriptors


@dataclass(frozen=True)
class Footprint:
    """What the daemon holds at rest."""

    descriptors: int
    """Without TCP connections."""
    threads: int
    tasks: int

    @classmethod
    def of(cls, node: Node) -> Footprint:
        """Once every client's connection is closed on the daemon's side too: only the listeners are left."""

        def nobody_is_connected() -> bool:
            ours = {str(node.cache_socket), str(node.admin_socket)}
            return sum(socket.laddr in ours for socket in node.ps.net_connections("unix")) == len(ours)

        node.wait_until(nobody_is_connected, 20, "all connections are closed")
        tasks = int(node.metric("modelcached_event_loop_tasks"))
        # Connections to the Hub are kept for the next request, and come and go: bounded, but not the same each time.
        upstream, descriptors = upstream_and_descriptors(node)
        assert upstream <= MOST_UPSTREAM
        return cls(descriptors - upstream, node.ps.num_threads(), tasks)

    def __le__(self, other: Footprint) -> bool:
        return self.descriptors <= other.descriptors and self.threads <= other.threads and self.tasks <= other.tasks


def a_reader_to_stop(node: Node, repo_id: str) -> subprocess.Popen[str]:
    """A process of its own, which SIGSTOP can stop; says "ready" when its stream ended well."""
    command = [sys.executable, "-c", STOPPED_READER, f"unix://{node.cache_socket}", repo_id]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def a_thousand_streams(hub: Hub, node: Node, repo_id: str) -> None:
    """One round: 1,000 streams on a cold model, 100 cancelled and one reader stopped before the first byte."""
    hub.gate_bodies.close(WEIGHTS)
    stopped = a_reader_to_stop(node, repo_id)
    try:
        await asyncio.to_thread(node.wait_until, lambda: waiters(node) == 1, 20, "the reader that will stop waits")
        stopped.send_signal(signal.SIGSTOP)
        channels = [
            grpc.aio.insecure_channel(f"unix://{node.cache_socket}", [("grpc.use_local_subchannel_pool", 1)])
            for _ in range(CHANNELS)
        ]
        request = cache_pb2.EnsureModelRequest(model=reference(repo_id))

        async def read(number: int) -> str:
            stub = cache_pb2_grpc.CacheServiceStub(channels[number % CHANNELS])
            try:
                last = [event async for event in stub.EnsureModel(request)][-1]
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return str(last.WhichOneof("event"))

        streams = [asyncio.create_task(read(number)) for number in range(STREAMS - 1)]
        await asyncio.to_thread(node.wait_until, lambda: waiters(node) == STREAMS, 60, "1,000 streams wait")
        asked_at = time.monotonic()
        await asyncio.to_thread(node.status)
        # Milliseconds where nobody else wants the processor.
        assert time.monotonic() - asked_at < 10, "the event loop is busy with progress alone"
        for stream in streams[:CANCELLED]:
            stream.cancel()
        await asyncio.to_thread(
            node.wait_until, lambda: waiters(node) == STREAMS - CANCELLED, 20, "the cancelled have gone"
        )
        hub.gate_bodies.open()
        ends = await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 60)
        assert [end for end in ends[CANCELLED:] if end != "ready"] == []
        assert all(isinstance(end, asyncio.CancelledError) for end in ends[:CANCELLED])
        for channel in channels:
            await channel.close()
        stopped.send_signal(signal.SIGCONT)
        said, _ = await asyncio.to_thread(stopped.communicate, timeout=20)
        assert said == "ready\n", "the reader that was stopped for a while comes through as well"
    finally:
        stopped.kill()
        stopped.wait()


def start_every_thread(hub: Hub, node: Node) -> None:
    """Pools start a thread when they need one more: many cold models at once, so that none is left to start."""
    repos = [f"org/warm{number}" for number in range(12)]
    for number, repo_id in enumerate(repos):
        hub.create_repo(repo_id).commit(paced_model(4 * MIB, 2, seed=100 + number))
    slow = hub.faults.add(Fault(FaultKind.TRICKLE, where="api", path="revision", seconds_per_byte=0.002))
    hub.gate_bodies.close(WEIGHTS)

    def ensure(number: int) -> None:
        with node.client() as client:
            assert [type(event) for event in client.ensure(reference(repos[number]))][-1] is cache_pb2.Ready

    waiting = threading.Thread(target=in_threads, args=(len(repos), ensure))
    waiting.start()
    assert hub.gate_bodies.wait_for_waiting(8), "every mover has a connection"
    hub.faults.remove(slow)
    hub.gate_bodies.open()
    waiting.join()
    hub.reset_counters()


@pytest.mark.deep
async def test_a_thousand_streams_leave_nothing_behind(hub: Hub, patient_node: Node) -> None:
    node = patient_node
    start_every_thread(hub, node)
    commits = [hub.create_repo(f"org/round{n}").commit(paced_model(4 * MIB, 2, seed=n)) for n in range(ROUNDS)]
    await a_thousand_streams(hub, node, "org/round0")
    node.release_all()
    before, memory = Footprint.of(node), []
    for number in range(1, ROUNDS):
        await a_thousand_streams(hub, node, f"org/round{number}")
        node.release_all()
        node.wait_until(lambda: Footprint.of(node) <= before, 30, f"descriptors, threads and tasks are as {before}")
        memory.append(node.ps.memory_info().rss)
    for number, commit in enumerate(commits):
        assert_each_file_was_sent_once(hub, f"org/round{number}", commit)
    assert min(memory[2:]) - min(memory[:2]) < MOST_GROWTH, "a round of streams costs memory for ever"

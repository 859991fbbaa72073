"""What is cached already: calls inside a client that runs, whole processes, and calls while a transfer runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families

from tests.bench import measure
from tests.bench.cases import MIB, Bench, Case, Column, Prepare, upstream
from tests.bench.measure import ContenderError
from tests.bench.ours import OURS, check_ensured, daemon, ensure_measured
from tests.bench.peers import Contender, Figures, hub_environment, scratch, snapshot_download
from tests.bench.server import Published, Site
from tests.hub.models import paced_model
from tests.node.daemon import BIN, Node

_LOAD = [sys.executable, "-m", "tests.bench.load"]
_CACHED_BYTES = 8 * MIB
_CACHED_SHARDS = 4
_PAUSE_SECONDS = 0.005
"""Between the calls that feel for the event loop while it is busy."""

_BARE_CLIENT = """
import os, sys
import grpc
from modelcache.v1 import cache_pb2, cache_pb2_grpc, common_pb2
with grpc.insecure_channel(os.environ["MODELCACHE_ADDRESS"]) as channel:
    model = common_pb2.ModelReference(repo_id=sys.argv[1], profile=common_pb2.Profile(name="full"))
    for event in cache_pb2_grpc.CacheServiceStub(channel).EnsureModel(cache_pb2.EnsureModelRequest(model=model)):
        pass
print(event.ready.models[0].path)
"""


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def latency_figures(took: Sequence[float]) -> Figures:
    """In milliseconds."""
    return {
        "p50": percentile(took, 0.50) * 1e3,
        "p99": percentile(took, 0.99) * 1e3,
        "p999": percentile(took, 0.999) * 1e3,
        "max": max(took) * 1e3,
        "calls": len(took),
    }


def cache_a_model(node: Node, model: Published, directory: Path) -> None:
    """Downloads it once, and releases what that leased."""
    _, said = ensure_measured(node, model, directory)
    check_ensured(said, model, node.hub_dir)
    node.release_all()


@contextmanager
def _cached(bench: Bench) -> Iterator[tuple[Site, Published, Node, Path]]:
    """A daemon that has a model, and its directory."""
    with (
        upstream(bench, "bench/cached", paced_model(_CACHED_BYTES, _CACHED_SHARDS)) as (site, model),
        scratch(bench.directory) as directory,
        daemon(directory, site.endpoint) as node,
    ):
        cache_a_model(node, model, directory)
        yield site, model, node, directory


# Inside a client that runs


class Calls(Contender):
    """So many callers (grpc.aio, or our client library) in one client process, for a few seconds."""

    def __init__(self, name: str, address: str, model: Published, *options: str) -> None:
        self.name = name
        self._argv = [*_LOAD, "calls", address, model.repo_id, *options]

    def run(self) -> Figures:
        done = subprocess.run(self._argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ContenderError(done.stderr[-2000:])
        record = json.loads(done.stdout.splitlines()[-1])
        seconds = max(b + t for b, t in zip(record["began"], record["took"], strict=True)) - min(record["began"])
        return {**latency_figures(record["took"]), "rate": len(record["took"]) / seconds}


class OwnCalls(Calls):
    """The same to our daemon; leases are released afterwards, so that no round finds those of another."""

    def __init__(self, name: str, node: Node, model: Published, *options: str) -> None:
        super().__init__(name, f"unix://{node.cache_socket}", model, *options)
        self._node = node

    def run(self) -> Figures:
        figures = super().run()
        self._node.release_all()
        return figures


def _hits(callers: int) -> Prepare:
    @contextmanager
    def prepare(bench: Bench) -> Iterator[Sequence[Contender]]:
        options = ["--callers", str(callers), "--seconds", str(bench.scale.hit_seconds)]
        with _cached(bench) as (_, model, node, directory), _echo(f"unix://{directory}/echo.sock") as address:
            entered = [
                OwnCalls(OURS, node, model, *options),
                Calls("bare grpc.aio echo", address, model, *options),
            ]
            if callers == 1:
                entered += [
                    OwnCalls(f"{OURS}, through modelcache.client", node, model, *options, "--library"),
                    Calls("bare echo, through modelcache.client", address, model, *options, "--library"),
                ]
            yield entered

    return prepare


@contextmanager
def _echo(address: str) -> Iterator[str]:
    process = subprocess.Popen([*_LOAD, "echo", address], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield address
    finally:
        process.terminate()
        process.wait()


# Whole processes


class OneProcess(Contender):
    """A command on a hit, from its start to its end."""

    def __init__(self, name: str, argv: Sequence[str], environment: dict[str, str], directory: Path) -> None:
        self.name = name
        self._argv, self._environment, self._directory = argv, environment, directory

    def run(self) -> Figures:
        usage = measure.run(self._argv, self._environment, self._directory)
        if not usage.stdout.strip():
            raise ContenderError(f"{self.name} printed no path")
        return {"ms": usage.seconds * 1e3, "cpu_ms": usage.cpu_seconds * 1e3}


@contextmanager
def _processes(bench: Bench) -> Iterator[Sequence[Contender]]:
    with _cached(bench) as (site, model, node, directory):
        repo, own = model.repo_id, node.client_environment
        hub = hub_environment(directory / "home", site.endpoint)
        measure.run(snapshot_download(repo), hub, directory)
        bare = [sys.executable, "-c", _BARE_CLIENT, repo]
        yield [
            OneProcess(OURS, [str(BIN / "ensure-model"), "--profile", "full", repo], own, directory),
            OneProcess("bare script: grpc, stubs, one call", bare, own, directory),
            OneProcess("hf download", [str(BIN / "hf"), "download", repo], hub, directory),
        ]


# While a transfer runs


class HitsMeanwhile(Contender):
    """One caller, a call every few milliseconds, while a daemon downloads a large model, or does nothing.

    ``asked``: that daemon, the bare server, or another daemon that does nothing else. The last two have a process of
    their own: what a busy machine costs anyone, and what it costs a daemon that shares nothing but the machine.
    """

    def __init__(
        self,
        name: str,
        bench: Bench,
        site: Site,
        cached: Published,
        big: Published,
        *,
        busy: bool = True,
        asked: Literal["itself", "echo", "another"] = "itself",
    ) -> None:
        self.name = name
        self._bench, self._site, self._cached, self._big = bench, site, cached, big
        self._busy, self._asked = busy, asked

    def run(self) -> Figures:
        with (
            scratch(self._bench.directory, self._big) as directory,
            daemon(directory, self._site.endpoint) as node,
            self._server(node, directory) as address,
            _calling(address, self._cached) as load,
        ):
            before = _lag_buckets(node)
            began = time.monotonic()
            if self._busy:
                _, said = ensure_measured(node, self._big, directory)
                check_ensured(said, self._big, node.hub_dir)
            else:
                time.sleep(self._bench.scale.hit_seconds)
            ended = time.monotonic()
            lag = _lag_figures(before, _lag_buckets(node))
            record = _ended(load)
        within = [t for b, t in zip(record["began"], record["took"], strict=True) if began <= b and b + t <= ended]
        return {**latency_figures(within), **lag, "took": ended - began}

    @contextmanager
    def _server(self, node: Node, directory: Path) -> Iterator[str]:
        """The address of whoever is called."""
        if self._asked == "echo":
            with _echo(f"unix://{directory}/echo.sock") as echo:
                yield echo
        elif self._asked == "another":
            (directory / "another").mkdir()
            with daemon(directory / "another", self._site.endpoint) as another:
                cache_a_model(another, self._cached, directory / "another")
                yield f"unix://{another.cache_socket}"
        else:
            cache_a_model(node, self._cached, directory)
            yield f"unix://{node.cache_socket}"


@contextmanager
def _calling(address: str, model: Published) -> Iterator[subprocess.Popen[str]]:
    argv = [*_LOAD, "calls", address, model.repo_id, "--pause", str(_PAUSE_SECONDS)]
    load = subprocess.Popen(
        [*argv, "--seconds", "3600", "--until-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert load.stdout is not None
        load.stdout.readline()
        yield load
    finally:
        load.kill()
        load.wait()


def _ended(load: subprocess.Popen[str]) -> Any:
    out, _ = load.communicate()
    return json.loads(out.splitlines()[-1])


def _lag_buckets(node: Node) -> dict[float, float]:
    """The daemon's own histogram of its event loop's lag; empty while it exports none."""
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(text)
        if "loop_lag" in family.name
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }


def _lag_figures(before: dict[float, float], after: dict[float, float]) -> Figures:
    """The 99.9th percentile between two scrapes, as the upper end of its bucket, in milliseconds."""
    counts = {le: value - before.get(le, 0.0) for le, value in sorted(after.items())}
    total = max(counts.values(), default=0.0)
    if not total:
        return {}
    return {"lag_p999": next(le for le, count in counts.items() if count >= 0.999 * total) * 1e3}


@contextmanager
def _meanwhile(bench: Bench) -> Iterator[Sequence[Contender]]:
    with Site(bench.directory).hub() as site:
        cached = site.publish("bench/cached", paced_model(_CACHED_BYTES, _CACHED_SHARDS, seed=1))
        big = site.publish("bench/big", paced_model(bench.scale.kill_bytes, 4))
        measure.touch_disk(bench.directory, 2 * big.size_bytes)
        with site.serving():
            yield [
                HitsMeanwhile("during a transfer", bench, site, cached, big),
                HitsMeanwhile("another daemon meanwhile", bench, site, cached, big, asked="another"),
                HitsMeanwhile("bare grpc.aio echo meanwhile", bench, site, cached, big, asked="echo"),
                HitsMeanwhile("while idle", bench, site, cached, big, busy=False),
            ]


_RATE = Column("rate", "calls/s", 0, less_is_better=False)
_LATENCIES = (Column("p50", "p50 ms"), Column("p99", "p99 ms"), Column("max", "max ms", 1))
HITS = (
    Case("hit-1", "Warm hit inside one client, 1 caller", (*_LATENCIES, _RATE), _hits(1)),
    Case("hit-16", "Warm hit inside one client, 16 callers", (_RATE, *_LATENCIES), _hits(16)),
    Case("hit-64", "Warm hit inside one client, 64 callers", (_RATE, *_LATENCIES), _hits(64)),
    Case(
        "process",
        "Warm hit as a whole process",
        (Column("ms", "ms", 0), Column("cpu_ms", "CPU ms", 0)),
        _processes,
        rounds=lambda scale: scale.process_rounds,
    ),
    Case(
        "meanwhile",
        "Hits while 4 shards are downloaded at full speed",
        (
            Column("p50", "p50 ms"),
            Column("p99", "p99 ms"),
            Column("p999", "p99.9 ms", 1),
            Column("max", "max ms", 1),
            Column("lag_p999", "loop lag p99.9 ms", 1),
            Column("calls", "calls", 0),
            Column("took", "transfer s"),
        ),
        _meanwhile,
        "during a transfer",
    ),
)

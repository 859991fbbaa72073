"""The cases that download: what is fetched, over which network, by whom."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import measure
from tests.bench.ours import OURS, Modelcached, ModelcachedWithoutSplice, ModelcachedXet
from tests.bench.peers import (
    Aria2,
    Contender,
    Copy,
    Curl,
    CurlHash,
    Download,
    Job,
    Snapshot,
    SnapshotVerify,
    SnapshotXet,
)
from tests.bench.proxy import long_road
from tests.bench.server import Published, Site
from tests.hub import Hub
from tests.hub.cas import FULL_XORB_BYTES
from tests.hub.content import FileSource
from tests.hub.models import paced_model

MIB, GIB = 2**20, 2**30
CONNECTION_BYTES_PER_SECOND = 20e6


@dataclass(frozen=True)
class Scale:
    """How much of everything. What must hold is for ``FULL``."""

    big_bytes: int
    """Cold downloads."""
    kill_bytes: int
    """What is killed half way, and what goes on meanwhile."""
    far_bytes: int
    """The file that comes from far away."""
    xet_bytes: int
    """What comes through the Xet store."""
    small_files: int
    hit_seconds: float
    rounds: int
    process_rounds: int
    """Of cases in which a run is one short process."""
    all_peers: bool
    """Otherwise those that say most, and all of them in the first case alone."""


FULL = Scale(4 * GIB, 4 * GIB, 512 * MIB, 1 * GIB, 2000, 5.0, 5, 100, all_peers=True)
QUICK = Scale(1 * GIB, 512 * MIB, 128 * MIB, 256 * MIB, 500, 1.0, 3, 20, all_peers=False)


@dataclass(frozen=True)
class Column:
    """One figure of a contender."""

    key: str
    title: str
    digits: int = 2
    less_is_better: bool = True


@dataclass(frozen=True)
class Bench:
    """Where and how much."""

    directory: Path
    scale: Scale


Prepare = Callable[[Bench], AbstractContextManager[Sequence[Contender]]]


@dataclass(frozen=True)
class Case:
    """Contenders that do the same, and what of each is shown; the first column is what they are compared by."""

    name: str
    title: str
    columns: tuple[Column, ...]
    prepare: Prepare
    base: str = OURS
    """The contender that the others are compared with."""
    rounds: Callable[[Scale], int] = lambda scale: scale.rounds
    in_quick: bool = True
    """Whether a quick run that names no case has it."""


_TIMES = (Column("seconds", "s with sync"), Column("returned", "s until it returned"))
_PEAK = Column("peak", "MiB above idle", 0)
LARGE = (*_TIMES, Column("rate", "MB/s", 0, less_is_better=False), Column("cpu_gib", "CPU s/GiB"), _PEAK)
SMALL = (*_TIMES, Column("files", "files/s", 0, less_is_better=False), Column("cpu", "CPU s"), _PEAK)


@contextmanager
def upstream(bench: Bench, repo_id: str, files: dict[str, FileSource]) -> Iterator[tuple[Site, Published]]:
    """A model that nginx serves, and a disk on which room for it has been touched."""
    with Site(bench.directory).hub() as site:
        model = site.publish(repo_id, files)
        measure.touch_disk(bench.directory, 2 * model.size_bytes)
        with site.serving():
            yield site, model


def contenders(job: Job, peers: Sequence[type[Download]]) -> list[Download]:
    """Ours first, then the peers."""
    return [Modelcached(job), *(peer(job) for peer in peers)]


def _cold(shards: int) -> Prepare:
    every: list[type[Download]] = [Snapshot, SnapshotVerify, Aria2, Curl, CurlHash, Copy]
    few: list[type[Download]] = [Snapshot, CurlHash]

    @contextmanager
    def prepare(bench: Bench) -> Iterator[Sequence[Contender]]:
        quick = every if shards > 1 else few
        peers = [*every, ModelcachedWithoutSplice] if bench.scale.all_peers else quick
        with upstream(bench, "bench/cold", paced_model(bench.scale.big_bytes, shards)) as (site, model):
            job = Job(model, site.endpoint, bench.directory)
            yield contenders(job, peers)

    return prepare


@contextmanager
def _secure(bench: Bench) -> Iterator[Sequence[Contender]]:
    peers: list[type[Download]] = [Snapshot, Aria2, Curl, CurlHash] if bench.scale.all_peers else [Snapshot, CurlHash]
    with upstream(bench, "bench/tls", paced_model(bench.scale.big_bytes, 4)) as (site, model):
        yield contenders(Job(model, site.secure_endpoint, bench.directory, site.ca_file), peers)


def _far(rtt_seconds: float) -> Prepare:
    @contextmanager
    def prepare(bench: Bench) -> Iterator[Sequence[Contender]]:
        peers: list[type[Download]] = [Snapshot, Aria2, Curl] if bench.scale.all_peers else [Snapshot, Aria2]
        with (
            upstream(bench, "bench/far", paced_model(bench.scale.far_bytes, 1)) as (site, model),
            long_road(site.roads(), rtt_seconds, CONNECTION_BYTES_PER_SECOND),
        ):
            yield contenders(Job(model, site.far_endpoint, bench.directory), peers)

    return prepare


@contextmanager
def _small(bench: Bench) -> Iterator[Sequence[Contender]]:
    rng = random.Random(0)
    files: dict[str, FileSource] = {
        f"data/part-{number:05d}.json": rng.randbytes(rng.randrange(1024, 64 * 1024))
        for number in range(bench.scale.small_files)
    }
    peers: list[type[Download]] = [Snapshot, Aria2, Curl, Copy]
    with upstream(bench, "bench/small", files) as (site, model):
        yield contenders(Job(model, site.endpoint, bench.directory), peers)


@contextmanager
def _xet(bench: Bench) -> Iterator[Sequence[Contender]]:
    """From the test Hub itself: nginx serves no xorbs. Its CAS is Python, and holds both back alike."""
    with Hub(xet=True) as hub:
        hub.cas.xorb_bytes = FULL_XORB_BYTES
        repo = hub.create_repo("bench/xet")
        commit = repo.commit(paced_model(bench.scale.xet_bytes, 4))
        model = Published("bench/xet", commit, repo.files(commit), bench.directory)
        measure.touch_disk(bench.directory, 2 * model.size_bytes)
        job = Job(model, hub.endpoint, bench.directory)
        yield [ModelcachedXet(job), SnapshotXet(job)]


DOWNLOADS = (
    Case("cold-shards", "Cold, loopback, 4 shards", LARGE, _cold(4)),
    Case("cold-file", "Cold, loopback, 1 file", LARGE, _cold(1)),
    Case("cold-tls", "Cold, loopback, 4 shards over TLS", LARGE, _secure, in_quick=False),
    Case("far-50", "One file, 50 ms of round trip, 20 MB/s a connection", LARGE, _far(0.050)),
    Case("far-150", "One file, 150 ms of round trip, 20 MB/s a connection", LARGE, _far(0.150)),
    Case("xet", "Cold, loopback, 4 shards over Xet, full-size xorbs", LARGE, _xet, ModelcachedXet.name),
    Case("small", "Small files, 1 to 64 KiB", SMALL, _small),
)

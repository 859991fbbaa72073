"""Hashing leaves the page cache as it was, warming fills it at a bounded rate and only where memory allows."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from modelcached.cache.prewarm import STEP_BYTES, Prewarmer
from modelcached.config import CacheSection
from modelcached.errors import CacheError
from modelcached.model import Algorithm, Commit, Digest, RepoId, SnapshotId
from modelcached.pools import Pools
from modelcached.store import pagecache
from modelcached.store.memory import available_bytes
from modelcached.transfer.hashing import BLOCK_BYTES, hash_file
from structlog.testing import capture_logs

from tests.node.warmth import PAGE, make_cold, on_a_disk, pages, touch, warm_share

MIB = 1 << 20
SIZE = 5 * BLOCK_BYTES + 3 * PAGE + 17
SNAPSHOT = SnapshotId(RepoId("org/model"), Commit("0" * 40))
PLENTY = 1 << 60


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with on_a_disk(tmp_path) as directory:
        yield directory


def cold_file(directory: Path, size: int = SIZE, name: str = "blob") -> Path:
    path = directory / name
    path.write_bytes(os.urandom(size))
    make_cold(path)
    return path


def digest_of(content: bytes) -> Digest:
    return Digest(Algorithm.SHA256, hashlib.sha256(content).hexdigest())


# Hashing


def test_hashing_cold_data_leaves_it_cold(disk: Path) -> None:
    path = disk / "blob"
    content = os.urandom(SIZE)
    path.write_bytes(content)
    make_cold(path)
    assert hash_file(str(path), digest_of(content), threading.Event())
    assert warm_share(path) < 0.01


def test_hashing_keeps_what_was_warm_and_only_that(disk: Path) -> None:
    path = cold_file(disk)
    for start, size in ((0, PAGE), (3 * PAGE, MIB), (2 * BLOCK_BYTES - PAGE, 2 * PAGE), (SIZE - 17, 17)):
        touch(path, start, size)
    before = pages(path)
    assert 0.01 < sum(before) / len(before) < 0.5
    hash_file(str(path), digest_of(b""), threading.Event())
    after = pages(path)
    assert [number for number, page in enumerate(before) if page and not after[number]] == [], "what was warm stays"
    assert sum(after) <= sum(before) + 2 * 16, "what was cold is cold again, but for a large page's neighbours"


def test_hashing_warm_data_leaves_it_warm(disk: Path) -> None:
    path = disk / "blob"
    path.write_bytes(os.urandom(SIZE))
    assert hash_file(str(path), digest_of(path.read_bytes()), threading.Event())
    assert warm_share(path) == 1


def test_hashing_that_is_stopped_leaves_nothing_behind(disk: Path) -> None:
    path = cold_file(disk)
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(CacheError):
        hash_file(str(path), digest_of(b""), stopping)
    assert warm_share(path) < 0.01


def test_what_is_still_on_its_way_from_the_disk_is_dropped_too(disk: Path) -> None:
    path = cold_file(disk, 64 * MIB)
    with path.open("rb") as file:
        blocks = pagecache.read_through(file.fileno(), memoryview(bytearray(PAGE * 4096)))
        next(blocks)
        blocks.close()
    assert warm_share(path) < 0.01


@pytest.mark.parametrize("work", ["hash", "warm"])
def test_where_advice_to_read_is_ignored_the_kernels_own_readahead_is_not_let_in(
    disk: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """It reads megabytes beyond what was asked for, which would pass for warm, or for read at no rate at all."""
    path, advise = cold_file(disk), os.posix_fadvise

    def some(descriptor: int, offset: int, length: int, advice: int) -> None:
        if advice != os.POSIX_FADV_WILLNEED:
            advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", some)
    if work == "hash":
        hash_file(str(path), digest_of(b""), threading.Event())
        assert warm_share(path) < 0.01
    else:
        assert pagecache.warm(str(path), 0, MIB, memoryview(bytearray(64 << 10))) == MIB
        assert sum(pages(path)) == MIB // PAGE


def test_the_next_block_is_asked_for_while_one_is_hashed(disk: Path) -> None:
    """Otherwise the disk would rest while the processor works, and the other way round."""
    path = cold_file(disk)
    with path.open("rb") as file:
        blocks = pagecache.read_through(file.fileno(), memoryview(bytearray(BLOCK_BYTES)))
        next(blocks)
        deadline = time.monotonic() + 20
        second = slice(BLOCK_BYTES // PAGE, 2 * BLOCK_BYTES // PAGE)
        while not all(pages(path)[second]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sum(pages(path)) <= 2 * BLOCK_BYTES // PAGE
        blocks.close()
    assert warm_share(path) < 0.01


# Warming


class Warming:
    """A prewarmer over real files and real threads."""

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.section = CacheSection(prewarm_rate=0)
        self.available = PLENTY
        self.warmer = Prewarmer(pools, lambda: self.section, lambda: self.available)

    def rate(self, text: str) -> None:
        self.section = CacheSection(prewarm_rate=text)  # type: ignore[arg-type] # as it is written in the file

    def ask(self, *paths: Path, number: int = 0) -> None:
        snapshot = SnapshotId(SNAPSHOT.repo_id, Commit(f"{number:040d}"))
        self.warmer.ask(snapshot, tuple(map(str, paths)))

    async def ends(self) -> None:
        async with asyncio.timeout(30):
            while (task := self.warmer._task) is not None:
                await task


@pytest.fixture
async def warming() -> AsyncIterator[Warming]:
    pools = Pools.start(1)
    it = Warming(pools)
    yield it
    await it.warmer.stop()
    pools.stop()


async def test_cold_files_are_read_ahead_and_warm_ones_are_not(disk: Path, warming: Warming) -> None:
    first, second = cold_file(disk, name="first"), cold_file(disk, name="second")
    touch(second, 0, 4 * MIB)
    with capture_logs() as logs:
        warming.ask(first, second)
        await warming.ends()
        warming.ask(first, second)
        await warming.ends()
    assert warm_share(first, second) == 1
    done, nothing = (line for line in logs if line["event"] == "prewarmed")
    assert done["total_bytes"] == 2 * SIZE
    assert done["read_bytes"] + done["resident_bytes"] == 2 * SIZE
    assert 4 * MIB <= done["resident_bytes"] < 5 * MIB
    assert (nothing["read_bytes"], nothing["resident_bytes"]) == (0, 2 * SIZE)


async def test_reading_ahead_keeps_to_its_rate_and_can_be_hurried(disk: Path, warming: Warming) -> None:
    size = 4 * STEP_BYTES
    path = cold_file(disk, size)
    warming.rate("16MiB")
    began = time.monotonic()
    warming.ask(path)
    await warming.ends()
    assert time.monotonic() - began >= 0.9 * size / (16 * MIB)
    make_cold(path)
    warming.rate("1TB")
    began = time.monotonic()
    warming.ask(path)
    await warming.ends()
    assert warm_share(path) == 1


async def test_one_at_a_time_and_the_same_once(disk: Path, warming: Warming) -> None:
    first, second = (cold_file(disk, 2 * STEP_BYTES, name) for name in ("first", "second"))
    with capture_logs() as logs:
        for _ in range(3):
            warming.ask(first, number=1)
            warming.ask(second, number=2)
        await asyncio.sleep(0)  # the first is begun
        warming.ask(first, number=1)
        warm_while_the_other_is_read = []
        while warming.warmer._task is not None:
            await asyncio.sleep(0)
            if warm_share(first) < 1:
                warm_while_the_other_is_read.append(warm_share(second))
    assert max(warm_while_the_other_is_read) == 0
    assert len([line for line in logs if line["event"] == "prewarmed"]) == 2


async def test_not_where_memory_does_not_allow_it(disk: Path, warming: Warming) -> None:
    path = cold_file(disk)
    warming.available = SIZE
    with capture_logs() as logs:
        warming.ask(path)
        await warming.ends()
    assert warm_share(path) == 0
    (line,) = logs
    assert (line["event"], line["read_bytes"]) == ("not prewarmed", 0)
    assert line["why"] == f"{SIZE} bytes are not in the page cache, and {SIZE} bytes of memory are available"


async def test_it_ends_when_others_take_the_memory(disk: Path, warming: Warming) -> None:
    path = cold_file(disk, 4 * STEP_BYTES)
    looks = iter([PLENTY, PLENTY])
    warming.warmer._available_bytes = lambda: next(looks, 0)
    with capture_logs() as logs:
        warming.ask(path)
        await warming.ends()
    assert logs[-1]["read_bytes"] == 2 * STEP_BYTES
    assert 0.5 <= warm_share(path) < 0.75


async def test_the_daemons_end_ends_it(disk: Path, warming: Warming) -> None:
    path, later = cold_file(disk, 2 * STEP_BYTES), cold_file(disk, name="later")
    warming.rate("1MB")
    warming.ask(path, number=1)
    warming.ask(later, number=2)
    async with asyncio.timeout(30):
        while warm_share(path) == 0:  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)
        warming.pools.stopping.set()
        await warming.warmer.stop()
    warming.ask(later, number=3)
    assert warming.warmer._task is None
    assert warm_share(path) < 0.6
    assert warm_share(later) == 0


async def test_a_file_that_is_evicted_meanwhile_is_no_error(disk: Path, warming: Warming) -> None:
    there = cold_file(disk)
    with capture_logs() as logs:
        warming.ask(disk / "gone", number=1)
        warming.ask(there, number=2)
        await warming.ends()
    assert [line["event"] for line in logs] == ["prewarming ended early", "prewarmed"]
    assert warm_share(there) == 1


# Memory


def memory_tree(root: Path, group: str, limits: dict[str, tuple[str, int] | tuple[str, int, int]]) -> tuple[str, str]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable:     500 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(f"3:cpu:/elsewhere\n0::{group}\n")
    for name, (most, current, *idle) in limits.items():
        directory = root / "cgroup" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{most}\n")
        (directory / "memory.current").write_text(f"{current}\n")
        (directory / "memory.stat").write_text(f"anon 7\nactive_file 7\ninactive_file {sum(idle)}\n")
    return str(root / "proc"), str(root / "cgroup")


@pytest.mark.parametrize(
    ("group", "limits", "left"),
    [
        ("/", {}, 512_000),
        ("/pod/daemon", {}, 512_000),
        ("/pod/daemon", {"pod/daemon": ("max", 10**9)}, 512_000),
        ("/pod/daemon", {"pod/daemon": ("300000", 100_000)}, 200_000),
        ("/pod/daemon", {"pod/daemon": ("300000", 290_000, 40_000)}, 50_000),  # cached pages that may go
        ("/pod/daemon", {"pod/daemon": ("max", 100_000), "pod": ("150000", 100_000)}, 50_000),
        ("/", {"": ("400000", 300_000)}, 100_000),  # seen from within a group's own namespace
        ("/pod/daemon", {"pod/daemon": ("100000", 100_001)}, 0),
        ("/pod/daemon", {"pod/daemon": ("99000000", 0), "pod/other": ("1", 1)}, 512_000),
    ],
)
def test_memory_is_the_machines_or_what_our_own_groups_have_left(
    tmp_path: Path, group: str, limits: dict[str, tuple[str, int] | tuple[str, int, int]], left: int
) -> None:
    assert available_bytes(*memory_tree(tmp_path, group, limits)) == left


def test_this_machine_tells_how_much_memory_there_is() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * PAGE

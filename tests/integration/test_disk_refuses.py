"""A disk that refuses: what was there stays known and served, nothing is lost, and all goes on when it takes again."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2, common_pb2
from modelcached.config import load
from modelcached.daemon import Daemon
from modelcached.model import RepoId
from modelcached.store.disk import Disk
from modelcached.store.index import SnapshotState

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node, reference

SIZE = 8 * MIB
SECONDS = 30.0
HIT = common_pb2.OUTCOME_HIT


class Refusing:
    """The disk's seam: refuses what ``refuses`` says, with that errno; and keeps what was done, in order."""

    def __init__(self) -> None:
        self.refuses: Callable[[str, str], int] = lambda _operation, _path: 0
        self.steps: list[tuple[str, str]] = []

    def __call__(self, operation: str, path: str) -> None:
        self.steps.append((operation, path))
        if code := self.refuses(operation, path):
            raise OSError(code, os.strerror(code), path)

    def nothing(self) -> None:
        self.refuses = lambda _operation, _path: 0


class Inside:
    """A daemon in this process over a disk that can refuse."""

    def __init__(self, node: Node, hub: Hub) -> None:
        self.node, self.hub, self.disk = node, hub, Refusing()
        node.write_config()
        self.daemon = Daemon(load(node.config_file), Disk(self.disk))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Inside]:
        await self.daemon.start()
        try:
            yield self
        finally:
            self.disk.nothing()
            await self.daemon.stop()

    async def ensure(self, name: str, profile: str = "") -> cache_pb2.Ready:
        def asked() -> cache_pb2.Ready:
            with self.node.client() as client:
                *_, last = client.ensure(reference(f"org/{name}", profile=profile))
            assert isinstance(last, cache_pb2.Ready)
            return last

        return await asyncio.to_thread(asked)

    async def refused(self, name: str, profile: str = "") -> ModelCacheError:
        with pytest.raises(ModelCacheError) as caught:
            await self.ensure(name, profile)
        return caught.value

    async def release(self) -> None:
        await asyncio.to_thread(self.node.release_all)

    async def cached(self) -> set[str]:
        return {model["repo_id"].removeprefix("org/") for model in await asyncio.to_thread(self.node.ctl, "ls")}

    async def true(self) -> None:
        await asyncio.to_thread(self.node.assert_disk_truth)
        for private in ("staging", "trash"):
            assert os.listdir(self.node.private / private) == []


def publish(hub: Hub, *names: str, size: int = SIZE) -> None:
    for number, name in enumerate(names):
        weights = Synthetic(size, 1000 + number)
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": weights})


@pytest.fixture
def inside(hub: Hub, make_node: Callable[..., Node]) -> Inside:
    """Room for two models."""
    return Inside(make_node(cache={"budget": f"{2 * SIZE + 7 * MIB}B"}), hub)


async def test_a_disk_that_takes_no_changes_condemns_no_model(inside: Inside, hub: Hub) -> None:
    publish(hub, "one", "two", "new")
    async with inside.serving():
        for name in ("one", "two"):
            await inside.ensure(name)
        await inside.release()
        hub.reset_counters()
        inside.disk.steps.clear()
        inside.disk.refuses = lambda _operation, _path: errno.EROFS
        error = await inside.refused("new")
        assert (error.reason, error.exit_status) == ("STORAGE_ERROR", 74)
        assert "Read-only file system" in error.message
        inside.disk.nothing()
        tried = [path for operation, path in inside.disk.steps if operation == "unlink" and "/refs/" in path]
        assert len(tried) == 1, "it did not fail at each model in turn"
        assert await inside.cached() == {"one", "two"}
        for name in ("one", "two"):
            assert (await inside.ensure(name)).models[0].outcome == HIT
        assert hub.request_count(kind="cdn") == 0
        await inside.release()
        inside.daemon.core.unremovable.clear()  # a minute later
        await inside.ensure("new")
        assert await inside.cached() == {"two", "new"}
        assert not [topic for topic in inside.daemon.core.degraded if topic == "eviction"]
        await inside.true()


async def test_one_model_that_cannot_go_does_not_keep_the_others(inside: Inside, hub: Hub) -> None:
    publish(hub, "stuck", "other", "new")
    async with inside.serving():
        for name in ("stuck", "other"):
            await inside.ensure(name)
        await inside.release()
        commit = inside.node.visible("org/stuck")[0]
        inside.disk.refuses = lambda operation, path: errno.EPERM * (operation == "rename" and commit in path)
        await inside.ensure("new")
        assert await inside.cached() == {"stuck", "new"}
        assert any("could not be removed" in text for text in inside.daemon.core.degraded.values())
        assert (await inside.ensure("stuck")).models[0].outcome == HIT
        inside.disk.nothing()
        await inside.release()
        done = await asyncio.to_thread(inside.node.run, "cachectl", "evict", "org/stuck", "--yes")
        assert done.returncode == 0, "a person may try at once"
        assert not [topic for topic in inside.daemon.core.degraded if topic == "eviction"]
        await inside.true()


async def test_a_blob_that_cannot_be_unlinked_is_counted_and_goes_later(inside: Inside, hub: Hub) -> None:
    publish(hub, "one", "new")
    async with inside.serving():
        await inside.ensure("one")
        await inside.release()
        inside.disk.refuses = lambda operation, path: errno.EIO * (operation == "unlink" and "/blobs/" in path)
        done = await asyncio.to_thread(inside.node.run, "cachectl", "evict", "org/one", "--yes")
        assert done.returncode == 74
        inside.disk.nothing()
        assert await inside.cached() == set()
        assert inside.node.visible("org/one") == []
        await asyncio.to_thread(inside.node.assert_disk_truth)
        assert inside.node.du() > SIZE
        hub.reset_counters()
        await inside.ensure("one")
        assert hub.request_count(kind="cdn") == 0, "its bytes were still there, and right"
        await inside.release()
        inside.disk.refuses = lambda operation, path: errno.EIO * (operation == "unlink" and "/blobs/" in path)
        await asyncio.to_thread(inside.node.run, "cachectl", "evict", "org/one", "--yes")
        inside.disk.nothing()
        publish(hub, "large", size=2 * SIZE)
        await inside.ensure("large")
        await inside.true()


@pytest.mark.parametrize("step", ["append", "fsync", "rename"])
async def test_a_record_that_cannot_be_written_costs_no_blob(inside: Inside, hub: Hub, step: str) -> None:
    """The snapshot is visible by then: its blobs are nobody's orphans."""
    publish(hub, "one", "big")
    async with inside.serving():
        inside.disk.refuses = lambda operation, path: (
            errno.EIO * (operation == step and ("manifests/" in path or path.endswith("-manifest")))
        )
        error = await inside.refused("one")
        assert error.reason == "STORAGE_ERROR"
        inside.disk.nothing()
        assert len(inside.node.visible("org/one")) == 1
        await inside.true()
        await asyncio.to_thread(inside.node.ctl, "pin", f"org/one@{inside.node.visible('org/one')[0]}")
        publish(hub, "large", size=2 * SIZE)
        await inside.refused("large")  # which looks for all that could go
        snapshot = inside.node.snapshot("org/one", inside.node.visible("org/one")[0])
        assert (snapshot / "model.safetensors").stat().st_size == SIZE
        hub.reset_counters()
        assert (await inside.ensure("one")).models[0].path
        assert hub.request_count(kind="cdn") == 0
        assert (await inside.ensure("one")).models[0].outcome == HIT
        await inside.true()


async def test_files_that_a_snapshot_gained_are_not_lost_with_its_record(inside: Inside, hub: Hub) -> None:
    publish(hub, "one")
    hub.find_repo("org/one").commit({"notes.bin": Synthetic(2 * MIB, 7)}, base="main")
    async with inside.serving():
        await inside.ensure("one")
        inside.disk.refuses = lambda operation, path: (
            errno.ENOSPC * (operation == "append" and path.endswith("-manifest"))
        )
        assert (await inside.refused("one", "full")).reason == "NO_SPACE_NOW"
        inside.disk.nothing()
        assert (await inside.ensure("one")).models[0].outcome == HIT, "what it had before is served as before"
        publish(hub, "large", size=2 * SIZE)
        await inside.refused("large")
        snapshot = inside.node.snapshot("org/one", inside.node.visible("org/one")[0])
        assert (snapshot / "notes.bin").stat().st_size == 2 * MIB
        await inside.ensure("one", "full")
        await inside.true()


async def test_a_lease_that_could_not_be_written_is_none(
    inside: Inside, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "one")
    async with inside.serving():
        await inside.ensure("one")
        await inside.release()
        database = inside.daemon.database
        write = database.write

        async def refuse(*_statements: object) -> None:
            raise sqlite3.OperationalError("attempt to write a readonly database")

        monkeypatch.setattr(database, "write", refuse)
        inside.disk.refuses = lambda _operation, _path: errno.EROFS  # the ballast cannot be given up either
        error = await inside.refused("one")
        assert (error.reason, error.exit_status) == ("STORAGE_ERROR", 74)
        assert "readonly database" in error.message
        assert inside.daemon.core.use.leases == {}
        assert "state.db" in inside.daemon.core.degraded
        pinned = await asyncio.to_thread(inside.node.run, "cachectl", "pin", "org/one")
        assert pinned.returncode == 74
        assert inside.daemon.core.use.pins == set()
        monkeypatch.setattr(database, "write", write)
        inside.disk.nothing()
        await asyncio.to_thread(inside.node.ctl, "pin", "org/one")
        monkeypatch.setattr(database, "write", refuse)
        unpinned = await asyncio.to_thread(inside.node.run, "cachectl", "unpin", "org/one")
        assert unpinned.returncode == 74
        assert len(inside.daemon.core.use.pins) == 1
        monkeypatch.setattr(database, "write", write)
        assert (await inside.ensure("one")).models[0].outcome == HIT
        assert "state.db" not in inside.daemon.core.degraded


async def test_a_lease_that_was_there_survives_a_renewal_that_failed(
    inside: Inside, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "one")
    (inside.node.pods_dir / "uid-1").mkdir()

    def as_pod() -> None:
        with inside.node.client() as client:
            list(client.ensure(reference("org/one"), lease=cache_pb2.LeaseRequest(pod_uid="uid-1")))

    async with inside.serving():
        await asyncio.to_thread(as_pod)
        (before,) = inside.daemon.core.use.leases

        async def refuse(*_statements: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patched:
            patched.setattr(inside.daemon.database, "write", refuse)
            with pytest.raises(ModelCacheError, match="disk I/O error"):
                await asyncio.to_thread(as_pod)
        assert list(inside.daemon.core.use.leases) == [before]


@pytest.mark.parametrize("step", ["append", "symlink"])
async def test_a_transfer_that_meets_a_full_disk_goes_on_once_others_have_gone(
    inside: Inside, hub: Hub, step: str
) -> None:
    """Others have filled it: the account knows of no shortage, and only a try shows that there is room again."""
    publish(hub, "old", "new")
    async with inside.serving():
        await inside.ensure("old")
        await inside.release()

        def full(operation: str, path: str) -> int:
            ours = path.endswith(".journal") or "/staging/" in path
            return errno.ENOSPC * (operation == step and ours and bool(inside.node.visible("org/old")))

        inside.disk.refuses = full
        await inside.ensure("new")
        inside.disk.nothing()
        assert await inside.cached() == {"new"}
        await inside.true()


async def test_a_disk_that_stays_full_is_named_and_costs_no_more_than_what_may_go(inside: Inside, hub: Hub) -> None:
    publish(hub, "kept", "free", "new")
    async with inside.serving():
        await inside.ensure("free")
        await inside.release()
        await inside.ensure("kept")
        inside.disk.refuses = lambda operation, path: errno.ENOSPC * (operation == "allocate")
        error = await inside.refused("new")
        assert (error.reason, error.exit_status) == ("NO_SPACE_NOW", 75)
        assert "is full" in error.message
        inside.disk.nothing()
        assert await inside.cached() == {"kept"}
        await inside.true()


async def test_what_cannot_be_had_in_any_way_costs_others_no_progress(inside: Inside, hub: Hub) -> None:
    publish(hub, "leased", "begun")
    async with inside.serving():
        hub.rate = 4 * MIB
        begun = inside.node.popen("ensure-model", "org/begun")
        part = Path(inside.node.private, "partial")

        def half() -> bool:
            return hub.body_bytes("org/begun", "model.safetensors") > SIZE // 2

        await asyncio.to_thread(inside.node.wait_until, half, SECONDS, "half of it has come")
        begun.terminate()
        await asyncio.to_thread(begun.communicate)
        await asyncio.to_thread(inside.node.ctl, "cancel", "org/begun")
        hub.rate = None
        await inside.ensure("leased")
        kept = sorted(os.listdir(part))
        assert len(kept) == 2
        publish(hub, "large", size=2 * SIZE)
        error = await inside.refused("large")
        assert error.reason == "NO_SPACE_NOW"
        assert sorted(os.listdir(part)) == kept
        await inside.release()
        await inside.ensure("large")
        assert os.listdir(part) == [], "where it is enough it goes"
        await inside.true()


async def test_what_was_promised_is_counted_before_the_promise_ends(
    inside: Inside, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{n:03}.json": f"{n}".encode() for n in range(200)}
    hub.create_repo("org/many").commit({"config.json": b"{}", **files})
    async with inside.serving():
        core, space = inside.daemon.core, inside.daemon.core.space
        measure_after, least = core.measure_after, []

        async def watched(*repos: RepoId) -> None:
            before = space.used_bytes + space.reserved_bytes
            await measure_after(*repos)
            least.append((before, space.used_bytes))

        monkeypatch.setattr(type(core), "measure_after", lambda _self, *repos: watched(*repos))
        await inside.ensure("many", "full")
        assert least
        assert all(before >= after for before, after in least), "used and promised together never say less than is used"


async def test_what_two_evictions_at_once_free_is_counted_once(inside: Inside, hub: Hub) -> None:
    publish(hub, "one")
    repo = hub.find_repo("org/one")
    older = repo.resolve("main").sha
    repo.commit({"model.safetensors": Synthetic(SIZE // 2, 3)}, base="main", branch="main")
    async with inside.serving():
        with inside.node.client() as client:
            await asyncio.to_thread(lambda: list(client.ensure(reference("org/one", older))))
        await inside.ensure("one")
        await inside.release()
        space = inside.daemon.core.space
        own = space.used_bytes - space.area_bytes("private")  # state.db grows by its own rules
        inside.disk.steps.clear()
        with inside.node.admin() as admin:
            gone = await asyncio.to_thread(admin.evict, [reference("org/one", "")], dry_run=False)
        assert len(gone.models) == 2
        assert gone.bytes_freed == own - space.used_bytes + space.area_bytes("private") > SIZE
        value = inside.daemon.metrics.registry.get_sample_value
        evicted = await asyncio.to_thread(value, "modelcached_evicted_bytes_total", {"reason": "operator"})
        assert evicted == gone.bytes_freed
        withdrawn = [n for n, (step, path) in enumerate(inside.disk.steps) if step == "rename" and "/trash/" in path]
        cleaned = [n for n, (step, path) in enumerate(inside.disk.steps) if step == "unlink" and "/manifests/" in path]
        assert withdrawn[0] < cleaned[0] < withdrawn[1] < cleaned[1], "one repository, one removal at a time"
        await inside.true()


async def test_what_two_have_stays_with_the_one_that_could_not_go(inside: Inside, hub: Hub) -> None:
    publish(hub, "one")
    repo = hub.find_repo("org/one")
    older = repo.resolve("main").sha
    newer = repo.commit({"notes.json": b"{}"}, base="main", branch="main")
    async with inside.serving():
        with inside.node.client() as client:
            for commit in (older, newer):
                await asyncio.to_thread(lambda commit=commit: list(client.ensure(reference("org/one", commit))))
        await inside.release()
        inside.disk.refuses = lambda operation, path: errno.EPERM * (operation == "rename" and f"-{older}" in path)
        with inside.node.admin() as admin, pytest.raises(ModelCacheError, match="could not be removed"):
            await asyncio.to_thread(admin.evict, [reference("org/one", "")], dry_run=False)
        inside.disk.nothing()
        assert inside.node.visible("org/one") == [older]
        hub.reset_counters()
        with inside.node.client() as client:
            *_, ready = await asyncio.to_thread(lambda: list(client.ensure(reference("org/one", older))))
        assert ready.models[0].outcome == HIT
        assert hub.request_count(kind="cdn") == 0
        await inside.true()


async def test_a_blob_without_a_snapshot_is_not_removed_from_under_a_new_request(inside: Inside, hub: Hub) -> None:
    publish(hub, "one")
    publish(hub, "large", size=2 * SIZE)
    removing, go_on = threading.Event(), threading.Event()
    async with inside.serving():
        await inside.ensure("one")
        await inside.release()
        inside.disk.refuses = lambda operation, path: errno.EIO * (operation == "unlink" and "/blobs/" in path)
        await asyncio.to_thread(inside.node.run, "cachectl", "evict", "org/one", "--yes")

        def wait(operation: str, path: str) -> int:
            if operation == "unlink" and "models--org--one/blobs/" in path:
                removing.set()
                assert go_on.wait(SECONDS)
            return 0

        inside.disk.refuses = wait
        try:
            large = asyncio.create_task(inside.ensure("large"))
            assert await asyncio.to_thread(removing.wait, SECONDS)
            again = asyncio.create_task(inside.ensure("one"))
            await asyncio.sleep(0.3)
            assert not again.done(), "what it would find is going"
        finally:
            go_on.set()
        await again
        await asyncio.wait({large})
        snapshot = inside.node.snapshot("org/one", inside.node.visible("org/one")[0])
        assert (snapshot / "model.safetensors").stat().st_size == SIZE
        await inside.true()


async def test_a_bad_inode_is_bad_under_each_of_its_names(inside: Inside, hub: Hub) -> None:
    weights = Synthetic(SIZE, 5)
    for name in ("one", "two"):
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": weights})
    node = inside.node
    names = [node.hub_dir / f"models--org--{name}/blobs/{weights.sha256()}" for name in ("one", "two")]
    async with inside.serving():
        for name in ("one", "two"):
            await inside.ensure(name)
        assert names[0].samefile(names[1])
        status = names[0].stat()
        descriptor = os.open(names[0], os.O_WRONLY)
        os.pwrite(descriptor, b"rotten", SIZE // 2)
        os.close(descriptor)
        index = inside.daemon.core.index
        os.utime(names[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # one that can be seen
        hub.reset_counters()
        await inside.ensure("one")
        assert hub.body_bytes("org/one", "model.safetensors") == SIZE
        two = index.repos[RepoId("org/two")]
        assert [blob.verified for digest, blob in two.blobs.items() if digest.hex == weights.sha256()] == [False]
    # A record that was written before the bits went bad believes in them no more.
    os.utime(names[1], ns=(status.st_atime_ns, os.stat(names[1]).st_mtime_ns))
    await asyncio.to_thread(node.start)
    with node.client() as client:
        *_, ready = await asyncio.to_thread(lambda: list(client.ensure(reference("org/two"))))
    assert ready.models[0].bytes_linked == SIZE, "the bad one is gone, and what was fetched for the other is shared"
    assert names[1].read_bytes() == b"".join(weights.blocks())


async def test_a_failed_look_at_the_disk_is_no_empty_directory(
    inside: Inside, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "one")
    scandir = os.scandir
    async with inside.serving():
        await inside.ensure("one")
        used = inside.daemon.core.space.used_bytes

        def fails(path: str) -> object:
            if str(path).endswith("models--org--one/blobs"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return scandir(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", fails)
            await inside.daemon.core.measure("models--org--one")
            assert inside.daemon.core.space.used_bytes == used
            assert any("Input/output error" in text for text in (await asyncio.to_thread(inside.node.status)).degraded)
        await inside.daemon.core.measure("models--org--one")
        assert not inside.daemon.core.degraded
        assert inside.daemon.core.index.repos[RepoId("org/one")].snapshots.popitem()[1].state is SnapshotState.READY

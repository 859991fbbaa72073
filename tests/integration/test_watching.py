"""Somebody else in hub/: the index follows within 10 s, by events or without; the daemon's own doings count as
nobody's; and a hub/ that is not the one that pods have mounted is served from no more."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from modelcached.config import load
from modelcached.daemon import Daemon
from modelcached.store.disk import Disk
from watchdog.observers.inotify_c import InotifyEvent, InotifyFD

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import sharded_llama, tiny_llama
from tests.node import Node
from tests.node.asking import ask
from tests.node.library import fill

SECONDS = 10
"""Within which the index follows the disk."""
POD = "11111111-2222-3333-4444-555555555555"

NO_INOTIFY = ["unshare", "--user", "--map-root-user", "sh", "-c",
              'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"', "no-inotify"]  # fmt: skip
FEW_WATCHES = ["unshare", "--user", "--map-root-user", "sh", "-c",
               'echo 2 > /proc/sys/user/max_inotify_watches && exec "$@"', "few-watches"]  # fmt: skip
OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]

WAYS = pytest.mark.parametrize(
    ("wrapper", "polls"),
    [([], ""), (NO_INOTIFY, "instance limit reached"), (FEW_WATCHES, "watch limit reached")],
    ids=["events", "no inotify instance", "too few watches"],
)


def folder(node: Node, repo_id: str) -> Path:
    return node.hub_dir / f"models--{repo_id.replace('/', '--')}"


def drifts(node: Node) -> dict[str, int]:
    """What the daemon has logged, which must be what it has counted."""
    logged: dict[str, int] = {}

    def counted_as_logged() -> bool:
        logged.clear()
        for line in node.log_lines("drift"):
            logged[line["kind"]] = logged.get(line["kind"], 0) + line["count"]
        return all(node.metric("modelcached_drift_total", kind=kind) == count for kind, count in logged.items())

    # The two cannot be read in one moment: another may come between.
    node.wait_until(counted_as_logged, SECONDS, "the drift that is logged is counted")
    return logged


def states(node: Node) -> dict[str, str]:
    return {name: model["state"] for name, model in node.models().items()}


def follows(node: Node, condition: Callable[[], object], what: str) -> None:
    """Within the promised time, and then I8."""
    began = time.monotonic()
    node.wait_until(condition, SECONDS, what)
    node.wait_until(
        lambda: int(node.status().used_bytes) == node.du(), SECONDS - (time.monotonic() - began), f"{what}: counted"
    )


def all_of_it_is_found(node: Node, model: Mapping[str, object]) -> None:
    """A look may come while it is being downloaded: the next finds the rest."""
    blobs = len(set(model.values()))
    follows(node, lambda: node.metric("modelcached_drift_total", kind="blob_found") == blobs, "all of it")


def ready_node(make_node: Callable[..., Node], wrapper: list[str], polls: str, **settings: Any) -> Node:
    """A node that serves, and knows how it watches."""
    node = make_node(**settings)
    node.wrapper = wrapper
    node.start()
    if polls:
        node.wait_until(lambda: node.log_lines("hub/ cannot be watched, polling it"), SECONDS, "it says that it polls")
        (told,) = node.log_lines("hub/ cannot be watched, polling it")
        assert polls in told["why"]
    return node


@WAYS
def test_what_somebody_removes_is_believed_no_more(
    hub: Hub, make_node: Callable[..., Node], wrapper: list[str], polls: str
) -> None:
    names = ("whole", "blob", "snapshot", "ref")
    model = {f"org/{name}": tiny_llama(seed=number) for number, name in enumerate(names)}
    commits = {repo_id: hub.create_repo(repo_id).commit(files) for repo_id, files in model.items()}
    node = ready_node(make_node, wrapper, polls)
    for repo_id in model:
        node.ensure(repo_id)
    blob = (node.snapshot("org/blob", commits["org/blob"]) / "model.safetensors").resolve()
    gone = {
        "org/whole": lambda: shutil.rmtree(folder(node, "org/whole")),
        "org/blob": blob.unlink,
        "org/snapshot": lambda: shutil.rmtree(node.snapshot("org/snapshot", commits["org/snapshot"])),
        "org/ref": (folder(node, "org/ref") / "refs" / "main").unlink,
    }
    blobs = len(os.listdir(folder(node, "org/whole") / "blobs"))
    for remove in gone.values():
        remove()
    left = {f"org/blob@{commits['org/blob']}": "unverified", f"org/ref@{commits['org/ref']}": "ready"}
    follows(node, lambda: states(node) == left, "what was removed")
    node.wait_until(lambda: drifts(node).get("ref_gone") == 2, SECONDS, "both refs")
    assert node.models()[f"org/ref@{commits['org/ref']}"]["revisions"] == []
    assert drifts(node) == {"blob_gone": blobs + 1, "snapshot_gone": 2, "ref_gone": 2}
    hub.reset_counters()
    for repo_id, files in model.items():
        (ready,) = node.ensure(repo_id)
        for path in Path(ready["path"]).iterdir():
            assert path.read_bytes() == files[path.name]
    assert hub.body_bytes("org/blob", "model.safetensors") == len(model["org/blob"]["model.safetensors"])
    assert hub.body_bytes("org/snapshot", "model.safetensors") == hub.body_bytes("org/ref", "model.safetensors") == 0
    node.assert_disk_truth()


@WAYS
def test_what_somebody_downloads_is_listed_and_hashed_before_it_is_served(
    hub: Hub, make_node: Callable[..., Node], wrapper: list[str], polls: str
) -> None:
    model = sharded_llama()
    commit = hub.create_repo("org/theirs").commit(model)
    node = ready_node(make_node, wrapper, polls)
    fill(hub, node, "org/theirs")
    name = f"org/theirs@{commit}"
    follows(node, lambda: states(node) == {name: "unverified"}, "their download")
    all_of_it_is_found(node, model)
    assert node.models()[name]["revisions"] == ["main"]
    assert drifts(node)["snapshot_found"] == drifts(node)["ref_found"] == 1
    hub.reset_counters()
    (ready,) = node.ensure("org/theirs", "--profile", "full")
    assert (ready["outcome"], ready["bytes_fetched"]) == ("hit", 0)
    assert states(node) == {name: "ready"}
    node.assert_disk_truth()


def test_a_download_into_the_librarys_shared_store_is_found(hub: Hub, node: Node) -> None:
    model = tiny_llama()
    commit = hub.create_repo("org/theirs").commit(model, xet=True)
    fill(hub, node, "org/theirs", shared=True)
    follows(node, lambda: states(node) == {f"org/theirs@{commit}": "unverified"}, "their download")
    all_of_it_is_found(node, model)
    (ready,) = node.ensure("org/theirs")
    assert ready["bytes_fetched"] == 0
    node.assert_disk_truth()


@WAYS
@pytest.mark.parametrize("where", [".", "models--org--own", "models--org--own/blobs"])
def test_a_strangers_file_is_counted(
    hub: Hub, make_node: Callable[..., Node], wrapper: list[str], polls: str, where: str
) -> None:
    hub.create_repo("org/own").commit(tiny_llama())
    node = ready_node(make_node, wrapper, polls)
    node.ensure("org/own")
    node.assert_disk_truth()
    stranger = node.hub_dir / where / "stranger.bin"
    for change in (lambda: stranger.write_bytes(b"x" * 3 * MIB), stranger.unlink):
        change()
        follows(node, lambda: int(node.status().used_bytes) == node.du(), "the stranger's file")
    assert drifts(node) == {}


def test_what_was_put_away_and_comes_back_is_whole_again(hub: Hub, node: Node) -> None:
    """A repository that is renamed and back, and a blob that is replaced by the same inode, cost no byte."""
    commit = hub.create_repo("org/model").commit(tiny_llama())
    node.ensure("org/model")
    blob = (node.snapshot("org/model", commit) / "model.safetensors").resolve()
    away = node.root / "away"
    blob.rename(away)
    node.wait_until(lambda: set(states(node).values()) == {"unverified"}, SECONDS, "it is gone")
    away.rename(blob)
    node.wait_until(lambda: set(states(node).values()) == {"ready"}, SECONDS, "it is back")
    assert drifts(node) == {"blob_gone": 1, "blob_found": 1}
    hub.reset_counters()
    (ready,) = node.ensure("org/model")
    assert (ready["outcome"], hub.body_bytes("org/model", "model.safetensors")) == ("hit", 0)


def test_a_branch_that_somebody_moves_takes_its_lease_along(hub: Hub, make_node: Callable[..., Node]) -> None:
    """A lease by branch covers what the branch points to, whoever has pointed it there."""
    node = make_node().start()
    repo = hub.create_repo("org/model")
    old = repo.commit(tiny_llama(seed=1))
    new = repo.commit(tiny_llama(seed=2), branch="other")
    node.ensure("org/model", "--revision", new)
    node.release_all()
    node.ensure("org/model")
    assert not node.models()[f"org/model@{new}"]["leases"]
    (folder(node, "org/model") / "refs" / "main").write_text(new)
    node.wait_until(lambda: drifts(node) == {"ref_moved": 1}, SECONDS, "the ref has moved")
    listed = node.models()
    assert listed[f"org/model@{new}"]["revisions"] == ["main"]
    assert listed[f"org/model@{old}"]["leases"] == listed[f"org/model@{new}"]["leases"] != []


def churn(hub: Hub, node: Node) -> None:
    """All that the daemon does to hub/ by itself, more than once."""
    shared = Synthetic(3 * MIB, 77)
    for number in range(6):
        files = {"config.json": f"{number}".encode(), "model.safetensors": Synthetic(3 * MIB, number)}
        hub.create_repo(f"org/m{number}").commit({**files, "pytorch_model.bin": shared})
    for _ in range(3):
        for number in range(6):  # the budget holds about three of them: each brings an eviction
            node.ensure(f"org/m{number}")
            if number % 2:
                node.ensure(f"org/m{number}", "--profile", "full")  # growth, and a blob that is linked
            node.release_all()
    (before,) = node.ensure("org/m5")
    older = f"org/m5@{before['commit']}"
    node.ctl("pin", older)
    repo = hub.find_repo("org/m5")
    assert repo is not None
    repo.commit({"config.json": b"5, again", "model.safetensors": Synthetic(3 * MIB, 5)})
    node.ctl("pin", "org/m5")
    (after,) = node.ensure("org/m5")
    assert before["commit"] != after["commit"]
    node.release_all()
    node.ctl("unpin", "org/m5")
    node.ctl("evict", f"org/m5@{after['commit']}", "--yes")  # the branch goes back to the older one
    assert node.models()[older]["revisions"] == ["main"]
    node.ctl("unpin", older)
    node.ctl("evict", "org/m5", "--yes")


@pytest.mark.parametrize("wrapper", [[], NO_INOTIFY], ids=["events", "polling"])
def test_nothing_that_the_daemon_does_is_drift(hub: Hub, make_node: Callable[..., Node], wrapper: list[str]) -> None:
    """With a look at everything each second besides those that its own events bring."""
    node = make_node(
        cache={"budget": f"{24 * MIB}B", "rescan_interval": "1s", "high_watermark": "60%", "low_watermark": "40%"},
        hub={"resolve_ttl": "1ms"},
    )
    node.wrapper = wrapper
    node.start()
    churn(hub, node)
    assert len(node.log_lines("evicted")) > 5
    time.sleep(3)  # what the looks would still find
    assert drifts(node) == {}
    assert node.log_lines("upkeep failed, will try again") == []
    node.assert_disk_truth()


@asynccontextmanager
async def in_process(node: Node, disk: Disk | None = None) -> AsyncIterator[Daemon]:
    """The node's daemon in this process, where its eyes can be held."""
    node.write_config()
    daemon = Daemon(load(node.config_file), disk)
    await daemon.start()
    try:
        yield daemon
    finally:
        await daemon.stop()


async def shows(daemon: Daemon, *snapshots: str) -> None:
    """Exactly those are listed, within the promised time."""
    deadline = time.monotonic() + SECONDS
    while {f"{s.id.repo_id}@{s.id.commit}" for s in daemon.core.index.snapshots()} != set(snapshots):
        assert time.monotonic() < deadline, f"not within {SECONDS} s"
        await asyncio.sleep(0.05)


@contextmanager
def deaf(monkeypatch: pytest.MonkeyPatch, hears: Callable[[InotifyEvent], bool]) -> Iterator[list[InotifyEvent]]:
    """inotify whose events do not come, but those that ``hears`` lets through."""
    lost: list[InotifyEvent] = []
    handle = InotifyFD.handle_event

    def handle_some(self: InotifyFD, event: InotifyEvent) -> None:
        if hears(event):
            handle(self, event)
        else:
            lost.append(event)

    with monkeypatch.context() as patch:
        patch.setattr(InotifyFD, "handle_event", handle_some)
        yield lost


async def test_where_inotify_is_blind_times_are_polled(
    hub: Hub, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is changed before anybody knows that it is blind is found as well."""
    early, late = (hub.create_repo(f"org/{name}").commit(tiny_llama()) for name in ("early", "late"))
    node = make_node()
    with deaf(monkeypatch, lambda _event: False) as lost:
        async with in_process(node) as daemon:
            await asyncio.sleep(1.5)  # watches are set
            await asyncio.to_thread(fill, hub, node, "org/early")
            await shows(daemon, f"org/early@{early}")
            await asyncio.to_thread(fill, hub, node, "org/late")
            await shows(daemon, f"org/early@{early}", f"org/late@{late}")
            assert daemon.core.degraded == {}
    assert lost
    assert "no event of" in capfd.readouterr().out


async def test_a_filesystem_that_others_change_is_polled(
    hub: Hub, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """NFS tells of our own changes and not of others': the probe would prove nothing."""
    monkeypatch.setattr("modelcached.upkeep.hub_watch.remote_kind", lambda _path: "nfs4")
    commit = hub.create_repo("org/theirs").commit(tiny_llama())
    node = make_node()
    with deaf(monkeypatch, lambda _event: False) as lost:
        async with in_process(node) as daemon:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(fill, hub, node, "org/theirs")
            await shows(daemon, f"org/theirs@{commit}")
    assert lost == []
    assert "nfs4" in capfd.readouterr().out


async def test_what_inotify_dropped_is_found_by_the_next_look_at_everything(
    hub: Hub, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    commit = hub.create_repo("org/theirs").commit(tiny_llama())
    node = make_node()
    with deaf(monkeypatch, lambda event: event.name == b"probe") as lost:
        async with in_process(node) as daemon:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(fill, hub, node, "org/theirs")
            await asyncio.sleep(4)
            assert list(daemon.core.index.snapshots()) == [], "and by nothing else"
            node.settings["cache"]["rescan_interval"] = "1s"
            node.write_config()
            daemon.core.config = load(node.config_file)  # as a reload does, but for the logging of this process
            await shows(daemon, f"org/theirs@{commit}")
    assert lost
    assert "polling it" not in capfd.readouterr().out


async def test_when_the_queue_overflows_everything_is_looked_at(
    hub: Hub, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says that it has dropped events, and not which: ten minutes to the next look would be too long."""
    commit = hub.create_repo("org/theirs").commit(tiny_llama())
    node = make_node()
    with deaf(monkeypatch, lambda event: event.name == b"probe" or event.is_queue_overflow):
        async with in_process(node) as daemon:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(fill, hub, node, "org/theirs")
            directories = daemon.watch._directories
            assert directories is not None
            directories._fd.handle_event(InotifyEvent(-1, 0x4000, 0, b""))  # IN_Q_OVERFLOW
            await shows(daemon, f"org/theirs@{commit}")


def test_a_mount_in_hub_is_never_entered(hub: Hub, make_node: Callable[..., Node]) -> None:
    """Neither by a watch nor by a look: a strict atime would tell of a directory that was read. Nor is it counted."""
    hub.create_repo("org/own").commit(tiny_llama())
    node = make_node(cache={"rescan_interval": "1s"})
    node.wrapper = OWN_MOUNTS
    node.start()
    node.ensure("org/own")
    inside = ["nsenter", "--target", str(node.ps.pid), "--mount"]
    mounted = folder(node, "org/theirs")
    mounted.mkdir()
    source = node.root / "source"
    shutil.copytree(folder(node, "org/own"), source, symlinks=True)
    script = """
        mount -t tmpfs -o strictatime tmpfs "$1"
        cp -a "$2"/. "$1"
        mkdir "$3"
        mount --bind "$2" "$3"
        mount -o remount,bind,strictatime "$3"
        stat -c %x "$1" "$1/blobs" "$1/snapshots"
    """
    bound = folder(node, "org/bound")
    done = subprocess.run(
        [*inside, "sh", "-ec", script, "sh", str(mounted), str(source), str(bound)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rounds = node.metric("modelcached_upkeep_runs_total", loop="watch", outcome="ok")
    (folder(node, "org/own") / "stranger").write_bytes(b"x" * MIB)
    node.wait_until(
        lambda: node.metric("modelcached_upkeep_runs_total", loop="watch", outcome="ok") > rounds + 8, 20, "looks"
    )
    after = subprocess.run(
        [*inside, "stat", "-c", "%x", mounted, mounted / "blobs", mounted / "snapshots"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert after.stdout == done.stdout, "read by nobody"
    assert [name.partition("@")[0] for name in node.models()] == ["org/own"]
    assert drifts(node) == {}
    device = os.stat(node.cache_dir).st_dev
    watched = [
        line for path in Path(f"/proc/{node.ps.pid}/fdinfo").iterdir() for line in path.read_text().splitlines()
        if line.startswith("inotify")
    ]  # fmt: skip
    inodes = {int(field.removeprefix("ino:"), 16) for line in watched for field in line.split() if field[:4] == "ino:"}
    devices = {field for line in watched for field in line.split() if field.startswith("sdev:")}
    assert (folder(node, "org/own") / "blobs").stat().st_ino in inodes
    assert len(devices) <= 2, f"{devices}: of the cache, and of the configuration's file"
    assert not {path.stat().st_ino for path in (source, source / "blobs", source / "snapshots")} & inodes
    assert device == os.stat(source).st_dev
    own = subprocess.run(["du", "-sxB1", node.cache_dir], capture_output=True, text=True, check=True)
    node.wait_until(lambda: int(node.status().used_bytes) >= int(own.stdout.split()[0]) - MIB, SECONDS, "counted")
    assert int(node.status().used_bytes) < int(own.stdout.split()[0]) + MIB, "what is mounted is not the cache's"


def test_a_mount_that_is_there_at_start_is_left_alone(hub: Hub, make_node: Callable[..., Node]) -> None:
    hub.create_repo("org/own").commit(tiny_llama())
    node = make_node(cache={"rescan_interval": "1s"})
    node.start()
    node.ensure("org/own")
    node.terminate()
    used = node.du()
    mounted = folder(node, "org/theirs")
    mounted.mkdir()
    script = f"""
        mount -t tmpfs -o strictatime tmpfs {mounted}
        cp -a {folder(node, "org/own")}/. {mounted}
        head -c 20000000 /dev/zero > {mounted}/large
        stat -c %x {mounted} {mounted}/blobs > {node.root}/before
        exec "$@"
    """
    node.wrapper = [*OWN_MOUNTS, "sh", "-ec", script, "sh"]
    node.start()
    assert str(mounted) in node.log_lines("recovered")[-1]["reported"]
    assert [name.partition("@")[0] for name in node.models()] == ["org/own"]
    rounds = node.metric("modelcached_upkeep_runs_total", loop="watch", outcome="ok")
    node.wait_until(
        lambda: node.metric("modelcached_upkeep_runs_total", loop="watch", outcome="ok") > rounds + 8, 20, "looks"
    )
    command = ["nsenter", "--target", str(node.ps.pid), "--mount", "stat", "-c", "%x", mounted, mounted / "blobs"]
    after = subprocess.run(command, capture_output=True, text=True, check=True)
    assert after.stdout == (node.root / "before").read_text(), "read by nobody"
    assert abs(int(node.status().used_bytes) - used) < MIB, "not the cache's"


@pytest.mark.parametrize(
    ("operation", "where"),
    [("fsync", "/blobs"), ("fsync", "/snapshots"), ("fsync", "/refs"), ("unlink", "/blobs/")],
    ids=["a blob is there", "a snapshot is there", "a ref is there", "an eviction has begun"],
)
async def test_what_is_half_done_is_no_drift(
    hub: Hub, make_node: Callable[..., Node], operation: str, where: str
) -> None:
    """The disk is ahead of belief for as long as an fsync takes; here that is longer than two looks do."""
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(3 * MIB, 1)})
    node = make_node(cache={"rescan_interval": "1s"})
    waits: list[str] = []

    def slow(done: str, path: str) -> None:
        parent, _, name = path.rpartition("/")
        at = f"/{name}" if done == "fsync" else f"/{parent.rpartition('/')[2]}/"
        if not waits and done == operation and at == where and path.startswith(str(node.hub_dir)):
            waits.append(path)
            time.sleep(5)  # in a thread of the disk

    async with in_process(node, Disk(slow)) as daemon:
        await asyncio.sleep(1)
        await asyncio.to_thread(node.ensure, "org/model")
        await asyncio.to_thread(node.release_all)
        if operation == "unlink":
            await asyncio.to_thread(node.ctl, "evict", "org/model", "--yes")
        await asyncio.sleep(3)  # the next looks
        assert len(waits) == 1
        families = await asyncio.to_thread(lambda: list(daemon.metrics.registry.collect()))
        counted = [sample for family in families if family.name == "modelcached_drift" for sample in family.samples]
    assert counted == []


# hub/ itself


def ensure_in_pod(node: Node, repo_id: str) -> dict[str, Any]:
    (node.pods_dir / POD).mkdir(exist_ok=True)
    return node.ensure(repo_id, env={"POD_UID": POD})[0]


def other_pod(node: Node) -> None:
    """So that the pods directory is never empty, which would prove nothing."""
    (node.pods_dir / "other").mkdir(exist_ok=True)


def trouble(node: Node) -> str:
    """What status says of hub/; empty where nothing is wrong."""
    return next((text for text in node.status().degraded if str(node.hub_dir) in text), "")


@contextmanager
def reader(node: Node) -> Iterator[int]:
    """A process that has hub/ mounted elsewhere, as a pod does; its pid."""
    point = node.root / "mounted"
    point.mkdir()
    script = 'mount --bind "$1" "$2" && echo ready && exec sleep 1000'
    command = [*OWN_MOUNTS, "sh", "-c", script, "sh", str(node.hub_dir), str(point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_another_hub_is_not_served_while_the_old_one_is_leased(
    hub: Hub, make_node: Callable[..., Node], restarted: bool
) -> None:
    """Who has it mounted is named; it ends when the pod has, and everything is as it is on the disk then."""
    commit = hub.create_repo("org/model").commit(tiny_llama())
    hub.create_repo("org/other").commit(tiny_llama(seed=5))
    node = make_node().start()
    other_pod(node)
    ensure_in_pod(node, "org/model")
    with reader(node) as pid:
        if restarted:
            node.terminate()
        node.hub_dir.rename(node.root / "old")
        if not restarted:
            node.hub_dir.mkdir()
        else:
            node.start()
        node.wait_until(lambda: trouble(node), SECONDS, "it says so")
        text = trouble(node)
        assert "is another directory than it was" in text
        assert POD in text
        assert f"org/model@{commit[:12]}" in text
        assert f"process {pid} (sleep) at {node.root / 'mounted'}" in text
        for repo_id in ("org/model", "org/other"):
            refused = ask(node, repo_id)
            assert (refused.exit_status, refused.reason) == (74, "STORAGE_ERROR")
            assert POD in refused.text
        assert os.listdir(node.hub_dir) == [], "nothing is made in it"
        assert node.run("cachectl", "evict", "org/model", "--yes").returncode != 0
        node.terminate()  # a restart changes nothing about it
        node.start()
        assert POD in trouble(node)
        assert ask(node, "org/other").exit_status == 74
    (node.pods_dir / POD).rmdir()
    node.wait_until(lambda: not trouble(node), 20, "the pod is gone, and its lease")
    node.wait_until(lambda: states(node) == {}, SECONDS, "the new one is empty")
    (ready,) = node.ensure("org/model")
    assert ready["outcome"] == "downloaded"
    node.assert_disk_truth()
    node.terminate()
    node.start()
    assert trouble(node) == ""
    assert node.ensure("org/model")[0]["outcome"] == "hit"


def test_a_cache_that_was_copied_elsewhere_is_served_there(hub: Hub, make_node: Callable[..., Node]) -> None:
    hub.create_repo("org/model").commit(tiny_llama())
    node = make_node().start()
    node.ensure("org/model")  # its lease by time lasts for a day, and came along
    node.terminate()
    elsewhere = node.root / "elsewhere"
    subprocess.run(["cp", "-a", str(node.cache_dir), str(elsewhere)], check=True)
    node.move_to(elsewhere)
    node.start()
    assert trouble(node) == ""
    (ready,) = node.ensure("org/model")
    assert ready["bytes_fetched"] == 0
    node.assert_disk_truth()


def test_a_hub_that_is_gone_is_not_made_anew_and_what_comes_back_is_served(hub: Hub, node: Node) -> None:
    hub.create_repo("org/model").commit(tiny_llama())
    hub.create_repo("org/other").commit(tiny_llama(seed=5))
    other_pod(node)
    ensure_in_pod(node, "org/model")
    node.hub_dir.rename(node.root / "old")
    node.wait_until(lambda: trouble(node), SECONDS, "it says so")
    assert "is missing" in trouble(node)
    assert POD in trouble(node)
    for repo_id in ("org/model", "org/other"):
        refused = ask(node, repo_id)
        assert (refused.exit_status, refused.reason) == (74, "STORAGE_ERROR")
        assert "is missing" in refused.text
    assert not node.hub_dir.exists()
    (node.root / "old").rename(node.hub_dir)
    node.wait_until(lambda: not trouble(node), SECONDS, "it is back")
    assert node.ensure("org/model")[0]["outcome"] == "hit"
    node.ensure("org/other")
    time.sleep(3)  # the look at everything that its coming back brings
    assert drifts(node) == {}
    node.assert_disk_truth()


def test_another_hub_without_a_lease_is_taken_as_it_is(hub: Hub, node: Node) -> None:
    commit = hub.create_repo("org/model").commit(tiny_llama())
    node.ensure("org/model")
    node.release_all()
    copy = node.root / "copy"
    shutil.copytree(node.hub_dir, copy, symlinks=True)
    node.hub_dir.rename(node.root / "old")
    copy.rename(node.hub_dir)
    taken = "hub/ is another directory than it was, and no lease is left: taken as it is"
    node.wait_until(lambda: node.log_lines(taken), SECONDS, "it is taken")
    node.wait_until(lambda: states(node) == {f"org/model@{commit}": "unverified"}, SECONDS, "other inodes")
    assert node.ensure("org/model")[0]["bytes_fetched"] == 0
    assert trouble(node) == ""


def test_what_was_begun_in_one_hub_is_not_published_in_another(hub: Hub, node: Node) -> None:
    """Half of its blobs lie in the old one, and are believed: a snapshot of them would show what is not there."""
    model = {"config.json": b"{}", "model.safetensors": Synthetic(3 * MIB, 1)}
    commit = hub.create_repo("org/model").commit(model)
    hub.gate_bodies.close("*.safetensors")
    client = node.popen("ensure-model", "org/model")
    blobs = folder(node, "org/model") / "blobs"
    node.wait_until(lambda: blobs.is_dir() and os.listdir(blobs), SECONDS, "the small file is there")
    assert hub.gate_bodies.wait_for_waiting(1)  # the large one is begun
    node.hub_dir.rename(node.root / "old")
    node.hub_dir.mkdir()
    # Before the gate is a stall. What is just being done to the small one meets no hub/, and may end the request first.
    node.wait_until(lambda: trouble(node) or client.poll() is not None, 2, "it says so")
    hub.gate_bodies.open()
    _, said = client.communicate(timeout=30)
    assert client.returncode == 74, said
    assert not node.snapshot("org/model", commit).exists()
    # Where the request ended before anybody looked, there is no trouble to be seen yet: an answer says that it is over.
    node.wait_until(lambda: node.run("ensure-model", "org/model").returncode == 0, SECONDS, "nobody has the old one")
    (ready,) = node.ensure("org/model")
    assert all(path.is_file() for path in Path(ready["path"]).iterdir())
    node.assert_disk_truth()


def test_an_operator_ends_it_by_releasing_the_leases(hub: Hub, node: Node) -> None:
    hub.create_repo("org/model").commit(tiny_llama())
    node.ensure("org/model")  # for a day
    node.hub_dir.rename(node.root / "old")
    node.hub_dir.mkdir()
    node.wait_until(lambda: trouble(node), SECONDS, "it says so")
    done = node.run("cachectl", "release", "--all")
    assert done.returncode == 0, done.stderr
    node.wait_until(lambda: not trouble(node), SECONDS, "nobody has the old one")
    node.ensure("org/model")
    node.assert_disk_truth()

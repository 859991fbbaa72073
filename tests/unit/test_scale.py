"""A large cache costs no more than it has to: counted, not timed, for a count is the same on every machine."""

from __future__ import annotations

import builtins
import dataclasses
import gc
import hashlib
import io
import marshal
import os
import random
import shutil
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.cache.leftovers import orphans
from modelcached.cache.recovery import recover
from modelcached.cache.shortage import pinned_and_leased
from modelcached.config import Config, load
from modelcached.ledger import database as state
from modelcached.ledger.clock import Clock
from modelcached.ledger.leases import Lease, LeasedModel, LeaseKind
from modelcached.ledger.space import Amount
from modelcached.ledger.use import Pin, UseLedger
from modelcached.ledger.victims import Name
from modelcached.model import Algorithm, Commit, Digest, Manifest, RepoId, Revision, SnapshotId, repo_folder
from modelcached.pools import Pools
from modelcached.store import walker
from modelcached.store.disk import Disk
from modelcached.store.index import Blob, Index, Repo, Snapshot, SnapshotState
from modelcached.store.layout import Layout
from modelcached.store.manifests import BlobStamp, ManifestStore, Record
from modelcached.store.scan import FoundRepo, scan_repo
from modelcached.store.snapshots import SnapshotStore
from modelcached.store.walker import Walker

from tests.node.filling import MAIN, Filling, fill, repo_ids, snapshots

FILLING = Filling(repos=20, files=12, weights=4, kept=5, linked=2, leased=20, pinned=4)


@asynccontextmanager
async def opened(layout: Layout) -> AsyncIterator[Core]:
    """As the daemon would begin, without its servers."""
    connection = state.connect(layout.state_db)
    contents = state.contents(connection)
    database, pools, clock = state.Database(connection), Pools.start(1), Clock.system()
    use = UseLedger(database, contents, clock, reconnect_grace_seconds=60)
    config = load(None, {"cache": {"dir": layout.cache_dir, "budget": "10GB"}})
    try:
        yield Core(config, layout, Disk(), pools, database, use, clock, lambda _event: None)
    finally:
        pools.stop()
        database.close()


class Entry:
    """A directory entry that tells whether it was looked at."""

    def __init__(self, entry: os.DirEntry[str], folder: str, told: Callable[[str], None]) -> None:
        self._entry, self._told = entry, told
        self._path = f"{folder}/{entry.name}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        self._told(self._path)
        return self._entry.stat(follow_symlinks=follow_symlinks)


class Looks:
    """Counts what is read of a directory tree, by path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listed: Counter[str] = Counter()
        self.stats: Counter[str] = Counter()
        self.links_read: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        scandir, listdir, readlink = os.scandir, os.listdir, os.readlink

        def path_of(descriptor: int) -> str:
            return readlink(f"/proc/self/fd/{descriptor}")

        class Scanned:
            def __init__(self, entries: Any, folder: str, told: Callable[[str], None]) -> None:
                self._entries, self._folder, self._told = entries, folder, told

            def __enter__(self) -> Iterator[Entry]:
                return (Entry(entry, self._folder, self._told) for entry in self._entries)

            def __exit__(self, *_: object) -> None:
                self._entries.close()

        def counted(function: Callable[..., Any], counter: Counter[str]) -> Callable[..., Any]:
            def call(path: Any, *rest: Any, **named: Any) -> Any:
                within = named.get("dir_fd")
                counter[str(path) if within is None else f"{path_of(within)}/{path}"] += 1
                return function(path, *rest, **named)

            return call

        def told(path: str) -> None:
            self.stats[path] += 1

        def counting_scandir(path: str | int) -> Scanned:
            folder = path_of(path) if isinstance(path, int) else path
            self.listed[folder] += 1
            return Scanned(scandir(path), folder, told)

        monkeypatch.setattr(os, "scandir", counting_scandir)
        monkeypatch.setattr(os, "listdir", counted(listdir, self.listed))
        monkeypatch.setattr(os, "lstat", counted(os.lstat, self.stats))
        monkeypatch.setattr(os, "stat", counted(os.stat, self.stats))
        monkeypatch.setattr(os, "readlink", counted(readlink, self.links_read))
        monkeypatch.setattr(builtins, "open", counted(builtins.open, self.opened))


def below(counts: Counter[str], *parts: str) -> dict[str, int]:
    """Of paths that have all those parts."""
    return {path: count for path, count in counts.items() if all(f"/{part}" in path for part in parts)}


def found_by_others(layout: Layout) -> tuple[list[str], list[str], list[str], list[str]]:
    """Blobs, links and directories of hub/, and records."""
    hub = Path(layout.hub)
    return (
        list(map(str, hub.glob("*/blobs/*"))),
        [str(path) for path in hub.rglob("*") if path.is_symlink()],
        [str(path) for path in [hub, *hub.rglob("*")] if path.is_dir()],
        list(map(str, Path(layout.manifests).glob("*/*.json"))),
    )


async def test_a_start_reads_each_directory_once_and_looks_at_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = fill(tmp_path / "cache", FILLING)
    blobs, links, folders, records = found_by_others(layout)
    async with opened(layout) as core:
        with monkeypatch.context() as patched:
            looks = Looks(patched)
            report = await recover(core, lost="")
        assert len(report.ready) == FILLING.snapshots
        assert (report.unverified, report.removed, report.reported) == ([], [], [])
    assert len(links) == FILLING.links
    assert below(looks.stats, "hub/", "blobs/") == dict.fromkeys(blobs, 1)
    assert {path: looks.stats[path] for path in links} == dict.fromkeys(links, 1)
    assert below(looks.links_read, "hub/") == dict.fromkeys(links, 1)
    assert below(looks.listed, "hub") == dict.fromkeys(folders, 1)
    assert below(looks.opened, "manifests/") == dict.fromkeys(records, 1)


async def test_only_what_mending_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = fill(tmp_path / "cache", FILLING)
    mended, whole = repo_ids(FILLING)[3], repo_ids(FILLING)[4]
    os.symlink("nowhere", f"{layout.repo(whole)}/refs/stranger")
    SnapshotStore(Disk(), layout).write_ref(mended, Revision("gone"), Commit("f" * 40))
    async with opened(layout) as core:
        with monkeypatch.context() as patched:
            looks = Looks(patched)
            report = await recover(core, lost="")
        assert report.reported == [f"{layout.repo(whole)}/refs/stranger"]
        assert report.removed == [layout.ref(mended, Revision("gone"))]
        assert len(report.ready) == FILLING.snapshots
        assert core.index.repos[mended].refs == {MAIN: snapshots(mended)[1].commit}
        assert looks.listed[f"{layout.repo(mended)}/blobs"] == 2
        assert looks.listed[f"{layout.repo(whole)}/blobs"] == 1
        assert core.space.used_bytes == used(layout)


def used(layout: Layout) -> int:
    """What du sees, each inode once."""
    paths = [Path(layout.cache_dir), *Path(layout.cache_dir).rglob("*")]
    return sum({(status := path.lstat()).st_ino: status.st_blocks * 512 for path in paths}.values())


async def test_the_walk_that_finds_the_models_is_the_one_that_measures_them(tmp_path: Path) -> None:
    """I8, and the same again when each area is measured by itself."""
    layout = fill(tmp_path / "cache", FILLING)
    for place in (
        "stranger",
        "trash",
        "models--org--name/notes",
        f"{Path(layout.repo(repo_ids(FILLING)[0])).name}/x/y",
    ):
        (Path(layout.hub) / place).mkdir(parents=True)
        (Path(layout.hub) / place / "file").write_bytes(b"x" * 5000)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"x" * 5000)
    for place in ("leads", "stranger/leads", "models--org--name/leads", "models--org--name/blobs"):
        os.symlink(tmp_path / "elsewhere", f"{layout.hub}/{place}")
    _, (link, *_), *_ = found_by_others(layout)
    os.link(link, f"{link} once more", follow_symlinks=False)
    async with opened(layout) as core:
        await recover(core, lost="")
        assert core.space.used_bytes == used(layout)
        ours = [name for name in core.space.areas() if name in core.areas() or name.startswith("models--")]
        assert len(ours) > FILLING.repos
        before = {name: core.space.area_bytes(name) for name in ours}
        await core.measure(*ours)
        assert {name: core.space.area_bytes(name) for name in ours} == before


async def test_choosing_victims_asks_only_about_those_that_it_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = fill(tmp_path / "cache", FILLING)
    async with opened(layout) as core:
        await recover(core, lost="")
        asked: Counter[str] = Counter()
        covers, users = Lease.covers, Repo.shared

        def counting_covers(self: Lease, *rest: Any) -> bool:
            asked["lease"] += 1
            return covers(self, *rest)

        def counting_users(self: Repo) -> Counter[Digest]:
            asked["repository"] += 1
            return users(self)

        monkeypatch.setattr(Lease, "covers", counting_covers)
        monkeypatch.setattr(Repo, "shared", counting_users)
        victims, _ = eviction.plan(core, Amount(1))
        assert [victim.id for victim in victims] == [snapshots(repo_ids(FILLING)[0])[0]]
        assert asked["repository"] == 1
        # Each repository has one lease, on its newer snapshot; what comes first in order is asked about, no more.
        assert asked["lease"] <= 1
        asked.clear()
        victims, _ = eviction.plan(core, Amount(10**12))
        assert len(victims) == FILLING.snapshots - FILLING.leased
        assert asked["lease"] <= FILLING.snapshots, "each snapshot is compared with its own repository's leases alone"
        assert asked["repository"] == FILLING.repos
        asked.clear()
        assert all(kept.size_bytes for kept in pinned_and_leased(core))
        assert asked["lease"] <= FILLING.snapshots


async def test_a_stranger_is_reported_once_however_often_its_repository_is_read(tmp_path: Path) -> None:
    """An adopted payload has them all read again."""
    layout = fill(tmp_path / "cache", FILLING)
    payload = Path(layout.hub) / "blobs" / "ab" / "payload"
    payload.parent.mkdir(parents=True)
    payload.write_bytes(b"payload")
    payload.chmod(0o444)
    (Path(layout.hub) / "blobs" / ".huggingface-shared-blobs").touch()
    one, other, *_ = repo_ids(FILLING)
    digest = hashlib.sha256(b"payload").hexdigest()
    (Path(layout.repo(one)) / "blobs" / digest).symlink_to("../../blobs/ab/payload")
    os.link(payload, f"{layout.repo(other)}/blobs/{digest}")
    os.mkdir(f"{layout.repo(other)}/notes")
    async with opened(layout) as core:
        report = await recover(core, lost="")
        assert report.reported == [f"{layout.repo(other)}/notes"]
        assert core.space.used_bytes == used(layout)
        names = [core.index.blob(repo_id, Digest(Algorithm.SHA256, digest)) for repo_id in (one, other)]
        assert [name and name.link_count for name in names] == [2, 2], "the store's own name has gone"
    assert not payload.exists()


# A process of its own reads hub/ where it is large. Without it, or with half of what it says, the same is found.


def counted(found: FoundRepo | None) -> Any:
    return None if found is None else dataclasses.asdict(found)


def test_the_process_that_reads_hub_finds_what_we_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = fill(tmp_path / "cache", FILLING)
    hub, (mixed, broken, *_) = Path(layout.hub), repo_ids(FILLING)
    os.link(layout.blob(mixed, next(iter(scanned(layout, mixed).blobs))), tmp_path / "another name")
    (hub / "blobs" / "ab").mkdir(parents=True)
    (hub / "blobs" / "ab" / "payload").write_bytes(b"payload")
    (Path(layout.repo(mixed)) / "blobs" / ("d" * 64)).symlink_to("../../blobs/ab/payload")
    (Path(layout.repo(mixed)) / "blobs" / "x.incomplete").write_bytes(b"x")
    (Path(layout.repo(mixed)) / "refs" / "pr").mkdir()
    (Path(layout.repo(mixed)) / "refs" / "pr" / "1").write_text("a" * 40)
    (Path(layout.repo(broken)) / "refs" / "\udcff").write_text("a" * 40)
    shutil.rmtree(f"{layout.repo(broken)}/trees")
    os.symlink(tmp_path, f"{layout.repo(broken)}/trees")
    os.mkdir(f"{layout.repo(broken)}/.no_exist")
    (hub / "models--org--linked").symlink_to(tmp_path)
    (hub / "models--org--\udcff").mkdir()
    folders = sorted(os.listdir(hub))
    alone = {folder: counted(Walker(layout, folders).found(folder, {})) for folder in folders}
    assert sum(found is not None for found in alone.values()) == FILLING.repos

    monkeypatch.setattr(walker, "LEAST_FOLDERS", 1)
    with Walker.begin(layout, folders) as process:
        monkeypatch.setattr(walker, "scan_repo", None)  # it is not asked again
        assert {folder: counted(process.found(folder, {})) for folder in folders} == alone
    monkeypatch.undo()

    told = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(marshal.dumps(folders))))
        patched.setattr(sys, "stdout", SimpleNamespace(buffer=told))
        patched.setattr(sys, "argv", ["walker", str(os.getppid()), layout.cache_dir])
        patched.setattr(walker, "_die_with", lambda _parent: None)
        patched.setattr(gc, "disable", lambda: None)
        walker.main()
    for size in (0, 5, len(told.getvalue()) // 2, len(told.getvalue()) - 1):
        cut = Walker(layout, folders, io.BytesIO(told.getvalue()[:size]))
        assert {folder: counted(cut.found(folder, {})) for folder in folders} == alone


def test_a_machine_that_gives_no_thread_reads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = fill(tmp_path / "cache", FILLING)
    monkeypatch.setattr(walker, "LEAST_FOLDERS", 1)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    folder = repo_folder(repo_ids(FILLING)[0])
    with Walker.begin(layout, [folder]) as alone:
        found = alone.found(folder, {})
    assert found is not None
    assert len(found.snapshots) == 2


def scanned(layout: Layout, repo_id: RepoId) -> FoundRepo:
    found = scan_repo(layout, repo_id)
    assert found is not None
    return found


def test_what_is_found_shares_the_digests_that_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object for each, and one text for each path: what keeps a large cache small in memory."""
    layout = fill(tmp_path / "cache", FILLING)
    monkeypatch.setattr(walker, "LEAST_FOLDERS", 1)
    (repo_id, *_), (folder, *_) = repo_ids(FILLING), [repo_folder(repo_ids(FILLING)[0])]
    records = ManifestStore(Disk(), layout).of(repo_id)
    known = {entry.digest.hex: entry.digest for record in records.values() for entry in record.manifest.files.values()}
    for begin in (Walker.begin(layout, [folder]), Walker.begin(layout, [])):
        with begin as process:
            found = process.found(folder, known)
        assert found is not None
        assert len(found.blobs) == 2 * FILLING.files - FILLING.kept
        for commit, links in found.snapshots.items():
            files = records[commit].manifest.files
            assert len(links) == FILLING.files
            own = {path: path for path in files}
            assert all(digest is files[path].digest and path is own[path] for path, digest in links.items())
        assert all(digest is known[digest.hex] for digest in found.blobs)


async def test_a_start_with_that_process_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = fill(tmp_path / "cache", FILLING)
    async with opened(layout) as core:
        alone = await recover(core, lost="")
        before = (core.space.used_bytes, core.index.repos)
    monkeypatch.setattr(walker, "LEAST_FOLDERS", 1)
    async with opened(layout) as core:
        assert await recover(core, lost="") == alone
        assert (core.space.used_bytes, core.index.repos) == before


# What is asked about little must still be right: each answer beside that of a plain look at everything.


@dataclasses.dataclass
class World:
    """Beliefs of a core, without a disk behind them."""

    index: Index
    use: UseLedger
    unremovable: dict[SnapshotId, float] = dataclasses.field(default_factory=dict)
    config: Config = dataclasses.field(default_factory=Config)

    def refs(self) -> dict[RepoId, dict[Revision, Commit]]:
        return {repo_id: repo.refs for repo_id, repo in self.index.repos.items()}


REPOS = [RepoId(f"org/{letter}") for letter in "abc"]
COMMITS = [Commit(letter * 40) for letter in "123"]
DIGESTS = [Digest(Algorithm.SHA256, letter * 64) for letter in "456789"]


class Unwritten:
    """A database that keeps nothing."""

    def write_later(self, *statements: state.Statement) -> None:
        pass


def some(rng: random.Random, items: list[Any]) -> list[Any]:
    return rng.sample(items, rng.randint(0, len(items)))


def world(rng: random.Random) -> World:
    """Two or three of everything, connected at random."""
    use = UseLedger(Unwritten(), state.Contents(), Clock.system(), 60)  # type: ignore[arg-type]
    made = World(Index(), use)
    inodes = {digest: rng.choice([100, 200]) + number // 2 for number, digest in enumerate(DIGESTS)}
    for repo_id in REPOS:
        repo = made.index.repo(repo_id)
        for commit in some(rng, COMMITS):
            links = {f"file-{digest.hex[0]}": digest for digest in some(rng, DIGESTS)}
            record = Record(Manifest(repo_id, commit, {}))
            snapshot = SnapshotId(repo_id, commit)
            repo.snapshots[commit] = Snapshot(snapshot, links, record, rng.choice(list(SnapshotState)))
        for digest in some(rng, DIGESTS):
            inode = inodes[digest] if rng.random() < 0.7 else rng.randint(1000, 2000)
            blob = Blob(BlobStamp(inode, 10, 0), 4096 * (1 + inode % 7), 1, verified=rng.random() < 0.8)
            made.index.add_link(repo_id, digest, blob)
        for name in ("main", "dev"):
            if rng.random() < 0.6:
                repo.refs[Revision(name)] = rng.choice(COMMITS)
    foreign = {inode: rng.choice([0, 0, 1]) for inode in range(3000)}
    blobs = [blob for repo in made.index.repos.values() for blob in repo.blobs.values()]
    names = Counter(blob.stamp.inode for blob in blobs)
    for blob in blobs:
        blob.link_count = names[blob.stamp.inode] + foreign[blob.stamp.inode]
    everything = [SnapshotId(repo_id, commit) for repo_id in REPOS for commit in COMMITS]
    for snapshot_id in some(rng, everything):
        use.touch(snapshot_id)
    revisions = [Revision("main"), Revision("dev"), Revision(""), *map(Revision, COMMITS)]
    for number in range(rng.randint(0, 4)):
        models = tuple(LeasedModel(one, rng.choice(revisions)) for one in some(rng, everything)[:2])
        if models:
            kind = rng.choice(list(LeaseKind))
            lease, _ = use.lease(kind, f"host-{number}", models, ttl_seconds=None, pod_uid=rng.choice(["", "pod"]))
            if rng.random() < 0.3:
                use.drop(lease.id)
    for repo_id in some(rng, REPOS):
        use.pin(Pin(repo_id, rng.choice(revisions)))
        if rng.random() < 0.3:
            use.unpin(Pin(repo_id, rng.choice(revisions)))
    return made


def protected_plainly(made: World, snapshot: SnapshotId) -> list[str]:
    own = made.refs().get(snapshot.repo_id, {})
    found = [
        str(pin)
        for pin in made.use.pins
        if pin.repo_id == snapshot.repo_id and (own.get(pin.revision) or pin.revision) == snapshot.commit
    ]
    return sorted(found) + [str(lease) for lease in made.use.leases.values() if lease.covers(snapshot, own)]


def planned_plainly(made: World, wanted: int) -> tuple[list[tuple[SnapshotId, int]], int]:
    users: Counter[Name] = Counter()
    blobs: dict[Name, Blob] = {}
    for repo_id, repo in made.index.repos.items():
        for snapshot in repo.snapshots.values():
            if snapshot.state is not SnapshotState.CONDEMNED:
                users.update(Name(repo_id, digest) for digest in snapshot.digests)
        for digest, blob in repo.blobs.items():
            users[Name(repo_id, digest)] += made.use.holds(Name(repo_id, digest))
            blobs[Name(repo_id, digest)] = blob
    names_left = {blob.stamp.inode: blob.link_count for blob in blobs.values()}
    victims: list[tuple[SnapshotId, int]] = []
    free = [
        snapshot.id
        for snapshot in made.index.snapshots()
        if snapshot.state is not SnapshotState.CONDEMNED and not protected_plainly(made, snapshot.id)
    ]
    for snapshot_id in made.use.eviction_order(free, made.refs()):
        if sum(freed for _, freed in victims) >= wanted:
            break
        links = made.index.repos[snapshot_id.repo_id].snapshots[snapshot_id.commit].links
        freed = 4096 * (len(links) + len({path.rpartition("/")[0] for path in links}))
        for name in {Name(snapshot_id.repo_id, digest) for digest in links.values()}:
            users[name] -= 1
            if users[name] <= 0 and name in blobs:
                names_left[blobs[name].stamp.inode] -= 1
                freed += blobs[name].allocated_bytes if names_left[blobs[name].stamp.inode] == 0 else 0
        victims.append((snapshot_id, freed))
    return victims, sum(freed for _, freed in victims)


@given(st.integers(0, 2**32), st.integers(0, 200_000))
@settings(max_examples=300, deadline=None)
def test_victims_are_those_of_a_plain_look_at_everything(seed: int, wanted: int) -> None:
    rng = random.Random(seed)
    made: Any = world(rng)
    with made.use.hold([], frozenset(Name(rng.choice(REPOS), digest) for digest in some(rng, DIGESTS))):
        victims, freed = eviction.plan(made, Amount(wanted))
        chosen = [(victim.id, victim.freed_bytes) for victim in victims]
        assert (chosen, freed.size_bytes) == planned_plainly(made, wanted)
    for snapshot in made.index.snapshots():
        keeps = [p.who for p in made.use.protections(snapshot.id, made.refs())]
        assert sorted(keeps) == sorted(protected_plainly(made, snapshot.id))
        assert made.use.protected(snapshot.id, made.refs()) is bool(keeps)


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_what_is_pinned_leased_and_orphaned_is_what_a_plain_look_finds(seed: int) -> None:
    made: Any = world(random.Random(seed))
    pinned: dict[int, int] = {}
    leased: dict[int, int] = {}
    for snapshot in made.index.snapshots():
        blobs = made.index.repos[snapshot.id.repo_id].blobs
        sizes = {blobs[d].stamp.inode: blobs[d].allocated_bytes for d in snapshot.digests if d in blobs}
        kept = [p.kind for p in made.use.protections(snapshot.id, made.refs())]
        pinned |= sizes if "pinned" in kept else {}
        leased |= sizes if "leased" in kept else {}
    kept = tuple(each.size_bytes for each in pinned_and_leased(made))
    assert kept == (sum(pinned.values()), sum(leased.values()))
    assert orphans(made) == [
        (repo_id, digest)
        for repo_id, repo in made.index.repos.items()
        for digest in repo.blobs
        if not any(digest in snapshot.digests for snapshot in repo.snapshots.values())
    ]


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_names_of_a_blob_are_known_wherever_they_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    index = Index()
    for _ in range(30):
        repo_id, digest = rng.choice(REPOS), rng.choice(DIGESTS[:2])
        if rng.random() < 0.5:
            before = [repo.blobs[digest] for repo in index.repos.values() if digest in repo.blobs]
            new = index.blob(repo_id, digest) is None
            blob = Blob(BlobStamp(7, 10, 0), 4096, len(before) + new, verified=rng.random() < 0.7)
            index.add_link(repo_id, digest, blob)
        else:
            index.drop_link(repo_id, digest)
        for one in DIGESTS[:2]:
            there = {repo_id: repo.blobs[one] for repo_id, repo in index.repos.items() if one in repo.blobs}
            assert {blob.link_count for blob in there.values()} <= {len(there)}
            donors = {repo_id for repo_id, blob in there.items() if blob.verified}
            assert set(index.donors(one)) == set(donors)

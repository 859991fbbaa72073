"""What must hold of a cache directory, read from the disk itself and from the models that there are upstream.

Every function returns what is wrong, in words; nothing is right.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from modelcached.cache.core import Core
from modelcached.model import Commit, Digest, SnapshotId, repo_folder
from modelcached.store import journal
from modelcached.store.index import SnapshotState
from modelcached.store.layout import Layout

from .world import BLOBS, BY_COMMIT, PROFILES

_DONE = re.compile(r"d (\d+) (\d+) [0-9a-f]{8}\n")
_OWN_FILES = {"owner.lock", "state.db", "state.db-wal", "ballast"}
_OWN_DIRECTORIES = {"partial", "staging", "trash", "quarantine", "manifests"}


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    """Everything that is no directory, by its path from there."""
    for directory, _, names in os.walk(root):
        folders = [name for name in os.listdir(directory) if os.path.islink(os.path.join(directory, name))]
        for name in {*names, *folders}:
            path = Path(directory, name)
            yield str(path.relative_to(root)), path


def du(root: str) -> int:
    """Allocated bytes, each inode once."""
    sizes: dict[int, int] = {}
    for directory, folders, names in os.walk(root):
        for path in (directory, *(os.path.join(directory, name) for name in (*folders, *names))):
            status = os.lstat(path)
            sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def lies(cache_dir: str, excused: Collection[str] = ()) -> list[str]:
    """I1: what a reader of hub/ meets that is not whole, not right, or not there.

    ``excused``: digests of blobs that somebody damaged: they may be wrong, or missing.
    """
    found: list[str] = []
    hub = Path(cache_dir, "hub")
    for repo in sorted(hub.iterdir()) if hub.is_dir() else ():
        for name, path in _below(repo / "blobs"):
            if name not in excused and path.read_bytes() != BLOBS.get(name):
                found.append(f"blob {name[:12]} is not what its name says")
            if stat.S_IMODE(path.lstat().st_mode) != 0o444:
                found.append(f"blob {name[:12]} has mode {path.lstat().st_mode:o}")
        commits = set(os.listdir(repo / "snapshots")) if (repo / "snapshots").is_dir() else set()
        for commit in sorted(commits):
            found += _snapshot_lies(repo, commit, excused)
        for name, path in _below(repo / "refs"):
            if path.read_text() not in commits:
                found.append(f"ref {name} points to no snapshot")
        for name, path in _below(repo / "trees"):
            files = json.loads(path.read_text())["files"]
            held = {held for held, _ in _below(repo / "snapshots" / name.removesuffix(".json"))}
            if not files.keys() <= held:
                found.append(f"tree {name[:12]} promises {sorted(files.keys() - held)}")
    for directory, folders, _ in os.walk(hub):
        for folder in folders:
            mode = os.lstat(os.path.join(directory, folder)).st_mode
            if stat.S_ISDIR(mode) and stat.S_IMODE(mode) != 0o755:
                found.append(f"directory {folder} has mode {mode:o}")
    return found


def _snapshot_lies(repo: Path, commit: str, excused: Collection[str]) -> list[str]:
    found = []
    model = BY_COMMIT[Commit(commit)]
    held = dict(_below(repo / "snapshots" / commit))
    if frozenset(held) not in {model.paths(profile) for profile in PROFILES}:
        found.append(f"snapshot {commit[:4]} holds {sorted(held)}: no selection")
    for path, link in held.items():
        digest = model.digest(path).hex if path in model.contents else "?"
        if not link.is_symlink() or link.readlink().name != digest:
            found.append(f"{commit[:4]}/{path} is no link to its blob")
        elif not link.resolve().is_relative_to(repo / "blobs"):
            found.append(f"{commit[:4]}/{path} leads out of its repository")
        elif digest not in excused and not link.is_file():
            found.append(f"{commit[:4]}/{path} points to nothing")
    return found


def journals(cache_dir: str, boot_id: str) -> dict[str, tuple[int, int]]:
    """Unfinished blobs: bytes that their journals trust in this boot, and bytes that they ever called done."""
    found = {}
    for name, path in _below(Path(Layout(cache_dir).partial)):  # none before the first start
        digest = Digest.parse(name.removesuffix(".journal"))
        if digest is None or not name.endswith(".journal"):
            continue
        content = path.read_bytes()
        reading = journal.read(content, digest, boot_id)
        claimed = journal.Ranges()
        for start, end in _DONE.findall(content.decode("ascii", "replace")):
            claimed.add(int(start), int(end))
        found[digest.hex] = (reading.trusted.total if reading else 0, claimed.total)
    return found


def misplaced_trust(cache_dir: str, boot_id: str) -> list[str]:
    """I5: ranges of unfinished blobs that are believed and are not there."""
    found = []
    layout = Layout(cache_dir)
    for name in journals(cache_dir, boot_id):
        digest = Digest.parse(name)
        assert digest is not None
        reading = journal.read(Path(layout.partial_journal(digest)).read_bytes(), digest, boot_id)
        data = Path(layout.partial_data(digest))
        written = data.read_bytes() if data.exists() else b""
        for start, end in reading.trusted.spans if reading else ():
            if written[start:end] != BLOBS[name][start:end]:
                found.append(f"[{start}, {end}) of {name[:12]} is trusted and wrong")
    return found


def leaks(core: Core) -> list[str]:
    """I8 and I5: files and directories that nobody will ever ask for or remove."""
    layout = core.layout
    private = set(os.listdir(layout.private))
    found = [f"{name} in {layout.private}" for name in private - _OWN_FILES - _OWN_DIRECTORIES]
    found += [f"{name} is left in staging" for name in os.listdir(layout.staging)]
    found += [f"{name} is left in trash" for name in os.listdir(layout.trash)]
    # quarantine/ keeps bad blobs for a week, and is emptied before that where its space is wanted
    partial = set(os.listdir(layout.partial))
    for name in partial:
        if {name.removesuffix(".journal"), f"{name.removesuffix('.journal')}.journal"} - partial:
            found.append(f"{name} is alone in partial")
    for name, path in _below(Path(layout.manifests)):
        folder, _, file = name.partition("/")
        commit = Commit(file.removesuffix(".json"))
        if not any(
            repo_folder(each.id.repo_id) == folder and each.id.commit == commit for each in core.index.snapshots()
        ):
            found.append(f"record {path} has no snapshot")
    for folder in os.listdir(layout.manifests):
        if not os.listdir(f"{layout.manifests}/{folder}"):
            found.append(f"manifests/{folder} is empty")
    return found + _strangers(core)


def _strangers(core: Core) -> list[str]:
    """What lies in hub/ and is not in the index."""
    found, known = [], {repo_folder(repo_id): repo for repo_id, repo in core.index.repos.items()}
    for folder in os.listdir(core.layout.hub):
        root = Path(core.layout.hub, folder)
        repo = known.get(folder)
        if repo is None:
            found.append(f"hub/{folder} is not in the index")
            continue
        expected = {f"blobs/{digest.hex}" for digest in repo.blobs} | {f"refs/{name}" for name in repo.refs}
        for snapshot in repo.snapshots.values():
            expected |= {f"snapshots/{snapshot.id.commit}/{path}" for path in snapshot.links}
            expected.add(f"trees/{snapshot.id.commit}.json")
        found += [f"hub/{folder}/{name} is not in the index" for name, _ in _below(root) if name not in expected]
        found += [
            f"{directory} is empty"
            for directory, folders, names in os.walk(root)
            if not folders and not names and Path(directory).parent != root
        ]
    return found


def false_beliefs(core: Core, damaged: frozenset[str]) -> list[str]:
    """I1: snapshots that would be answered from at once, and are not whole on the disk.

    ``damaged``: blobs that somebody else changed in a way that only reading them shows.
    """
    found = []
    for snapshot in core.index.snapshots():
        if snapshot.state is not SnapshotState.READY:
            continue
        root = Path(core.layout.snapshot(snapshot.id))
        model = BY_COMMIT[snapshot.id.commit]
        assert snapshot.record is not None
        for path in snapshot.record.paths:
            if model.digest(path).hex in damaged:
                continue
            if not (root / path).is_file() or (root / path).read_bytes() != model.contents[path]:
                found.append(f"{snapshot.id} is believed whole, and {path} is not right")
    return found


def account(core: Core, used_bytes: int) -> list[str]:
    """I8: what the account says is what du says."""
    found = du(core.layout.cache_dir)
    return [] if found == used_bytes else [f"the account says {used_bytes}, du {found}"]


def ready(core: Core) -> list[SnapshotId]:
    """What would be answered from at once."""
    return sorted(each.id for each in core.index.snapshots() if each.state is SnapshotState.READY)


def remains(cache_dir: str) -> list[str]:
    """What an empty cache does not have."""
    layout = Layout(cache_dir)
    found = [f"hub/{name}" for name in os.listdir(layout.hub)]
    for name in _OWN_DIRECTORIES:
        found += [f"{name}/{inner}" for inner in os.listdir(f"{layout.private}/{name}")]
    return [f"{name} outlives everything" for name in found]

"""What is on the disk, read without any of the daemon's code: du, and what a reader of the cache would meet."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field

from modelcached.model import Commit, RepoId, Revision, SnapshotId, repo_id_of_folder

_repo_id_of = functools.cache(repo_id_of_folder)

Name = tuple[RepoId, str]
"""A digest's hex in a repository's blobs/."""


@dataclass(eq=False)
class Memory:
    """What was read before and need not be read again: an inode that looks as it did says what it said."""

    hexes: dict[tuple[int, int, int], tuple[str, str]] = field(default_factory=dict)
    texts: dict[tuple[int, int, int], str] = field(default_factory=dict)
    records: dict[tuple[int, int, int], dict[str, str]] = field(default_factory=dict)

    def is_right(self, path: str, status: os.stat_result, name: str) -> bool:
        """Whether the file's content is what its name says."""
        key = _key(status)
        if key not in self.hexes:
            with open(path, "rb") as file:
                content = file.read()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.hexes[key] = (hashlib.sha256(content).hexdigest(), git)
        return name in self.hexes[key]

    def text(self, path: str, status: os.stat_result) -> str:
        key = _key(status)
        if key not in self.texts:
            with open(path, encoding="utf-8") as file:
                self.texts[key] = file.read()
        return self.texts[key]

    def selected(self, path: str, status: os.stat_result) -> dict[str, str]:
        """What the daemon's record of a commit says that the snapshot holds: path -> digest's hex."""
        key = _key(status)
        if key not in self.records:
            data = json.loads(self.text(path, status))
            paths = {path for selection in data["selections"].values() for path in selection["paths"]}
            self.records[key] = {path: data["files"][path]["digest"] for path in paths}
        return self.records[key]


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


@dataclass(eq=False)
class Truth:
    """All of cache.dir at one moment."""

    root: str
    used_bytes: int = 0
    """As du counts: allocated blocks, once per inode."""
    database_bytes: int = 0
    """state.db and its log: they grow by themselves, within what is set aside for them."""
    blobs: dict[Name, os.stat_result] = field(default_factory=dict)
    snapshots: dict[SnapshotId, dict[str, str]] = field(default_factory=dict)
    """Path -> what the link there says."""
    refs: dict[tuple[RepoId, Revision], Commit] = field(default_factory=dict)
    trees: dict[SnapshotId, frozenset[str]] = field(default_factory=dict)
    records: dict[SnapshotId, dict[str, str]] = field(default_factory=dict)
    private: dict[str, set[str]] = field(default_factory=dict)
    """Names in partial, staging, trash and quarantine."""
    others: set[str] = field(default_factory=set)
    """Files that no place of the layout is for."""
    bare: set[str] = field(default_factory=set)
    """Folders of repositories with no file and no link below them."""

    def blob_of(self, snapshot: SnapshotId, path: str) -> str | None:
        """The blob's name where the link at that path leads into the repository's blobs/."""
        text = self.snapshots[snapshot].get(path, "")
        up, _, name = text.rpartition("/")
        return name if up == "../" * (path.count("/") + 2) + "blobs" else None


def look(root: str, memory: Memory) -> Truth:
    """Walks all of it once."""
    truth = Truth(root, private={name: set() for name in ("partial", "staging", "trash", "quarantine")})
    inodes: dict[int, int] = {}
    pending = [root]
    base = len(root) + 1
    while pending:
        folder = pending.pop()
        status = os.lstat(folder)
        inodes[status.st_ino] = status.st_blocks
        parts = folder[base:].split("/") if len(folder) > base else []
        in_hub, in_private = parts[:1] == ["hub"], parts[:1] == ["modelcached"]
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                inodes[status.st_ino] = status.st_blocks
                is_folder = stat.S_ISDIR(status.st_mode)
                if is_folder:
                    pending.append(entry.path)
                if in_hub and len(parts) > 1:
                    _in_repository(truth, memory, parts[1:], entry, status)
                elif in_hub:
                    if not is_folder or _repo_id_of(entry.name) is None:
                        truth.others.add(entry.path)
                    else:
                        truth.bare.add(entry.name)
                elif in_private:
                    _in_private(truth, memory, parts[1:], entry, status)
                elif entry.name not in ("hub", "modelcached"):
                    truth.others.add(entry.path)
    truth.used_bytes = sum(inodes.values()) * 512
    return truth


def _in_repository(
    truth: Truth, memory: Memory, parts: list[str], entry: os.DirEntry[str], status: os.stat_result
) -> None:
    """``parts``: the repository's folder, and what lies between it and the entry."""
    repo_id = _repo_id_of(parts[0])
    if repo_id is None:
        truth.others.add(entry.path)
        return
    kind = parts[1] if len(parts) > 1 else ""
    if stat.S_ISDIR(status.st_mode):
        if kind == "snapshots" and len(parts) == 2:
            truth.snapshots[SnapshotId(repo_id, Commit(entry.name))] = {}
            truth.bare.discard(parts[0])
        return
    truth.bare.discard(parts[0])
    if kind == "snapshots" and len(parts) > 2 and entry.is_symlink():
        links = truth.snapshots.setdefault(SnapshotId(repo_id, Commit(parts[2])), {})
        links["/".join([*parts[3:], entry.name])] = os.readlink(entry.path)
    elif kind == "blobs" and len(entry.name) in (40, 64):
        truth.blobs[repo_id, entry.name] = status
    elif kind == "refs":
        revision = Revision("/".join([*parts[2:], entry.name]))
        truth.refs[repo_id, revision] = Commit(memory.text(entry.path, status))
    elif kind == "trees":
        files = json.loads(memory.text(entry.path, status))["files"]
        truth.trees[SnapshotId(repo_id, Commit(entry.name.removesuffix(".json")))] = frozenset(files)
    else:
        truth.others.add(entry.path)


def _in_private(
    truth: Truth, memory: Memory, parts: list[str], entry: os.DirEntry[str], status: os.stat_result
) -> None:
    if not parts:
        if entry.name.startswith("state.db"):
            truth.database_bytes += status.st_blocks * 512
        elif entry.name not in (*truth.private, "manifests", "ballast", "owner.lock"):
            truth.others.add(entry.path)
    elif parts[0] == "manifests":
        if len(parts) == 2 and entry.name.endswith(".json"):
            repo_id = _repo_id_of(parts[1])
            assert repo_id is not None, entry.path
            commit = Commit(entry.name.removesuffix(".json"))
            truth.records[SnapshotId(repo_id, commit)] = memory.selected(entry.path, status)
        elif not stat.S_ISDIR(status.st_mode):
            truth.others.add(entry.path)
    elif len(parts) == 1:
        truth.private[parts[0]].add(entry.name)

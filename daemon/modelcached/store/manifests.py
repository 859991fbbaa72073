"""Our record of a commit: its files, which selections of it are complete, and how its blobs looked when verified.

One small file a commit, replaced atomically. An unknown format_version is
ignored and the record made anew from the Hub, as huggingface_hub does with its trees.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from modelcached.errors import CacheError
from modelcached.model import (
    Commit,
    Digest,
    FileEntry,
    Manifest,
    RepoId,
    Selection,
    SnapshotId,
    as_commit,
    made,
    repo_folder,
    repo_id_of_folder,
)
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.measure import bytes_of_name

FORMAT_VERSION = 1


class BlobStamp(NamedTuple):
    """What stat says of a blob that was verified; a difference means that it must be hashed again."""

    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> BlobStamp:
        """The stamp of a file's stat."""
        return made(cls, (status.st_ino, status.st_size, status.st_mtime_ns))


@dataclass(frozen=True, slots=True)
class Record:
    """A manifest and what this cache has of it."""

    manifest: Manifest
    selections: dict[str, Selection] = field(default_factory=dict)
    """Complete selections by canonical profile name."""
    stamps: dict[Digest, BlobStamp] = field(default_factory=dict)
    readers: tuple[str, ...] = ()
    """For a restricted repository: fingerprints of the tokens that the Hub has let read it."""

    @property
    def snapshot(self) -> SnapshotId:
        """Whose record this is."""
        return SnapshotId(self.manifest.repo_id, self.manifest.commit)

    @property
    def paths(self) -> frozenset[str]:
        """What the snapshot holds: the union of the complete selections."""
        return frozenset[str]().union(*(selection.paths for selection in self.selections.values()))

    @property
    def is_whole(self) -> bool:
        """The snapshot holds every file of the commit."""
        return not self.manifest.local and self.paths == self.manifest.files.keys()

    def without_selections(self) -> Record:
        """The same with nothing complete."""
        return replace(self, selections={}, stamps={})

    def to_json(self) -> str:
        """As it lies on disk."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "repo_id": self.manifest.repo_id,
                "commit": self.manifest.commit,
                "restricted": self.manifest.restricted,
                "readers": list(self.readers),
                **({"local": True} if self.manifest.local else {}),
                "files": {
                    path: {
                        "size": entry.size_bytes,
                        "digest": entry.digest.hex,
                        "blob_id": entry.blob_id,
                        **({"xet_hash": entry.xet_hash} if entry.xet_hash else {}),
                    }
                    for path, entry in sorted(self.manifest.files.items())
                },
                "selections": {
                    name: {"format": selection.format, "paths": sorted(selection.paths)}
                    for name, selection in sorted(self.selections.items())
                },
                "stamps": {
                    digest.hex: [stamp.inode, stamp.size_bytes, stamp.mtime_ns]
                    for digest, stamp in sorted(self.stamps.items())
                },
            },
            separators=(",", ":"),  # a start reads thousands of these
        )

    @classmethod
    def from_json(
        cls, text: str, repo_id: RepoId, commit: Commit, known: Mapping[str, Digest] | None = None
    ) -> Record | None:
        """None for what is damaged, of another version, or of another commit. ``known``: digests by their hex."""
        try:
            data = json.loads(text)
            if (data["format_version"], data["repo_id"], data["commit"]) != (FORMAT_VERSION, repo_id, commit):
                return None
            digests = _digests(data, known or {})
            entries = _entries(data["files"], digests)
            told = {"restricted": bool(data["restricted"]), "local": bool(data.get("local", False))}
            manifest = Manifest.of(repo_id, commit, entries, **told)
            same: dict[frozenset[str], frozenset[str]] = {}
            selections = {
                name: Selection(name, item["format"], same.setdefault(paths := _paths(item["paths"], manifest), paths))
                for name, item in data["selections"].items()
            }
            if not set(map(len, data["stamps"].values())) <= {len(BlobStamp._fields)}:
                return None
            stamps = {digests[name]: made(BlobStamp, values) for name, values in data["stamps"].items()}
            return cls(manifest, selections, stamps, tuple(data["readers"]))
        except (ValueError, KeyError, TypeError, AttributeError, CacheError):
            return None


def _digests(data: dict[str, Any], known: Mapping[str, Digest]) -> dict[str, Digest]:
    """All that it names, by their hex. One object for each: a large cache names the same in several places."""
    texts = dict.fromkeys([item["digest"] for item in data["files"].values()]) | data["stamps"]
    digests = {text: known[text] for text in texts.keys() & known.keys()}
    return digests | Digest.parse_all(texts.keys() - digests.keys())


def _entries(files: dict[str, Any], digests: dict[str, Digest]) -> list[FileEntry]:
    """As they lie on disk, with one text for what is the same in thousands of records."""
    entries = []
    for path, item in files.items():
        digest, blob_id = digests[item["digest"]], item["blob_id"]
        blob_id = digest.hex if blob_id == digest.hex else blob_id
        entries.append(made(FileEntry, (sys.intern(path), int(item["size"]), digest, blob_id, item.get("xet_hash"))))
    return entries


def _paths(texts: list[str], manifest: Manifest) -> frozenset[str]:
    """The manifest's own texts. Raises ValueError where it has no such file."""
    wanted = frozenset(texts)
    paths = frozenset(filter(wanted.__contains__, manifest.files))
    if len(paths) != len(wanted):
        raise ValueError("names no file of the commit")
    return paths


class ManifestStore:
    """All records. Blocking: call it from disk threads."""

    def __init__(self, disk: Disk, layout: Layout) -> None:
        self._disk = disk
        self._layout = layout

    def read(self, repo_id: RepoId, commit: Commit, known: Mapping[str, Digest] | None = None) -> Record | None:
        """The record, or None where there is none that can be used. ``known``: digests by their hex, to share."""
        try:
            with open(self._layout.manifest(repo_id, commit), encoding="utf-8") as file:
                return Record.from_json(file.read(), repo_id, commit, known)
        except (FileNotFoundError, UnicodeDecodeError):
            return None

    def write(self, record: Record) -> None:
        """Replaces the record."""
        path = self._layout.manifest(record.manifest.repo_id, record.manifest.commit)
        self._disk.mkdir(os.path.dirname(path), 0o700)
        self._disk.replace_file(path, record.to_json().encode(), self._layout.staged("manifest"), 0o600)

    def remove(self, snapshot: SnapshotId) -> int:
        """Removes the record, and its directory when that was the last; what du lost."""
        path = self._layout.manifest(snapshot.repo_id, snapshot.commit)
        folder = os.path.dirname(path)
        sizes = bytes_of_name(path), bytes_of_name(folder)
        self._disk.unlink(path)
        return sizes[0] + (sizes[1] if self._disk.rmdir(folder) else 0)

    def of(self, repo_id: RepoId) -> dict[Commit, Record]:
        """Every record of the repository that can be used."""
        records: dict[Commit, Record] = {}
        known: dict[str, Digest] = {}
        try:
            names = os.listdir(f"{self._layout.manifests}/{repo_folder(repo_id)}")
        except (FileNotFoundError, NotADirectoryError):
            return records
        for name in sorted(names):
            commit = as_commit(name.removesuffix(".json"))
            record = self.read(repo_id, commit, known) if commit else None
            if commit is not None and record is not None:
                records[commit] = record
                known.update((entry.digest.hex, entry.digest) for entry in record.manifest.files.values())
        return records

    def folders(self) -> list[str]:
        """Names of the directories that hold records, each of one repository."""
        return sorted(os.listdir(self._layout.manifests))

    def sweep(self, snapshots: Collection[SnapshotId]) -> None:
        """At start: removes what is recorded of any other snapshot, readable or not, and folders that hold nothing."""
        for folder in self.folders():
            repo_id, path = repo_id_of_folder(folder), f"{self._layout.manifests}/{folder}"
            if repo_id is None:
                continue
            names = set(os.listdir(path))
            for name in sorted(names):
                commit = as_commit(name.removesuffix(".json"))
                if commit and SnapshotId(repo_id, commit) not in snapshots:
                    self._disk.unlink(f"{path}/{name}")
                    names.discard(name)
            if not names:
                self._disk.rmdir(path)

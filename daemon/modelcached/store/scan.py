"""What is really on the disk: read at start and whenever belief must meet fact. Changes nothing.

The files are the truth; everything in memory is made from what is found here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from modelcached.errors import CacheError
from modelcached.model import Algorithm, Commit, Digest, RepoId, Revision, SnapshotId, as_commit, made, parse_revision
from modelcached.store.layout import Layout, link_text
from modelcached.store.measure import BLOCK, Sizes, add, measure

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
"""What a disk that is well says of a link that is gone, or is none."""


class FoundBlob(NamedTuple):
    """A file in blobs/: of the content, where it is a link into the shared store."""

    inode: int
    size_bytes: int
    mtime_ns: int
    allocated_bytes: int
    link_count: int
    """st_nlink."""
    writable_by_others: bool
    """Somebody else could change its bytes after they were verified."""

    @classmethod
    def of(cls, status: os.stat_result, own_uid: int, allocated_bytes: int) -> FoundBlob:
        """By the stat of its content."""
        return made(
            cls,
            (
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
                allocated_bytes,
                status.st_nlink,
                status.st_uid != own_uid or bool(status.st_mode & 0o022),
            ),
        )


@dataclass(slots=True)
class FoundRepo:
    """A directory models--… in hub/."""

    repo_id: RepoId
    blobs: dict[Digest, FoundBlob] = field(default_factory=dict)
    shared: dict[Digest, str] = field(default_factory=dict)
    """huggingface_hub 2.x with Xet: the payload's path below hub/blobs/, for blobs that are links to one."""
    snapshots: dict[Commit, dict[str, Digest]] = field(default_factory=dict)
    """Path -> the blob it links to; without what is no link to a blob of this repository."""
    refs: dict[Revision, Commit] = field(default_factory=dict)
    trees: set[Commit] = field(default_factory=set)
    strangers: list[str] = field(default_factory=list)
    """What the layout has no place for: symlinked directories, *.incomplete, plain files."""
    sizes: Sizes = field(default_factory=dict)
    """As ``measure`` finds them: the same look tells both."""
    hollow: bool = False
    """It has a directory with nothing in it, or neither blobs nor snapshots."""

    def foreign_path(self, digest: Digest, repo_path: str) -> str | None:
        """Where the bytes of a blob are that is not ours alone; None for our own."""
        if digest in self.shared or self.blobs[digest].writable_by_others:
            return self.shared.get(digest, f"{repo_path}/blobs/{digest.hex}")
        return None


def _real_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


_LAYOUT = ("blobs", "snapshots", "trees", "refs")
_MISSES = ".no_exist"
"""huggingface_hub's: files that a commit is known not to have."""


class _Folder(NamedTuple):
    """A directory that is open, and what is in it. Its entries know their names, not their paths."""

    path: str
    descriptor: int
    entries: list[os.DirEntry[str]]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[_Folder]:
    """A large cache has a hundred thousand names: from an open directory each is found without its whole path.

    Raises FileNotFoundError where there is none (any more).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError as error:  # something else has taken its place
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    try:
        with os.scandir(descriptor) as entries:
            found = list(entries)
        yield _Folder(path, descriptor, found)
    finally:
        os.close(descriptor)


class _Scan:
    """One walk through a repository: each directory is read once, each entry looked at once."""

    def __init__(self, layout: Layout, repo_id: RepoId, known: Mapping[str, Digest], status: os.stat_result) -> None:
        self.found = FoundRepo(repo_id)
        self._hub = layout.hub
        self._digests = dict(known)
        self._sizes = self.found.sizes
        self._top = add(self._sizes, status)

    def run(self, root: str) -> None:
        directories = {}
        for entry in self._entries(root):
            if entry.name in _LAYOUT and entry.is_dir(follow_symlinks=False):
                add(self._sizes, entry.stat(follow_symlinks=False), self._top)
                directories[entry.name] = entry.path
            elif entry.name == _MISSES:
                self._sizes |= measure(entry.path)[0]
                self.found.hollow |= entry.is_dir(follow_symlinks=False) and not os.listdir(entry.path)
            else:
                self._stranger(entry.path)
        self.found.hollow |= "blobs" not in directories and "snapshots" not in directories
        # Blobs come first: whatever links to one shares its digest.
        for name, look in zip(_LAYOUT, (self._blobs, self._snapshots, self._trees, self._refs), strict=True):
            if name in directories:
                with contextlib.suppress(FileNotFoundError), _opened(directories[name]) as folder:
                    self.found.hollow |= not folder.entries and name != "refs"
                    look(folder)
        self.found.strangers.sort()

    @staticmethod
    def _entries(directory: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as entries:
                return list(entries)
        except FileNotFoundError:
            return []

    def _stranger(self, path: str) -> None:
        self.found.strangers.append(path)
        self._sizes |= measure(path)[0]

    def _digest(self, text: str) -> Digest | None:
        digest = self._digests.get(text)
        if digest is None and (digest := Digest.parse(text)) is not None:
            self._digests[text] = digest
        return digest

    # A large cache has hundreds of thousands of blobs and links: what is done for each is written out.

    def _blobs(self, folder: _Folder) -> None:
        own_uid = os.geteuid()
        numbers: dict[int, int] = {}  # most small files have the same size on disk; one number does for all
        for entry in folder.entries:
            digest = self._digests.get(entry.name) or self._digest(entry.name)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if digest is not None and stat.S_ISREG(status.st_mode):
                allocated = status.st_blocks * BLOCK
                allocated = numbers.setdefault(allocated, allocated)
                self.found.blobs[digest] = blob = FoundBlob.of(status, own_uid, allocated)
                self._sizes[blob.inode] = allocated
            elif digest is None or not self._shared_blob(f"{folder.path}/{entry.name}", digest, status):
                self._stranger(f"{folder.path}/{entry.name}")

    def _shared_blob(self, path: str, digest: Digest, status: os.stat_result) -> bool:
        """file_download.py, _create_symlink: a relative link into <cache>/blobs/<2 hex>/<xet hash>."""
        if not stat.S_ISLNK(status.st_mode):
            return False
        target = os.path.realpath(path)
        if not target.startswith(f"{os.path.realpath(self._hub)}/blobs/") or not os.path.isfile(target):
            return False
        add(self._sizes, status, self._top)
        content = os.stat(target)
        self.found.blobs[digest] = FoundBlob.of(content, os.geteuid(), content.st_blocks * BLOCK)
        self.found.shared[digest] = target
        return True

    def _snapshots(self, folder: _Folder) -> None:
        for entry in folder.entries:
            commit = as_commit(entry.name)
            if commit is None or not entry.is_dir(follow_symlinks=False):
                self._stranger(f"{folder.path}/{entry.name}")
                continue
            links = self.found.snapshots[commit] = {}
            pending = [("", f"{folder.path}/{entry.name}", link_text("", _NO_DIGEST))]
            for prefix, path, way in pending:
                with contextlib.suppress(FileNotFoundError), _opened(path) as inner:
                    add(self._sizes, os.fstat(inner.descriptor), self._top)
                    pending += [
                        (f"{prefix}{item.name}/", f"{path}/{item.name}", f"../{way}")
                        for item in self._links(inner, prefix, way, links)
                    ]

    def _links(self, folder: _Folder, prefix: str, way: str, links: dict[str, Digest]) -> Iterator[os.DirEntry[str]]:
        """Adds the folder's links; its folders."""
        descriptor, sizes, top, known = folder.descriptor, self._sizes, self._top, self._digests
        for item in folder.entries:
            if item.is_dir(follow_symlinks=False):
                yield item
                continue
            try:
                status = item.stat(follow_symlinks=False)
                text = os.readlink(item.name, dir_fd=descriptor) if stat.S_ISLNK(status.st_mode) else ""
            except FileNotFoundError:
                continue
            if status.st_nlink == 1 and text:
                sizes[top] += status.st_blocks * BLOCK
            else:
                add(sizes, status, top)
            if text.startswith(way):
                name = text[len(way) :]
                digest = known.get(name) or self._digest(name)
                if digest is not None:
                    # Thousands of snapshots have a config.json; one text does for all.
                    links[sys.intern(prefix + item.name)] = digest

    def _trees(self, folder: _Folder) -> None:
        for entry in folder.entries:
            commit = as_commit(entry.name.removesuffix(".json"))
            if commit is None or not entry.is_file(follow_symlinks=False):
                self._stranger(f"{folder.path}/{entry.name}")
                continue
            with contextlib.suppress(FileNotFoundError):
                add(self._sizes, entry.stat(follow_symlinks=False), self._top)
                self.found.trees.add(commit)

    def _refs(self, folder: _Folder) -> None:
        pending = [("", f"{folder.path}/{entry.name}", entry) for entry in folder.entries]
        for prefix, path, entry in pending:
            commit = None
            try:
                status = entry.stat(follow_symlinks=False)
                add(self._sizes, status, self._top)
                if stat.S_ISDIR(status.st_mode):
                    inside = self._entries(path)
                    self.found.hollow |= not inside
                    pending += [(f"{prefix}{entry.name}/", inner.path, inner) for inner in inside]
                    continue
                if stat.S_ISREG(status.st_mode) and status.st_size <= 128:
                    with open(path, encoding="ascii", errors="replace") as file:
                        commit = as_commit(file.read().strip())
            except FileNotFoundError:
                continue
            try:
                revision = parse_revision(prefix + entry.name)
            except CacheError:
                commit = None
            if commit is None:
                self.found.strangers.append(path)
            else:
                self.found.refs[revision] = commit


_NO_DIGEST = Digest(Algorithm.SHA256, "")


def scan_repo(layout: Layout, repo_id: RepoId, known: Mapping[str, Digest] | None = None) -> FoundRepo | None:
    """One repository; None where it has no directory of its own.

    ``known``: digests that there are already, by their hex; what is found shares them.
    """
    root = layout.repo(repo_id)
    try:
        status = os.lstat(root)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return None
    scan = _Scan(layout, repo_id, known or {}, status)
    scan.run(root)
    return scan.found


def snapshot_links(layout: Layout, snapshot: SnapshotId) -> dict[str, Digest] | None:
    """Path -> blob of what a snapshot's directory holds; None where there is none of its own."""
    root = layout.snapshot(snapshot)
    if not _real_directory(root):
        return None
    links: dict[str, Digest] = {}
    for folder, _, names in os.walk(root):
        prefix = os.path.relpath(folder, root)
        for name in names:
            path = name if prefix == "." else f"{prefix}/{name}"
            way = link_text(path, _NO_DIGEST)
            text = os.readlink(f"{folder}/{name}") if os.path.islink(f"{folder}/{name}") else ""
            if text.startswith(way) and (digest := Digest.parse(text.removeprefix(way))) is not None:
                links[path] = digest
    return links


def snapshot_stamps(
    layout: Layout, snapshot: SnapshotId, links: Mapping[str, Digest]
) -> dict[str, os.stat_result | None]:
    """Stat of the blob that a reader meets at each path; None where the way to it is not the one we made.

    Raises CacheError(STORAGE_ERROR) where a directory of the repository is a symlink, OSError where the disk does not
    say what is there.
    """
    layout.check_repo(snapshot.repo_id)
    root, blobs = layout.snapshot(snapshot), layout.blobs(snapshot.repo_id)
    folders = {"": _real_directory(root)}
    stamps: dict[str, os.stat_result | None] = {}
    for path, digest in links.items():
        stamps[path] = None
        folder = path.rpartition("/")[0]
        if not (folders[folder] if folder in folders else _real_folders(root, folder, folders)):
            continue
        try:
            if os.readlink(f"{root}/{path}") == link_text(path, digest):
                status = os.lstat(f"{blobs}/{digest.hex}")
                stamps[path] = status if stat.S_ISREG(status.st_mode) else None
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
    return stamps


def _real_folders(root: str, folder: str, known: dict[str, bool]) -> bool:
    """Whether the folder and all above it are directories of their own; looked at once each."""
    if folder not in known:
        known[folder] = _real_folders(root, folder.rpartition("/")[0], known) and _real_directory(f"{root}/{folder}")
    return known[folder]


def regular_status(path: str) -> os.stat_result | None:
    """Stat of a regular file, not through a symlink; None for anything else.

    Raises OSError where it cannot be seen: a disk that fails to answer does not say that the file is gone.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None

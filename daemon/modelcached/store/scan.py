"""What is really on the disk: read at start and whenever belief must meet fact. Changes nothing.

The files are the truth; everything in memory is made from what is found here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from modelcached.errors import CacheError
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, as_commit, parse_revision, repo_id_of_folder
from modelcached.store.layout import Layout, link_text
from modelcached.store.mounts import is_mounted, mounts_below

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
"""What a disk that is well says of a link that is gone, or is none."""

BLOCK = 512  # stat(2): st_blocks counts these, whatever the filesystem's own block is


@dataclass(frozen=True, slots=True)
class FoundBlob:
    """A file in blobs/."""

    status: os.stat_result
    """Of the content: of the target where the blob is a link into the shared store."""
    shared_target: str | None = None
    """huggingface_hub 2.x with Xet: the payload's path below hub/blobs/."""

    def writable_by_others(self, own_uid: int) -> bool:
        """Somebody else could change its bytes after they were verified."""
        return self.status.st_uid != own_uid or bool(self.status.st_mode & 0o022)


@dataclass(slots=True)
class FoundRepo:
    """A directory models--… in hub/."""

    repo_id: RepoId
    blobs: dict[Digest, FoundBlob] = field(default_factory=dict)
    snapshots: dict[Commit, dict[str, Digest | None]] = field(default_factory=dict)
    """Path -> the blob it links to; None for anything that is not a link to a blob of this repository."""
    refs: dict[Revision, Commit] = field(default_factory=dict)
    trees: set[Commit] = field(default_factory=set)
    strangers: list[str] = field(default_factory=list)
    """What the layout has no place for: symlinked directories, *.incomplete, plain files."""


def measure(
    path: str, *, skip: frozenset[str] = frozenset(), deep: bool = True
) -> tuple[dict[int, int], OSError | None]:
    """Allocated bytes by inode of all at and below path, as du -x counts; what vanishes meanwhile counts nothing.

    Other filesystems that are mounted below are nobody's business here: their bytes are not the cache's. The second
    is why not all of it could be seen (the last error), or None. Without ``deep``: of path alone.
    """
    sizes: dict[int, int] = {}
    unseen: OSError | None = None
    pending = [path]
    device: int | None = None
    while pending:
        current = pending.pop()
        try:
            status = os.lstat(current)
            if status.st_dev != (device := device or status.st_dev):
                continue
            sizes[status.st_ino] = status.st_blocks * BLOCK
            if not deep or not stat.S_ISDIR(status.st_mode):
                continue
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.path in skip:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        continue
                    try:
                        item = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if item.st_dev != device:
                        continue
                    sizes[item.st_ino] = item.st_blocks * BLOCK
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unseen = error
    return sizes, unseen


def bytes_of_name(path: str) -> int:
    """What du loses when this name goes: nothing where it is not there, or its inode has another name."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return status.st_blocks * BLOCK if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1 else 0


def _real_directory(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _blob(path: str, hub: str) -> FoundBlob | None:
    status = os.lstat(path)
    if stat.S_ISREG(status.st_mode):
        return FoundBlob(status)
    if stat.S_ISLNK(status.st_mode):
        # file_download.py, _create_symlink: a relative link into <cache>/blobs/<2 hex>/<xet hash>
        target = os.path.realpath(path)
        if target.startswith(f"{os.path.realpath(hub)}/blobs/") and os.path.isfile(target):
            return FoundBlob(os.stat(target), target)
    return None


def _links(directory: str) -> dict[str, Digest | None]:
    """The files below a snapshot's directory, and the blobs that they say they are."""
    links: dict[str, Digest | None] = {}
    pending = [("", directory)]
    while pending:
        prefix, current = pending.pop()
        depth = prefix.count("/")
        with os.scandir(current) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append((f"{name}/", entry.path))
                    continue
                links[name] = None
                if entry.is_symlink():
                    text = os.readlink(entry.path)
                    folder, _, blob = text.rpartition("/")
                    if folder == "../" * (depth + 2) + "blobs":
                        links[name] = Digest.parse(blob)
    return links


def _refs(directory: str) -> tuple[dict[Revision, Commit], list[str]]:
    refs: dict[Revision, Commit] = {}
    strangers: list[str] = []
    pending = [("", directory)]
    while pending:
        prefix, current = pending.pop()
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append((f"{prefix}{entry.name}/", entry.path))
                    continue
                commit = None
                if entry.is_file(follow_symlinks=False) and entry.stat().st_size <= 128:
                    with open(entry.path, encoding="ascii", errors="replace") as file:
                        commit = as_commit(file.read().strip())
                try:
                    revision = parse_revision(prefix + entry.name)
                except CacheError:
                    commit = None
                if commit is None:
                    strangers.append(entry.path)
                else:
                    refs[revision] = commit
    return refs, strangers


def _entries(found: FoundRepo, directory: str) -> Iterator[os.DirEntry[str]]:
    """What lies in one of the layout's directories; a stranger in its place was noted already."""
    if _real_directory(directory):
        with os.scandir(directory) as entries:
            yield from entries
    elif os.path.lexists(directory):
        found.strangers.append(directory)


def scan_repo(layout: Layout, repo_id: RepoId) -> FoundRepo | None:
    """One repository; None where it has no directory of its own."""
    root = layout.repo(repo_id)
    if not _real_directory(root):
        return None
    found = FoundRepo(repo_id)
    known = ("blobs", "snapshots", "refs", "trees", ".no_exist")
    found.strangers += [entry.path for entry in _entries(found, root) if entry.name not in known]
    for entry in _entries(found, f"{root}/blobs"):
        digest = Digest.parse(entry.name)
        blob = _blob(entry.path, layout.hub) if digest else None
        if digest and blob:
            found.blobs[digest] = blob
        else:
            found.strangers.append(entry.path)
    for entry in _entries(found, f"{root}/snapshots"):
        commit = as_commit(entry.name)
        if commit and entry.is_dir(follow_symlinks=False):
            found.snapshots[commit] = _links(entry.path)
        else:
            found.strangers.append(entry.path)
    for entry in _entries(found, f"{root}/trees"):
        commit = as_commit(entry.name.removesuffix(".json"))
        if commit and entry.is_file(follow_symlinks=False):
            found.trees.add(commit)
        else:
            found.strangers.append(entry.path)
    if _real_directory(f"{root}/refs"):
        found.refs, strangers = _refs(f"{root}/refs")
        found.strangers += strangers
    elif os.path.lexists(f"{root}/refs"):
        found.strangers.append(f"{root}/refs")
    found.strangers.sort()
    return found


def scan_hub(layout: Layout) -> tuple[dict[RepoId, FoundRepo], list[str]]:
    """Every repository in hub/, and the paths of what is none; a mount, or what holds one, is never entered."""
    repos: dict[RepoId, FoundRepo] = {}
    strangers: list[str] = []
    with os.scandir(layout.hub) as entries:
        names = sorted(entry.name for entry in entries)
    mounts = mounts_below(layout.hub)
    for name in names:
        repo_id = None if is_mounted(f"{layout.hub}/{name}", mounts) else repo_id_of_folder(name)
        found = scan_repo(layout, repo_id) if repo_id else None
        if found is None:
            strangers.append(f"{layout.hub}/{name}")
        else:
            repos[found.repo_id] = found
    return repos, strangers


def snapshot_links(layout: Layout, snapshot: SnapshotId) -> dict[str, Digest] | None:
    """Path -> blob of what a snapshot's directory holds; None where there is none of its own."""
    directory = layout.snapshot(snapshot)
    if not _real_directory(directory):
        return None
    return {path: digest for path, digest in _links(directory).items() if digest is not None}


def snapshot_stamps(
    layout: Layout, snapshot: SnapshotId, links: Mapping[str, Digest]
) -> dict[str, os.stat_result | None]:
    """Stat of the blob that a reader meets at each path; None where the way to it is not the one we made.

    Raises CacheError(STORAGE_ERROR) where a directory of the repository is a symlink, OSError where the disk does not
    say what is there.
    """
    layout.check_repo(snapshot.repo_id)
    root = layout.snapshot(snapshot)
    folders = {"": _real_directory(root)}
    stamps: dict[str, os.stat_result | None] = {}
    for path, digest in links.items():
        stamps[path] = None
        if not _real_folders(root, path.rpartition("/")[0], folders):
            continue
        try:
            if os.readlink(f"{root}/{path}") == link_text(path, digest):
                status = os.lstat(layout.blob(snapshot.repo_id, digest))
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


def free_bytes(path: str) -> tuple[int, int]:
    """What an unprivileged writer may still use (f_bavail), and the filesystem's size; bytes."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def regular_status(path: str) -> os.stat_result | None:
    """Stat of a regular file, not through a symlink; None for anything else.

    Raises OSError where it cannot be seen: a disk that fails to answer does not say that the file is gone.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None

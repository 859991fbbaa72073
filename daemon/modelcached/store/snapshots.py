"""Snapshots, refs and trees in hub/: published whole, grown by exchange, withdrawn by rename.

A reader sees the old set or the new one, never a mixture: a new directory is
built in staging/ and takes its place in one rename (invariant 1). The links in
it are relative, so that hub/ can be mounted anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping

from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Commit, Digest, Manifest, RepoId, Revision, SnapshotId
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout, link_text
from modelcached.store.measure import bytes_of_name, measure

_SHARED_MARKER = ".huggingface-shared-blobs"  # utils/_shared_blobs.py: SHARED_BLOBS_MARKER_NAME
_TREE_FORMAT_VERSION = 1  # huggingface_hub 2.4.0, _tree_cache.py: TREE_CACHE_FORMAT_VERSION


class SnapshotStore:
    """What workloads read. Blocking: call it from disk threads."""

    def __init__(self, disk: Disk, layout: Layout) -> None:
        self._disk = disk
        self._layout = layout

    def link_blob(self, digest: Digest, source: RepoId, target: RepoId) -> os.stat_result:
        """Gives target the blob that source has, as the same inode; its stat."""
        path = self._layout.blob(target, digest)
        directory = os.path.dirname(path)
        self._layout.check_real_directory(directory)
        self._layout.check_real_directory(os.path.dirname(self._layout.blob(source, digest)))
        self._disk.mkdir(os.path.dirname(directory))
        self._disk.mkdir(directory)
        staged = self._layout.staged(digest.hex)
        self._disk.link(self._layout.blob(source, digest), staged)
        try:
            self._disk.rename(staged, path)
        finally:
            if os.path.lexists(staged):  # it failed; or did nothing, as rename(2) does where both name one inode
                self._disk.unlink(staged)
        self._disk.sync_directory(directory)
        return os.lstat(path)

    def publish(self, snapshot: SnapshotId, links: Mapping[str, Digest], *, may_gap: bool) -> str | None:
        """Makes the snapshot hold exactly ``links`` (path -> blob), in one step.

        Where the filesystem cannot exchange two directories and one is there, there is a moment
        with none; that is done only if ``may_gap`` (nobody reads it), else refused.
        Returns the path of what was there before, out of readers' sight, or None. After an error from the last
        step, fsync, the new one is visible; after any other the old one is.
        """
        target = self._layout.snapshot(snapshot)
        parent = os.path.dirname(target)
        self._layout.check_real_directory(parent)
        self._disk.mkdir(os.path.dirname(parent))
        self._disk.mkdir(parent)
        staged = self._layout.staged(snapshot.commit)
        try:
            self._disk.mkdir(staged)
            made = {staged}
            for path, digest in sorted(links.items()):
                directory = staged
                *folders, name = path.split("/")
                for folder in folders:
                    directory = f"{directory}/{folder}"
                    if directory not in made:
                        self._disk.mkdir(directory)
                        made.add(directory)
                self._disk.symlink(link_text(path, digest), f"{directory}/{name}")
            for directory in sorted(made, reverse=True):
                self._disk.sync_directory(directory)
            trashed = self._put_in_place(snapshot, staged, target, may_gap=may_gap)
        except (OSError, CacheError):
            with contextlib.suppress(OSError):
                self._disk.remove_tree(staged)  # a full disk must not be filled with tries
            raise
        self._disk.sync_directory(parent)
        return trashed

    def _put_in_place(self, snapshot: SnapshotId, staged: str, target: str, *, may_gap: bool) -> str | None:
        if not os.path.lexists(target):
            self._disk.rename(staged, target)
            return None
        trashed = self._layout.trashed(snapshot.commit)
        if self._disk.exchange(staged, target):  # whatever it is: a symlink in its place is not followed
            try:
                self._disk.rename(staged, trashed)
            except OSError:
                return staged  # what was there before may be removed from here as well
        elif may_gap:
            self._disk.rename(target, trashed)
            try:
                self._disk.rename(staged, target)
            except OSError:
                self._disk.rename(trashed, target)
                raise
        else:
            raise CacheError(
                Reason.IN_USE,
                f"{snapshot} is leased, and the filesystem below cache.dir cannot exchange directories, "
                "so it cannot be given more files while it is read",
                metadata={"model": snapshot},
            )
        return trashed

    def withdraw(self, snapshot: SnapshotId) -> str | None:
        """Takes the snapshot out of readers' sight; its path in trash/, or None if it was not there."""
        target = self._layout.snapshot(snapshot)
        self._layout.check_real_directory(os.path.dirname(target))
        if not os.path.lexists(target):
            return None
        trashed = self._layout.trashed(snapshot.commit)
        self._disk.rename(target, trashed)
        try:
            self._disk.sync_directory(os.path.dirname(target))
        except OSError:  # a power loss might show it again, with its blobs gone
            with contextlib.suppress(OSError):
                self._disk.rename(trashed, target)
            raise
        return trashed

    def seal_blob(self, repo_id: RepoId, digest: Digest) -> os.stat_result:
        """Makes a blob that somebody else wrote read-only and durable, now that it was hashed; its stat."""
        path = self._layout.blob(repo_id, digest)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._disk.chmod(descriptor, 0o444, path)
            self._disk.sync(descriptor, path)
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def adopt_shared_blob(self, repo_id: RepoId, digest: Digest, target: str) -> None:
        """Turns huggingface_hub 2.x's link into the shared store into a name of the inode itself."""
        path = self._layout.blob(repo_id, digest)
        self._layout.check_real_directory(os.path.dirname(path))
        staged = self._layout.staged(digest.hex)
        self._disk.link(target, staged)
        try:
            self._disk.rename(staged, path)
        except OSError:
            self._disk.unlink(staged)
            raise

    def remove_shared_payload(self, target: str) -> None:
        """Removes the shared store's own name with its list of references and its lock, and the store with its last."""
        directory = os.path.dirname(target)
        store = os.path.dirname(directory)
        self._layout.check_real_directory(directory)
        for path in (target, f"{target}.refs", f"{target}.lock"):
            self._disk.unlink(path)
        if self._disk.rmdir(directory) and os.listdir(store) == [_SHARED_MARKER]:
            self._disk.unlink(f"{store}/{_SHARED_MARKER}")
            self._disk.rmdir(store)

    def remove_blob(self, repo_id: RepoId, digest: Digest) -> int:
        """Removes one name of a blob; its bytes go with the last name. What du lost."""
        return self._remove(self._layout.blob(repo_id, digest))

    def _remove(self, path: str) -> int:
        self._layout.check_real_directory(os.path.dirname(path))
        freed = bytes_of_name(path)
        self._disk.unlink(path)
        return freed

    def keep_bad_blob(self, repo_id: RepoId, digest: Digest) -> str:
        """Gives a bad blob a name in quarantine too; where.

        Its time changes, so that no record believes in any name of the inode: bits that rot leave size and time as
        they were.
        """
        path, target = self._layout.blob(repo_id, digest), f"{self._layout.quarantine}/{digest.hex}"
        self._disk.touch(path)
        if os.path.lexists(target) and not os.path.samestat(os.lstat(path), os.lstat(target)):
            self._disk.remove_tree(target)
        if not os.path.lexists(target):
            self._disk.link(path, target)
        return target

    def empty(self, directory: str, before: float) -> list[str]:
        """Removes what came into trash/, staging/ or quarantine/ before then (seconds since the epoch); its names."""
        removed, old = [], []
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # put in its place, or removed, while we look
                    # Renaming into it set ctime; mtime is still that of the download.
                    if entry.stat(follow_symlinks=False).st_ctime < before:
                        old.append(entry.path)
        for path in sorted(old):
            self._disk.remove_tree(path)
            removed.append(os.path.basename(path))
        return removed

    def remove_name(self, directory: str, name: str) -> None:
        """Removes one thing from trash/ or quarantine/; it may have gone already."""
        self._disk.remove_tree(f"{directory}/{name}")

    def write_ref(self, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
        """Points a branch or tag at the commit."""
        path = self._layout.ref(repo_id, revision)
        directory = os.path.dirname(path)
        self._layout.check_real_directory(directory)
        missing = []
        while directory != self._layout.hub and not os.path.isdir(directory):  # hub/ itself is never made anew
            missing.append(directory)
            directory = os.path.dirname(directory)
        for folder in reversed(missing):
            if os.path.lexists(folder):  # a ref of that name: git allows no such pair, so it is out of date
                self._disk.unlink(folder)
            self._disk.mkdir(folder)
        if os.path.isdir(path) and not os.path.islink(path):
            self._disk.remove_tree(path)
        self._disk.replace_file(path, commit.encode(), self._layout.staged("ref"))

    def says(self, repo_id: RepoId, revision: Revision, commit: Commit) -> bool:
        """The branch or tag points at the commit, by a file of its own."""
        path = self._layout.ref(repo_id, revision)
        self._layout.check_real_directory(os.path.dirname(path))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return os.read(descriptor, len(commit) + 1) == commit.encode()
        finally:
            os.close(descriptor)

    def remove_ref(self, repo_id: RepoId, revision: Revision) -> int:
        """Removes a branch or tag, and the folders of its name that hold no other; what du lost."""
        path = self._layout.ref(repo_id, revision)
        freed, directory = self._remove(path), os.path.dirname(path)
        while directory != f"{self._layout.repo(repo_id)}/refs":
            size = bytes_of_name(directory)
            if not self._disk.rmdir(directory):
                break
            freed, directory = freed + size, os.path.dirname(directory)
        return freed

    def remove_empty_ref_folders(self, repo_id: RepoId) -> None:
        """At start: those that a kill has left behind a branch or tag."""
        root = f"{self._layout.repo(repo_id)}/refs"
        if os.path.islink(root):
            return
        for directory, _, _ in os.walk(root, topdown=False):
            if directory != root and not os.listdir(directory):
                self._disk.rmdir(directory)

    def write_tree(self, manifest: Manifest) -> None:
        """huggingface_hub's listing, for a snapshot that holds every file of its commit.

        Where it says more than the snapshot holds, offline snapshot_download raises
        IncompleteSnapshotError (_snapshot_download.py): so only then.
        """
        files = {}
        for path, entry in sorted(manifest.files.items()):
            item: dict[str, object] = {"size": entry.size_bytes, "blob_id": entry.blob_id}
            if entry.digest.algorithm is Algorithm.SHA256:
                item |= {"lfs_sha256": entry.digest.hex, "lfs_size": entry.size_bytes}
            if entry.xet_hash:
                item["xet_hash"] = entry.xet_hash
            files[path] = item
        path = self._layout.tree(SnapshotId(manifest.repo_id, manifest.commit))
        self._layout.check_real_directory(os.path.dirname(path))
        self._disk.mkdir(os.path.dirname(path))
        content = json.dumps({"format_version": _TREE_FORMAT_VERSION, "files": files}, indent=1)
        self._disk.replace_file(path, content.encode(), self._layout.staged("tree"))

    def remove_tree_file(self, snapshot: SnapshotId) -> int:
        """Removes huggingface_hub's listing; what du lost."""
        path = self._layout.tree(snapshot)
        self._layout.check_real_directory(os.path.dirname(path))
        return self._remove(path) if os.path.lexists(path) else 0

    def remove_empty_repo(self, repo_id: RepoId) -> int:
        """Removes a repository's directories once nothing is in them; what du lost."""
        repo = self._layout.repo(repo_id)
        self._layout.check_real_directory(repo)
        if not os.path.isdir(repo):
            return 0
        freed = 0
        for name in ("snapshots", "blobs", "trees", ".no_exist"):
            freed += self._rmdir(f"{repo}/{name}") if os.path.isdir(f"{repo}/{name}") else 0
        if os.path.isdir(f"{repo}/snapshots") or os.path.isdir(f"{repo}/blobs"):
            return freed
        refs, _ = measure(f"{repo}/refs")
        self._disk.remove_tree(f"{repo}/refs")
        return freed + sum(refs.values()) + self._rmdir(repo)

    def _rmdir(self, path: str) -> int:
        size = bytes_of_name(path)
        return size if self._disk.rmdir(path) else 0

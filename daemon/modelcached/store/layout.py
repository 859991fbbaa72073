"""Where everything lies.

::

    <cache.dir>/
      hub/                                all that workloads see (their HF_HUB_CACHE)
        models--org--name/
          blobs/<sha256 | git-sha1>       0444; the name is the digest
          snapshots/<commit>/path -> ../../blobs/<digest>
          refs/<revision>                 40 hex, no newline
          trees/<commit>.json             only where the snapshot holds every file of the commit
      modelcached/                        0700, the daemon's own
        owner.lock  state.db  ballast
        manifests/models--org--name/<commit>.json
        partial/<digest>  partial/<digest>.journal
        staging/  trash/  quarantine/

Read from huggingface_hub 2.4.0: file_download.py (repo_folder_name, _get_pointer_path), _tree_cache.py.
"""

from __future__ import annotations

import itertools
import os
import stat
from dataclasses import dataclass

from modelcached.errors import CacheError, Reason
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, repo_folder

_names = itertools.count()


def link_text(path: str, digest: Digest) -> str:
    """What a snapshot's link at that path says: relative, so that hub/ can be mounted anywhere."""
    return "../" * (path.count("/") + 2) + f"blobs/{digest.hex}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths, all absolute, all strings; nothing here touches the disk but ``check_real_directory``."""

    cache_dir: str

    @property
    def hub(self) -> str:
        """What workloads mount."""
        return f"{self.cache_dir}/hub"

    @property
    def private(self) -> str:
        """What no workload ever sees."""
        return f"{self.cache_dir}/modelcached"

    @property
    def partial(self) -> str:
        """Unfinished blobs and their journals."""
        return f"{self.private}/partial"

    @property
    def staging(self) -> str:
        """Things on their way into hub/, by rename."""
        return f"{self.private}/staging"

    @property
    def trash(self) -> str:
        """Things out of sight, not yet off the disk."""
        return f"{self.private}/trash"

    @property
    def quarantine(self) -> str:
        """Blobs whose content is not what their name says."""
        return f"{self.private}/quarantine"

    @property
    def manifests(self) -> str:
        """What commits hold, and which selections are complete."""
        return f"{self.private}/manifests"

    @property
    def state_db(self) -> str:
        """What files cannot say."""
        return f"{self.private}/state.db"

    @property
    def owner_lock(self) -> str:
        """Held while a daemon owns this cache."""
        return f"{self.private}/owner.lock"

    def repo(self, repo_id: RepoId) -> str:
        """The repository's directory."""
        return f"{self.hub}/{repo_folder(repo_id)}"

    def blob(self, repo_id: RepoId, digest: Digest) -> str:
        """A finished blob."""
        return f"{self.blobs(repo_id)}/{digest.hex}"

    def blobs(self, repo_id: RepoId) -> str:
        """The directory of the repository's finished blobs."""
        return f"{self.repo(repo_id)}/blobs"

    def snapshot(self, snapshot: SnapshotId) -> str:
        """A snapshot's directory."""
        return f"{self.repo(snapshot.repo_id)}/snapshots/{snapshot.commit}"

    def snapshot_path(self, snapshot: SnapshotId) -> str:
        """The same, relative to hub/: what the answer says."""
        return f"{repo_folder(snapshot.repo_id)}/snapshots/{snapshot.commit}"

    def ref(self, repo_id: RepoId, revision: Revision) -> str:
        """The file that says which commit a branch or tag means."""
        return f"{self.repo(repo_id)}/refs/{revision}"

    def tree(self, snapshot: SnapshotId) -> str:
        """huggingface_hub's listing of a commit."""
        return f"{self.repo(snapshot.repo_id)}/trees/{snapshot.commit}.json"

    def manifest(self, repo_id: RepoId, commit: Commit) -> str:
        """Our record of a commit."""
        return f"{self.manifests}/{repo_folder(repo_id)}/{commit}.json"

    def partial_data(self, digest: Digest) -> str:
        """The preallocated data of an unfinished blob."""
        return f"{self.partial}/{digest.hex}"

    def partial_journal(self, digest: Digest) -> str:
        """Which ranges of it are done."""
        return f"{self.partial}/{digest.hex}.journal"

    def staged(self, label: str) -> str:
        """A path in staging/ that nothing uses."""
        return f"{self.staging}/{os.getpid()}-{next(_names)}-{label}"

    def trashed(self, label: str) -> str:
        """A path in trash/ that nothing uses."""
        return f"{self.trash}/{os.getpid()}-{next(_names)}-{label}"

    def check_repo(self, repo_id: RepoId) -> None:
        """Refuses a repository one of whose directories is none, or a symlink; see ``check_real_directory``."""
        repo = self.repo(repo_id)
        self.check_real_directory(repo)
        for name in ("blobs", "snapshots", "refs", "trees"):
            self._check_real(f"{repo}/{name}")

    def check_real_directory(self, path: str) -> None:
        """Refuses a directory below cache.dir that is reached through a symlink, or is none.

        Whoever can write into hub/ could otherwise lead the daemon, which may be root, out of it.
        What does not exist yet is fine. Raises CacheError(STORAGE_ERROR) that names the culprit.
        """
        current = self.cache_dir
        for part in path.removeprefix(f"{current}/").split("/"):
            current = f"{current}/{part}"
            if not self._check_real(current):
                return

    @staticmethod
    def _check_real(path: str) -> bool:
        """Whether there is one."""
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            kind = "a symlink" if stat.S_ISLNK(mode) else "not a directory"
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"{path} is {kind}, where the cache keeps a directory of its own",
                metadata={"path": path},
                mend="remove it",
            )
        return True

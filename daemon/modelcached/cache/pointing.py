"""Pointing branches and tags at snapshots: the last step of a publication, and of a hit by a new name."""

from __future__ import annotations

from modelcached.cache.core import Core
from modelcached.cache.uninterrupted import uninterrupted
from modelcached.model import Commit, RepoId, Revision, repo_folder
from modelcached.store.disk import storage_error


async def point(core: Core, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
    """Points a branch or tag at a snapshot that is whole, unless it has moved on. Raises CacheError(STORAGE_ERROR)."""
    try:
        await uninterrupted(_point(core, repo_id, revision, commit))
    except OSError as error:
        raise storage_error(error, f"pointing {revision} of {repo_id} to {commit}") from error


async def _point(core: Core, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
    async with core.branches.pointing((repo_id, revision)):
        now = core.index.repo(repo_id).refs.get(revision)
        if now is not None and core.branches.has_left(repo_id, revision, commit, now):
            return  # while this commit was coming another request has brought what the branch is now
        if now == commit and await core.pools.on_disk(core.snapshots.says, repo_id, revision, commit):
            return
        await core.settled(repo_id)
        await _write(core, repo_id, revision, commit)


async def _write(core: Core, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
    refs = core.index.repo(repo_id).refs
    before = refs.get(revision)
    # Believed before it is written: an eviction that begins meanwhile must not take the ref for its own.
    refs[revision] = commit
    try:
        await core.pools.on_disk(core.snapshots.write_ref, repo_id, revision, commit)
    except Exception:
        if before is None:
            refs.pop(revision, None)
        else:
            refs[revision] = before
        raise
    core.use.named(repo_id, revision, commit)
    await core.measure(repo_folder(repo_id))  # a hit by a new name ends here

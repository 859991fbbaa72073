"""Taking a snapshot off the disk: condemned on the event loop in the step that checks, removed in a thread.

The order keeps every moment safe for readers and for a kill: refs first point
elsewhere, then the snapshot vanishes whole, then blobs that nothing needs, then
the record. Nothing here must be able to write before it has unlinked: this is
what runs when the disk is full.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

import structlog

from modelcached.cache.core import Core
from modelcached.errors import CacheError, Reason
from modelcached.events import SnapshotEvicted
from modelcached.ledger.use import Protection
from modelcached.ledger.victims import Candidate, Inode, Name, Shares, Victim, choose
from modelcached.model import Commit, Digest, Revision, SnapshotId
from modelcached.store.index import Snapshot, SnapshotState

log = structlog.get_logger()

_LINK_BYTES = 4096
"""A link to a SHA-256 blob is 76 characters, over ext4's 59 inline: a block each."""


def protections(core: Core, snapshot: Snapshot) -> list[Protection]:
    """What keeps the snapshot from going."""
    return core.use.protections(snapshot.id, core.refs())


def evictable(core: Core) -> list[SnapshotId]:
    """What may go now, least recently used first."""
    refs = core.refs()
    free = [
        s.id
        for s in core.index.snapshots()
        if s.state is not SnapshotState.CONDEMNED and not core.use.protections(s.id, refs)
    ]
    return core.use.order(free)


def shares(core: Core) -> Shares:
    """Who shares which blob, as believed now."""
    users: Counter[Name] = Counter()
    inodes: dict[Name, Inode] = {}
    for repo_id, repo in core.index.repos.items():
        for snapshot in repo.snapshots.values():
            if snapshot.state is not SnapshotState.CONDEMNED:
                users.update(Name(repo_id, digest) for digest in snapshot.digests)
        for digest, blob in repo.blobs.items():
            name = Name(repo_id, digest)
            users[name] += core.use.holds(name)
            inodes[name] = Inode(blob.stamp.inode, blob.allocated_bytes, blob.link_count)
    return Shares(users, inodes)


def candidate(snapshot: Snapshot) -> Candidate:
    """The snapshot as the rules see it."""
    names = frozenset(Name(snapshot.id.repo_id, digest) for digest in snapshot.digests)
    folders = {path.rpartition("/")[0] for path in snapshot.links}
    return Candidate(snapshot.id, names, _LINK_BYTES * (len(snapshot.links) + len(folders)))


def plan(core: Core, wanted_bytes: int) -> tuple[list[Victim], int]:
    """The snapshots that would go to free that much, and what they free."""
    found = (core.index.snapshot(snapshot) for snapshot in evictable(core))
    return choose((candidate(s) for s in found if s is not None), shares(core), wanted_bytes)


def plan_of(core: Core, snapshots: Iterable[SnapshotId]) -> list[Victim]:
    """What each of those would free, one after the other."""
    books = shares(core)
    found = (core.index.snapshot(snapshot) for snapshot in snapshots)
    return [books.remove(candidate(s)) for s in found if s is not None]


def check(core: Core, ids: Iterable[SnapshotId]) -> list[Snapshot]:
    """The snapshots that there are; refuses with IN_USE, naming who holds it, where one may not go."""
    found = [snapshot for i in ids if (snapshot := core.index.snapshot(i)) is not None]
    # One whose eviction failed may be condemned anew; one that is going goes.
    found = [snapshot for snapshot in found if snapshot.id not in core.evictions]
    for snapshot in found:
        if holders := protections(core, snapshot):
            raise CacheError(
                Reason.IN_USE,
                f"{snapshot.id} is in use: {'; '.join(map(str, holders))}",
                metadata={"model": snapshot.id, **{f"holder_{n}": holder for n, holder in enumerate(holders)}},
            )
    return found


def condemn(core: Core, ids: Iterable[SnapshotId], reason: str) -> list[asyncio.Task[int]]:
    """Checks all and condemns all in one step of the event loop (invariant 3), or refuses with IN_USE."""
    tasks = []
    for snapshot in check(core, ids):
        snapshot.state = SnapshotState.CONDEMNED
        # Names that go are out of the books at once: nobody may link to them from now on.
        # What a request under way will link to stays, though its snapshot goes.
        repo_id = snapshot.id.repo_id
        names = [
            digest
            for digest in snapshot.digests
            if not core.index.needed(repo_id, digest, without=snapshot.id) and not core.use.holds(Name(repo_id, digest))
        ]
        for digest in names:
            core.index.drop_link(repo_id, digest)
        task = asyncio.create_task(_remove(core, snapshot, names, reason), name=f"evict {snapshot.id}")
        core.evictions[snapshot.id] = task
        tasks.append(task)
    return tasks


async def finished(tasks: list[asyncio.Task[int]]) -> list[int | BaseException]:
    """What each eviction freed, or why it failed. Cancelling the wait must not end a removal half-way."""
    if tasks:
        await asyncio.wait(tasks)
    return [task.exception() or task.result() for task in tasks]


async def _remove(core: Core, snapshot: Snapshot, names: list[Digest], reason: str) -> int:
    """Off the disk; how much du lost."""
    before = core.space.used_bytes
    repo = core.index.repo(snapshot.id.repo_id)
    try:
        moves = {revision: _successor(core, snapshot, revision) for revision in core.index.revisions(snapshot.id)}
        # Requests that come from now on wait until this has settled; one under way needs its directories.
        last = not core.use.holds_in(snapshot.id.repo_id)
        await core.pools.on_disk(_remove_from_disk, core, snapshot, names, moves, last=last)
        for revision, successor in moves.items():
            if successor is None:
                repo.refs.pop(revision, None)
            else:
                repo.refs[revision] = successor
        repo.snapshots.pop(snapshot.id.commit, None)
        if not repo.snapshots and not repo.blobs:
            core.index.repos.pop(snapshot.id.repo_id, None)
        core.use.forget(snapshot.id)
        await core.measure_after(snapshot.id.repo_id)
        freed = before - core.space.used_bytes
        log.info("evicted", model=str(snapshot.id), freed_bytes=freed, reason=reason)
        core.degraded.pop("eviction", None)
        core.observe(SnapshotEvicted(snapshot.id.repo_id, snapshot.id.commit, freed, reason))
    except (OSError, CacheError) as error:
        # Whatever stage it reached, the next start finishes or forgets it; until then nobody is served from it.
        core.degraded["eviction"] = f"{snapshot.id} could not be removed: {error}"
        log.exception("eviction failed", model=str(snapshot.id))
        raise CacheError(Reason.STORAGE_ERROR, f"{snapshot.id} could not be removed: {error}") from error
    else:
        return freed
    finally:
        core.evictions.pop(snapshot.id, None)


def _successor(core: Core, snapshot: Snapshot, revision: Revision) -> Commit | None:
    """The newest other cached commit that the ref has named."""
    repo = core.index.repo(snapshot.id.repo_id)
    for commit in core.use.formerly(snapshot.id.repo_id, revision):
        other = repo.snapshots.get(commit)
        if commit != snapshot.id.commit and other is not None and other.state is not SnapshotState.CONDEMNED:
            return commit
    return None


def _remove_from_disk(
    core: Core, snapshot: Snapshot, names: list[Digest], moves: dict[Revision, Commit | None], *, last: bool
) -> None:
    repo_id = snapshot.id.repo_id
    core.layout.check_repo(repo_id)  # all of it or nothing: half an eviction would be found at the next start only
    for revision, successor in moves.items():
        try:
            if successor is not None:
                core.snapshots.write_ref(repo_id, revision, successor)
                continue
        except OSError as error:  # full: a ref that is gone is safe, one that points to nothing is not
            log.warning("ref could not be moved back, removing it", revision=revision, why=str(error))
        core.snapshots.remove_ref(repo_id, revision)
    core.snapshots.remove_tree_file(snapshot.id)
    trashed = core.snapshots.withdraw(snapshot.id)
    for digest in names:
        core.snapshots.remove_blob(repo_id, digest)
    core.manifests.remove(snapshot.id)
    if trashed is not None:
        core.disk.remove_tree(trashed)
    if last:
        core.snapshots.remove_empty_repo(repo_id)

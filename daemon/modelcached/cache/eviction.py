"""Taking a snapshot off the disk: condemned on the event loop in the step that checks, removed in a thread.

The order keeps every moment safe for readers and for a kill: refs first point
elsewhere, then the snapshot vanishes whole, then blobs that nothing needs, then
the record. Nothing here must be able to write before it has unlinked: this is
what runs when the disk is full.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Iterator

import structlog

from modelcached.cache.core import Core
from modelcached.errors import CacheError, Reason
from modelcached.events import SnapshotEvicted
from modelcached.ledger.space import Amount
from modelcached.ledger.use import PinOwner, Protection
from modelcached.ledger.victims import Books, Candidate, Name, Shares, Victim, choose
from modelcached.model import Commit, Digest, RepoId, Revision, SnapshotId, repo_folder
from modelcached.store.index import Blob, Snapshot, SnapshotState
from modelcached.store.measure import measure

log = structlog.get_logger()

_LINK_BYTES = 4096
"""A link to a SHA-256 blob is 76 characters, over ext4's 59 inline: a block each."""
_TRY_AGAIN_SECONDS = 60.0
"""A victim that could not be removed is passed over for so long; a person may try at once."""


def protections(core: Core, snapshot: Snapshot) -> list[Protection]:
    """What keeps the snapshot from going."""
    repo = core.index.repos.get(snapshot.id.repo_id)
    return core.use.protections(snapshot.id, {snapshot.id.repo_id: repo.refs} if repo is not None else {})


def evictable(core: Core) -> Iterator[Snapshot]:
    """What may go now, in the order in which it goes. Each is judged when it is reached: most never are."""
    refs, now = core.refs(), time.monotonic()
    is_young = core.use.used_within(core.config.cache.min_age.total_seconds())
    there = {s.id: s for s in core.index.snapshots() if s.state is not SnapshotState.CONDEMNED}
    for snapshot_id in core.use.eviction_order(there, refs):
        if core.unremovable.get(snapshot_id, now) > now or is_young(snapshot_id):
            continue
        if not core.use.protected(snapshot_id, refs):
            yield there[snapshot_id]


def shares(core: Core) -> Shares:
    """Who shares which blob, as believed in this step of the event loop: not to be kept for another."""

    def open_books(repo_id: RepoId) -> Books:
        repo = core.index.repo(repo_id)
        others = repo.shared()
        if core.use.holds_in(repo_id):
            others.update(digest for digest in repo.blobs if core.use.holds(Name(repo_id, digest)))
        return Books(others, repo.blobs)

    return Shares(open_books)


def candidate(snapshot: Snapshot) -> Candidate:
    """The snapshot as the rules see it."""
    own = len(snapshot.links) + snapshot.folders
    return Candidate(snapshot.id, snapshot.digests, _LINK_BYTES * own, own + 1)


def plan(core: Core, wanted: Amount, among: Iterable[Snapshot] | None = None) -> tuple[list[Victim], Amount]:
    """The snapshots that would go to free that much, and what they free; of ``among``, in that order, else of all."""
    return choose(map(candidate, evictable(core) if among is None else among), shares(core), wanted)


def plan_of(core: Core, snapshots: Iterable[SnapshotId]) -> list[Victim]:
    """What each of those would free, one after the other."""
    books = shares(core)
    found = (core.index.snapshot(snapshot) for snapshot in snapshots)
    return [books.remove(candidate(s)) for s in found if s is not None]


def check(core: Core, ids: Iterable[SnapshotId]) -> list[Snapshot]:
    """The snapshots that there are; refuses with IN_USE, naming who holds it, where one may not go."""
    core.check_hub()
    found = [snapshot for i in ids if (snapshot := core.index.snapshot(i)) is not None]
    found = [snapshot for snapshot in found if snapshot.id not in core.evictions]  # one that is going goes
    for snapshot in found:
        if holders := protections(core, snapshot):
            raise CacheError(
                Reason.IN_USE,
                f"{snapshot.id} is in use: {'; '.join(map(str, holders))}",
                metadata={"model": snapshot.id, **{f"holder_{n}": holder for n, holder in enumerate(holders)}},
                mend=_ways_to_free(core, snapshot.id, holders),
            )
    return found


def _ways_to_free(core: Core, snapshot_id: SnapshotId, holders: Iterable[Protection]) -> str:
    """What takes each kind of protection away."""
    repo_id, kinds = snapshot_id.repo_id, {holder.kind for holder in holders}
    ways = []
    if "leased" in kinds:
        ways.append(f"stop who holds it, or end its leases with cachectl release --model {repo_id}")
    for pin in sorted(core.use.pins_on(snapshot_id, core.refs()) if "pinned" in kinds else (), key=str):
        listed = pin.owner is PinOwner.LIST
        own = f"cachectl unpin {pin.repo_id}@{pin.revision}"
        ways.append("remove its line from the model list (models.file)" if listed else own)
    if "held" in kinds:
        ways.append(f"wait for the request, or end it with cachectl cancel {repo_id}")
    return "; ".join(dict.fromkeys(ways))


def condemn(core: Core, ids: Iterable[SnapshotId], reason: str, *, leisurely: bool = False) -> list[asyncio.Task[int]]:
    """Checks all and condemns all in one step of the event loop (invariant 3), or refuses with IN_USE.

    ``leisurely``: nobody waits for it, so that it pauses between files as the pacer says.
    """
    tasks = []
    for snapshot in check(core, ids):
        removal = _Removal(core, snapshot, reason, leisurely=leisurely)
        removal.condemn()
        tasks.append(_begin(core, removal, f"evict {snapshot.id}"))
    return tasks


def withdraw(core: Core, snapshot: Snapshot) -> asyncio.Task[int]:
    """Takes a snapshot that is not right any more out of readers' sight; its blobs stay.

    The caller has seen, in this step of the event loop, that nothing protects it.
    """
    snapshot.state = SnapshotState.UNVERIFIED  # what it is where the disk does not let it go
    removal = _Removal(core, snapshot, "bad")
    snapshot.state = SnapshotState.CONDEMNED
    return _begin(core, removal, f"withdraw {snapshot.id}")


def _begin(core: Core, removal: _Removal, name: str) -> asyncio.Task[int]:
    core.evictions[removal.snapshot.id] = task = asyncio.create_task(removal.run(), name=name)
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it has told of it, if nobody asks
    return task


async def remove_if_bare(core: Core, repo_id: RepoId) -> None:
    """The directories of a repository of which nothing is left, and that nobody is about to put anything into.

    For who has just taken the last of it, or has put something there and failed: another's empty directories may be
    about to be filled.
    """

    def remove() -> int:
        core.check_hub_on_disk()
        return core.snapshots.remove_empty_repo(repo_id)

    async with core.taking_from(repo_id):
        if not _is_bare(core, repo_id):
            return
        core.index.repos.pop(repo_id, None)
        try:
            freed = await core.pools.on_disk(remove)
        except (OSError, CacheError) as error:  # the next start tries again
            log.warning("cannot remove a repository's empty directories", repo_id=repo_id, why=str(error))
            return
        if freed:
            await core.measure_after(repo_id)


def _is_bare(core: Core, repo_id: RepoId) -> bool:
    repo = core.index.repos.get(repo_id)
    in_use = core.use.holds_in(repo_id) or core.lands_in(repo_id)
    return not in_use and (repo is None or not (repo.snapshots or repo.blobs))


class _Removal:
    """One snapshot on its way off the disk. A step that fails leaves it as whole as it then is, and known."""

    def __init__(self, core: Core, snapshot: Snapshot, reason: str, *, leisurely: bool = False) -> None:
        self._core = core
        self.snapshot = snapshot
        self._reason = reason
        self._leisurely = leisurely
        self._was = snapshot.state
        self._blobs: dict[Digest, Blob] = {}

    def condemn(self) -> None:
        """From this step on nobody is served from it, and nobody links to the names that go with it.

        What a request under way will link to stays, though its snapshot goes.
        """
        core, snapshot = self._core, self.snapshot
        repo_id = snapshot.id.repo_id
        snapshot.state = SnapshotState.CONDEMNED
        for digest in sorted(snapshot.digests):
            if core.index.needed(repo_id, digest, without=snapshot.id) or core.use.holds(Name(repo_id, digest)):
                continue
            if (blob := core.index.drop_link(repo_id, digest)) is not None:
                self._blobs[digest] = blob

    async def run(self) -> int:
        """How much du lost. Raises CacheError(STORAGE_ERROR)."""
        core, snapshot = self._core, self.snapshot
        try:
            async with core.removing(snapshot.id.repo_id):
                freed = await self._withdraw()
                freed += await self._clean_up()
            log.info("evicted", model=str(snapshot.id), freed_bytes=freed, reason=self._reason)
            core.unremovable.pop(snapshot.id, None)
            if not core.unremovable:
                core.degraded.pop("eviction", None)
            core.observe(SnapshotEvicted(snapshot.id.repo_id, snapshot.id.commit, freed, self._reason))
        except (OSError, CacheError) as error:
            core.degraded["eviction"] = f"{snapshot.id} could not be removed: {error}"
            log.exception("eviction failed", model=str(snapshot.id))
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"{snapshot.id} could not be removed: {error}",
                metadata={"model": snapshot.id, "errno": errno.errorcode.get(getattr(error, "errno", 0) or 0, "")},
            ) from error
        else:
            return freed
        finally:
            core.evictions.pop(snapshot.id, None)

    async def _withdraw(self) -> int:
        """Out of readers' sight. Where that fails it is still there for them, and may be served and evicted anew."""
        core, snapshot = self._core, self.snapshot
        repo = core.index.repo(snapshot.id.repo_id)
        moves = {revision: _successor(core, snapshot, revision) for revision in core.index.revisions(snapshot.id)}
        try:
            self._trashed, freed = await core.pools.on_disk(_withdraw_from_disk, core, snapshot, moves)
        except (OSError, CacheError):
            # A ref that has moved on the disk and not in belief is written anew by the next hit.
            snapshot.state = self._was
            for digest, blob in self._blobs.items():
                core.index.add_link(snapshot.id.repo_id, digest, blob)
            core.unremovable[snapshot.id] = time.monotonic() + _TRY_AGAIN_SECONDS
            await core.measure_after(snapshot.id.repo_id)  # refs and listing may be gone
            raise
        for revision, successor in moves.items():
            if successor is None:
                repo.refs.pop(revision, None)
            else:
                repo.refs[revision] = successor
        repo.snapshots.pop(snapshot.id.commit, None)
        core.use.forget(snapshot.id)
        return freed

    async def _clean_up(self) -> int:
        """What nobody sees any more. A blob that cannot be unlinked is one without a snapshot: tried again as such."""
        core, repo_id = self._core, self.snapshot.id.repo_id
        # What is under way needs its directories.
        last = not core.use.holds_in(repo_id) and not core.lands_in(repo_id)
        for digest in list(self._blobs):
            # One that was condemned before it could not be withdrawn, and is there again with the blobs that both had.
            if core.index.needed(repo_id, digest, without=self.snapshot.id):
                core.index.add_link(repo_id, digest, self._blobs.pop(digest))
        try:
            freed = await self._remove_blobs_leisurely() if self._leisurely else 0
            return freed + await core.pools.on_disk(
                _clean_disk, core, self.snapshot.id, self._blobs, self._trashed, last=last
            )
        finally:
            for digest, blob in self._blobs.items():
                core.index.add_link(repo_id, digest, blob)
            if _is_bare(core, repo_id):
                core.index.repos.pop(repo_id, None)
            await core.measure_after(repo_id)

    async def _remove_blobs_leisurely(self) -> int:
        """What du lost. The rest goes at once as soon as somebody waits; what cannot be removed fails with that."""
        core, repo_id = self._core, self.snapshot.id.repo_id
        freed = 0
        while self._blobs and not core.pacer.hurries and (step := core.pacer.step_bytes) is not None:
            try:
                size = await core.pools.on_disk(_remove_blobs, core, repo_id, self._blobs, step)
            except (OSError, CacheError):
                break
            freed += size
            await core.measure("trash", repo_folder(repo_id))
            await core.pacer.pause(size)
        return freed


def _remove_blobs(core: Core, repo_id: RepoId, blobs: dict[Digest, Blob], most: int | None = None) -> int:
    """What du lost; ``blobs`` is left with those that are still there. ``most``: about so much, one at the least."""
    freed = 0
    for digest in list(blobs):
        freed += core.snapshots.remove_blob(repo_id, digest)
        del blobs[digest]
        if most is not None and freed >= most:
            break
    return freed


def _successor(core: Core, snapshot: Snapshot, revision: Revision) -> Commit | None:
    """The newest other cached commit that the ref has named."""
    repo = core.index.repo(snapshot.id.repo_id)
    for commit in core.use.formerly(snapshot.id.repo_id, revision):
        other = repo.snapshots.get(commit)
        if commit != snapshot.id.commit and other is not None and other.state is not SnapshotState.CONDEMNED:
            return commit
    return None


def _withdraw_from_disk(core: Core, snapshot: Snapshot, moves: dict[Revision, Commit | None]) -> tuple[str | None, int]:
    """The snapshot's path in trash/, if it was there, and what du lost on the way."""
    try:
        return _try_to_withdraw(core, snapshot, moves)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        core.ballast.drop()  # a rename may need a block, and on btrfs counts against the quota
        return _try_to_withdraw(core, snapshot, moves)


def _try_to_withdraw(core: Core, snapshot: Snapshot, moves: dict[Revision, Commit | None]) -> tuple[str | None, int]:
    repo_id = snapshot.id.repo_id
    core.layout.check_repo(repo_id)  # all of it or nothing: half an eviction would be found at the next start only
    freed = 0
    for revision, successor in moves.items():
        try:
            if successor is not None:
                core.snapshots.write_ref(repo_id, revision, successor)
                continue
        except OSError as error:  # full: a ref that is gone is safe, one that points to nothing is not
            log.warning("ref could not be moved back, removing it", revision=revision, why=str(error))
        freed += core.snapshots.remove_ref(repo_id, revision)
    freed += core.snapshots.remove_tree_file(snapshot.id)
    try:
        return core.snapshots.withdraw(snapshot.id), freed
    except (OSError, CacheError):
        for revision in moves:  # it stays: readers find it by its names too
            with contextlib.suppress(OSError, CacheError):
                core.snapshots.write_ref(repo_id, revision, snapshot.id.commit)
        raise


def _clean_disk(core: Core, snapshot: SnapshotId, blobs: dict[Digest, Blob], trashed: str | None, *, last: bool) -> int:
    """What du lost; ``blobs`` is left with those that could not be removed. One failure does not keep the rest."""

    def remove_directory() -> int:
        if trashed is None:
            return 0
        size = _sum_below(trashed)
        core.disk.remove_tree(trashed)
        return size

    freed, failures = 0, []
    steps: tuple[Callable[[], int], ...] = (
        lambda: _remove_blobs(core, snapshot.repo_id, blobs),
        lambda: core.manifests.remove(snapshot),
        remove_directory,
    )
    for step in steps:
        try:
            freed += step()
        except (OSError, CacheError) as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return freed + (core.snapshots.remove_empty_repo(snapshot.repo_id) if last else 0)


def _sum_below(path: str) -> int:
    sizes, _ = measure(path)
    return sum(sizes.values())

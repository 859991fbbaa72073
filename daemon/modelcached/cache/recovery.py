"""The one way to start, after a clean stop, a kill, a power loss, or on a directory that somebody else filled.

Read what is on disk, finish or forget what was under way, believe only what can
be proven, and account for every block. Needs no hand, and may itself be killed
at any point: it runs again from the beginning.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from modelcached.cache.core import Core
from modelcached.errors import CacheError
from modelcached.ledger.database import COMPLETE, Statement
from modelcached.model import Commit, RepoId, SnapshotId, repo_folder, repo_id_of_folder, shown
from modelcached.store.index import SnapshotState
from modelcached.store.manifests import Record
from modelcached.store.measure import measure
from modelcached.store.mounts import is_mounted, mounts_below
from modelcached.store.scan import FoundRepo
from modelcached.store.walker import Walker, hub_folders

log = structlog.get_logger()

_FOLDERS_AT_ONCE = 16
"""Read in a disk thread, then believed on the event loop; what is read and not believed yet takes memory."""


Told = Callable[[int, int], None]
"""Is told, a few at a time, how many repositories have been read, and how many there are."""


def _nobody(done: int, of: int) -> None:
    """Wants to know."""


@dataclass(slots=True)
class Report:
    """What a start found; every list sorted."""

    ready: list[str] = field(default_factory=list)
    """Snapshots that can be answered from at once."""
    unverified: list[str] = field(default_factory=list)
    """Snapshots that are hashed before the first answer."""
    removed: list[str] = field(default_factory=list)
    """Paths that were removed: unfinished business, and what says more than is there."""
    reported: list[str] = field(default_factory=list)
    """Paths that the layout has no place for, left alone."""
    recovered_leases: int = 0

    def sorted(self) -> Report:
        """Each list in order."""
        return Report(
            sorted(self.ready),
            sorted(self.unverified),
            sorted(self.removed),
            sorted(self.reported),
            self.recovered_leases,
        )


async def recover(core: Core, *, lost: str, begun: Walker | None = None, told: Told = _nobody) -> Report:
    """Fills index and account from the disk.

    ``lost``: why leases may be missing from state.db; empty if none is. ``begun``: reads hub/ already.
    ``told``: on the event loop, between two reads.
    """
    gc.disable()  # nearly all that is made from here on stays: looking for garbage in it takes a fifth of the time
    try:
        return await _recover(core, lost, begun, told)
    finally:
        # All modules and the whole index: they stay, and each look through them would stop every call meanwhile.
        # No look before it either: with a large cache that alone takes a tenth of a second.
        gc.freeze()
        gc.enable()


async def _recover(core: Core, lost: str, begun: Walker | None, told: Told) -> Report:
    report = Report()
    await core.pools.on_disk(_clear_unfinished, core, report)
    folders, mounted = await core.pools.on_disk(hub_folders, core.layout)
    walk = _Walk(core, report, told, strangers=mounted)
    if begun is not None and begun.folders != folders:
        begun.close()
        begun = None
    await walk.through(folders, mends=True, walker=begun)
    await core.pools.on_disk(_drop_shared, core, walk.adopted)
    # An inode that became a repository's own has more names than before, whichever repositories they lie in.
    await walk.through(folders if walk.adopted else walk.mended, mends=False)
    report.reported += [path for paths in walk.reported.values() for path in paths]
    report.reported += await core.pools.on_disk(lambda: [path for path in walk.strangers if os.path.lexists(path)])
    for snapshot in core.index.snapshots():
        (report.ready if snapshot.state is SnapshotState.READY else report.unverified).append(str(snapshot.id))
    recorded = await core.pools.on_disk(walk.recorded)
    await core.pools.on_disk(core.manifests.sweep, frozenset(snapshot.id for snapshot in core.index.snapshots()))
    for snapshot_id in [s for s in core.use.usage if core.index.snapshot(s) is None]:
        core.use.forget(snapshot_id)
    for repo_id, mended in core.index.repos.items():
        for revision, commit in mended.refs.items():
            if commit not in core.use.formerly(repo_id, revision):
                core.use.named(repo_id, revision, commit)
    await _measure_rest(core, walk.strangers)
    # Our own records prove that a daemon was here: without its database, every snapshot may be in use.
    report.recovered_leases = await _recover_leases(core, lost if recorded else "")
    report = report.sorted()
    log.info(
        "recovered",
        ready=len(report.ready),
        unverified=report.unverified,
        removed=report.removed,
        reported=report.reported,
        recovered_leases=report.recovered_leases,
        used_bytes=core.space.used_bytes,
    )
    return report


async def _recover_leases(core: Core, lost: str) -> int:
    """How many leases stand for proofs of use that were lost (``lost`` says why), now or before an earlier start."""
    statements: list[Statement] = []
    unreadable = list(core.use.unreadable)
    if why := lost or ("leases in state.db cannot be read" if unreadable else ""):
        statements = core.use.recover(sorted(snapshot.id for snapshot in core.index.snapshots()), why)
        log.error("proofs of use were lost", why=why, unreadable=[shown(str(lease_id)) for lease_id in unreadable])
    await core.commit(*statements, COMPLETE)  # in one transaction: a kill before it makes the next start do it again
    count, reasons = core.use.recovered()
    if count:
        core.degraded["recovered"] = (
            f"{'; '.join(reasons)}: {count} recovered leases keep every model that was cached then; "
            "end them with cachectl release --recovered once you know what is in use"
        )
    return count


async def _measure_rest(core: Core, strangers: list[str]) -> None:
    """Every area of the account that no repository's scan has measured, and the limits."""
    core.apply_limits(core.config.cache, await core.filesystem(), await core.pools.on_disk(core.kubelet))
    mounts = await core.pools.on_disk(mounts_below, core.layout.hub)
    for path in strangers:
        if is_mounted(path, mounts):
            continue  # what lies there is somebody else's
        name = os.path.basename(path)  # it may be that of an area of ours
        sizes, _ = await core.pools.on_disk(measure, path)
        core.space.set_area(path if name in core.areas() else name, sizes)
    await core.measure("quarantine", "root")
    await core.measure_after()


@dataclass(slots=True)
class _Walk:
    """Through the repositories of hub/: each is read once, and once more where that changed something."""

    core: Core
    report: Report
    told: Told
    strangers: list[str] = field(default_factory=list)
    """Paths in hub/ that are no repository."""
    mended: list[str] = field(default_factory=list)
    """Folders of repositories that were changed, and are still to be loaded."""
    adopted: set[str] = field(default_factory=set)
    """Shared payloads (huggingface_hub 2.x with Xet) that became repositories' own blobs."""
    records: bool = False
    """There is one of ours that can be used."""
    reported: dict[RepoId, list[str]] = field(default_factory=dict)
    """Paths that the layout has no place for."""

    async def through(self, folders: Sequence[str], *, mends: bool, walker: Walker | None = None) -> None:
        """Loads index and account; what it mends instead is left for another time."""
        with walker or Walker.begin(self.core.layout, folders) as reader:
            for begin in range(0, len(folders), _FOLDERS_AT_ONCE):
                few = folders[begin : begin + _FOLDERS_AT_ONCE]
                for found, records in await self.core.pools.on_disk(self._look, reader, few, mends=mends):
                    self.core.index.load(found, records, self.core.layout.repo(found.repo_id))
                    self.core.space.set_area(repo_folder(found.repo_id), found.sizes)
                    self.reported[found.repo_id] = found.strangers
                    if lacking := _without_tree(self.core, found):
                        await self.core.pools.on_disk(_write_trees, self.core, lacking)
                        await self.core.measure(repo_folder(found.repo_id))
                if mends:
                    self.told(begin + len(few), len(folders))

    def _look(
        self, walker: Walker, folders: Sequence[str], *, mends: bool
    ) -> list[tuple[FoundRepo, dict[Commit, Record]]]:
        seen = []
        for folder in folders:
            repo_id = repo_id_of_folder(folder)
            records = self.core.manifests.of(repo_id) if repo_id else {}
            digests = {entry.digest.hex: entry.digest for r in records.values() for entry in r.manifest.files.values()}
            found = walker.found(folder, digests)
            self.records |= bool(records)
            if found is None:
                if mends:
                    self.strangers.append(f"{self.core.layout.hub}/{folder}")
            elif mends and _mend_repo(self.core, found, self.report, self.adopted):
                self.mended.append(folder)
            else:
                seen.append((found, records))
        return seen

    def recorded(self) -> bool:
        """Whether there is any record that can be used, of repositories that are gone too."""
        folders = () if self.records else self.core.manifests.folders()
        return bool(self.records) or any(
            self.core.manifests.of(repo_id) for repo_id in map(repo_id_of_folder, folders) if repo_id
        )


def _clear_unfinished(core: Core, report: Report) -> None:
    """Staging was never visible, trash was given up: both go. Partial data stays if its journal can be read."""
    layout = core.layout
    for directory in (layout.staging, layout.trash):
        for name in sorted(os.listdir(directory)):
            core.disk.remove_tree(f"{directory}/{name}")
            report.removed.append(f"{directory}/{name}")
    report.removed += [f"{layout.partial}/{name}" for name in core.partials.sweep()]
    core.ballast.fill()


def _mend_repo(core: Core, repo: FoundRepo, report: Report, adopted: set[str]) -> bool:
    """Removes what lies: refs and listings that promise more than there is, and long abandoned downloads.

    Whether anything has changed. ``adopted`` is told of shared payloads that became this repository's own blobs.
    """
    layout, repo_id = core.layout, repo.repo_id
    try:
        layout.check_real_directory(layout.repo(repo_id))
    except CacheError as error:
        report.reported.append(error.metadata["path"])
        return True
    removed = []
    for revision, commit in repo.refs.items():
        if commit not in repo.snapshots:
            core.snapshots.remove_ref(repo_id, revision)
            removed.append(layout.ref(repo_id, revision))
    if repo.hollow:
        core.snapshots.remove_empty_ref_folders(repo_id)
    for commit in repo.trees:
        snapshot = SnapshotId(repo_id, commit)
        if not _tree_is_true(layout.tree(snapshot), repo, commit):
            core.snapshots.remove_tree_file(snapshot)
            removed.append(layout.tree(snapshot))
    horizon = time.time() - core.config.cache.partial_ttl.total_seconds()
    for path in repo.strangers:
        # huggingface_hub's unfinished files; a young one may belong to a running download.
        if path.endswith(".incomplete") and os.path.isfile(path) and os.lstat(path).st_mtime < horizon:
            core.disk.unlink(path)
            removed.append(path)
    for digest, target in repo.shared.items():
        if not repo.blobs[digest].writable_by_others:
            core.snapshots.adopt_shared_blob(repo_id, digest, target)
            adopted.add(target)
    changed = bool(removed or repo.shared or repo.hollow)
    if changed:
        core.snapshots.remove_empty_repo(repo_id)
    report.removed += removed
    return changed


def _without_tree(core: Core, repo: FoundRepo) -> list[Record]:
    """Whole commits that have no listing: a kill came between snapshot and listing, and a hit writes none."""
    snapshots = (core.index.snapshot(SnapshotId(repo.repo_id, c)) for c in sorted(repo.snapshots.keys() - repo.trees))
    records = (s.record for s in snapshots if s is not None and s.state is SnapshotState.READY)
    return [record for record in records if record is not None and record.is_whole]


def _write_trees(core: Core, records: list[Record]) -> None:
    for record in records:
        try:
            core.snapshots.write_tree(record.manifest)
        except (OSError, CacheError) as error:  # a full disk must not keep a daemon from starting
            log.warning("the listing of a snapshot cannot be written", model=str(record.snapshot), why=str(error))


def _drop_shared(core: Core, adopted: set[str]) -> None:
    """A payload that every repository has as its own needs its shared name no longer."""
    for target in sorted(adopted):
        core.snapshots.remove_shared_payload(target)


def _tree_is_true(path: str, repo: FoundRepo, commit: Commit) -> bool:
    """Every file that it lists is there, and as long as it says."""
    links = repo.snapshots.get(commit, {})
    sizes = {name: repo.blobs[digest].size_bytes for name, digest in links.items() if digest in repo.blobs}
    try:
        with open(path, encoding="utf-8") as file:
            return all(sizes.get(name) == entry["size"] for name, entry in json.load(file)["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False

"""The one way to start, after a clean stop, a kill, a power loss, or on a directory that somebody else filled.

Read what is on disk, finish or forget what was under way, believe only what can
be proven, and account for every block. Needs no hand, and may itself be killed
at any point: it runs again from the beginning.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field

import structlog

from modelcached.cache.core import Core
from modelcached.errors import CacheError
from modelcached.ledger.database import COMPLETE, Statement
from modelcached.model import Commit, RepoId, SnapshotId, shown
from modelcached.store.index import SnapshotState
from modelcached.store.manifests import Record
from modelcached.store.scan import FoundRepo, free_bytes, scan_hub, scan_repo

log = structlog.get_logger()


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


async def recover(core: Core, *, lost: str) -> Report:
    """Fills index and account from the disk. ``lost``: why leases may be missing from state.db; empty if none is."""
    report = Report()
    await core.pools.on_disk(_clear_unfinished, core, report)
    found, strangers = await core.pools.on_disk(scan_hub, core.layout)
    records: dict[RepoId, dict[Commit, Record]] = {}
    for record in await core.pools.on_disk(core.manifests.all):
        records.setdefault(record.manifest.repo_id, {})[record.manifest.commit] = record
    adopted: set[str] = set()
    for repo in found.values():
        adopted |= await core.pools.on_disk(_mend_repo, core, repo, report)
    await core.pools.on_disk(_drop_shared, core, adopted)
    report.reported += await core.pools.on_disk(lambda: [path for path in strangers if os.path.lexists(path)])
    for repo_id in found:
        fresh = await core.pools.on_disk(scan_repo, core.layout, repo_id)
        if fresh is None:
            continue
        report.reported += fresh.strangers
        core.index.load(fresh, records.get(repo_id, {}), os.geteuid(), core.layout.repo(repo_id))
        await core.pools.on_disk(_write_trees, core, _without_tree(core, fresh))
    for snapshot in core.index.snapshots():
        (report.ready if snapshot.state is SnapshotState.READY else report.unverified).append(str(snapshot.id))
    await core.pools.on_disk(core.manifests.sweep, frozenset(snapshot.id for snapshot in core.index.snapshots()))
    for snapshot_id in [s for s in core.use.usage if core.index.snapshot(s) is None]:
        core.use.forget(snapshot_id)
    for repo_id, mended in core.index.repos.items():
        for revision, commit in mended.refs.items():
            if commit not in core.use.formerly(repo_id, revision):
                core.use.named(repo_id, revision, commit)
    await measure_all(core)
    # Our own records prove that a daemon was here: without its database, every snapshot may be in use.
    report.recovered_leases = await _recover_leases(core, lost if records else "")
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


async def measure_all(core: Core) -> None:
    """Every area of the account, and the limits."""
    _, total = await core.pools.on_disk(free_bytes, core.layout.cache_dir)
    core.apply_limits(core.config.cache, total, await core.pools.on_disk(core.kubelet))
    await core.measure_hub()
    await core.measure(*core.areas())


def _clear_unfinished(core: Core, report: Report) -> None:
    """Staging was never visible, trash was given up: both go. Partial data stays if its journal can be read."""
    layout = core.layout
    for directory in (layout.staging, layout.trash):
        for name in sorted(os.listdir(directory)):
            core.disk.remove_tree(f"{directory}/{name}")
            report.removed.append(f"{directory}/{name}")
    report.removed += [f"{layout.partial}/{name}" for name in core.partials.sweep()]
    core.ballast.fill()


def _mend_repo(core: Core, repo: FoundRepo, report: Report) -> set[str]:
    """Removes what lies: refs and listings that promise more than there is, and long abandoned downloads.

    Returns the shared payloads (huggingface_hub 2.x with Xet) that became this repository's own blobs.
    """
    layout, repo_id = core.layout, repo.repo_id
    try:
        layout.check_real_directory(layout.repo(repo_id))
    except CacheError as error:
        report.reported.append(error.metadata["path"])
        return set()
    for revision, commit in repo.refs.items():
        if commit not in repo.snapshots:
            core.snapshots.remove_ref(repo_id, revision)
            report.removed.append(layout.ref(repo_id, revision))
    core.snapshots.remove_empty_ref_folders(repo_id)
    for commit in repo.trees:
        snapshot = SnapshotId(repo_id, commit)
        if not _tree_is_true(layout.tree(snapshot), repo, commit):
            core.snapshots.remove_tree_file(snapshot)
            report.removed.append(layout.tree(snapshot))
    horizon = time.time() - core.config.cache.partial_ttl.total_seconds()
    for path in repo.strangers:
        # huggingface_hub's unfinished files; a young one may belong to a running download.
        if path.endswith(".incomplete") and os.path.isfile(path) and os.lstat(path).st_mtime < horizon:
            core.disk.unlink(path)
            report.removed.append(path)
    adopted = set()
    for digest, blob in repo.blobs.items():
        if blob.shared_target is not None and not blob.writable_by_others(os.geteuid()):
            core.snapshots.adopt_shared_blob(repo_id, digest, blob.shared_target)
            adopted.add(blob.shared_target)
    core.snapshots.remove_empty_repo(repo_id)
    return adopted


def _without_tree(core: Core, repo: FoundRepo) -> list[Record]:
    """Whole commits that have no listing: a kill came between snapshot and listing, and a hit writes none."""
    snapshots = (core.index.snapshot(SnapshotId(repo.repo_id, c)) for c in sorted(repo.snapshots.keys() - repo.trees))
    records = (s.record for s in snapshots if s is not None and s.state is SnapshotState.READY)
    return [record for record in records if record is not None and record.paths == record.manifest.files.keys()]


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
    sizes = {name: repo.blobs[d].status.st_size for name, d in links.items() if d is not None and d in repo.blobs}
    try:
        with open(path, encoding="utf-8") as file:
            return all(sizes.get(name) == entry["size"] for name, entry in json.load(file)["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False

"""One repository of a request, down to its files; and what of it is there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from modelcached.cache.core import Core
from modelcached.ledger.victims import Name
from modelcached.model import Digest, FileEntry, Revision, Selection, SnapshotId
from modelcached.store.index import SnapshotState
from modelcached.store.manifests import BlobStamp, Record
from modelcached.store.scan import snapshot_stamps


@dataclass(frozen=True)  # no slots: what is derived is computed once, for it may be a hundred thousand files
class Want:
    """One repository of a request, down to its files."""

    record: Record
    selection: Selection
    revision: Revision
    stale: bool

    @property
    def snapshot(self) -> SnapshotId:
        """Which commit."""
        return self.record.snapshot

    @cached_property
    def entries(self) -> dict[str, FileEntry]:
        """The selected files."""
        return {path: self.record.manifest.files[path] for path in self.selection.paths}

    @cached_property
    def digests(self) -> set[Digest]:
        """Their blobs."""
        return {entry.digest for entry in self.entries.values()}

    @cached_property
    def names(self) -> set[Name]:
        """Those blobs as the repository's own."""
        return {Name(self.snapshot.repo_id, digest) for digest in self.digests}

    @cached_property
    def bytes_total(self) -> int:
        """The selection's size."""
        return sum(entry.size_bytes for entry in self.entries.values())


async def is_whole(core: Core, want: Want) -> bool:
    """The selection is complete and on disk, by belief and by stat through every link: a hit."""
    snapshot = core.index.snapshot(want.snapshot)
    if snapshot is None or snapshot.state is not SnapshotState.READY or snapshot.record is None:
        return False
    if want.selection.profile not in snapshot.record.selections:
        return False
    repo = core.index.repo(want.snapshot.repo_id)
    links = {path: entry.digest for path, entry in want.entries.items()}
    found = await core.pools.on_disk(snapshot_stamps, core.layout, want.snapshot, links)
    for path, entry in want.entries.items():
        blob, status = repo.blobs.get(entry.digest), found[path]
        if blob is None or not blob.verified or status is None or BlobStamp.of(status) != blob.stamp:
            return False
    return True


def missing(core: Core, want: Want) -> dict[Digest, FileEntry]:
    """What of it is not there, or not proven."""
    blobs = core.index.repo(want.snapshot.repo_id).blobs
    return {
        entry.digest: entry
        for entry in want.entries.values()
        if (blob := blobs.get(entry.digest)) is None or not blob.verified
    }

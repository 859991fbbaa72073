"""One repository of a request, down to its files; and what of it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from modelcached.cache.core import Core
from modelcached.ledger.victims import Name
from modelcached.model import Digest, FileEntry, Revision, Selection, SnapshotId, as_commit
from modelcached.store.manifests import Record


@dataclass(frozen=True)  # no slots: what is derived is computed once, for it may be a hundred thousand files
class Want:
    """One repository of a request, down to its files."""

    record: Record
    selection: Selection
    revision: Revision
    stale: bool

    @cached_property
    def snapshot(self) -> SnapshotId:
        """Which commit."""
        return self.record.snapshot

    @cached_property
    def entries(self) -> dict[str, FileEntry]:
        """The selected files."""
        return {path: self.record.manifest.files[path] for path in self.selection.paths}

    @cached_property
    def links(self) -> dict[str, Digest]:
        """Which blob is at each of their paths."""
        return {path: entry.digest for path, entry in self.entries.items()}

    @cached_property
    def by_name(self) -> bool:
        """It was asked for by a branch or tag, which may move."""
        return as_commit(self.revision) is None

    @cached_property
    def digests(self) -> set[Digest]:
        """Their blobs."""
        return {entry.digest for entry in self.entries.values()}

    @cached_property
    def names(self) -> frozenset[Name]:
        """Those blobs as the repository's own."""
        return frozenset(Name(self.snapshot.repo_id, digest) for digest in self.digests)

    @cached_property
    def bytes_total(self) -> int:
        """The selection's size."""
        return sum(entry.size_bytes for entry in self.entries.values())

    def is_shown(self, core: Core) -> bool:
        """The selection is published; what of it is missing has been lost since."""
        snapshot = core.index.snapshot(self.snapshot)
        return (
            snapshot is not None
            and snapshot.record is not None
            and self.selection.profile in snapshot.record.selections
        )


def names_of(wants: Sequence[Want]) -> frozenset[Name]:
    """All of them; one want's own object, which its next request will have too."""
    return wants[0].names if len(wants) == 1 else frozenset[Name]().union(*(want.names for want in wants))


def missing(core: Core, want: Want) -> dict[Digest, FileEntry]:
    """What of it is not there, or not proven."""
    blobs = core.index.repo(want.snapshot.repo_id).blobs
    return {
        entry.digest: entry
        for entry in want.entries.values()
        if (blob := blobs.get(entry.digest)) is None or not blob.verified
    }

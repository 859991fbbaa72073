"""What is promised for a model before its first byte: blobs in flight, links, directories, records."""

from __future__ import annotations

from modelcached.ledger.space import Amount
from modelcached.model import FileEntry

_BLOCK = 4096
_JOURNAL_BYTES_PER_STEP = 64  # a line for each 2 MiB step, and checkpoints
_STEP = 2 << 20
_OWN_FILES = 16
"""The repository's own directories, its refs and listing, the record, and each of those that is being replaced."""
INODES_OF_FLIGHT = 2
"""The blob and its journal."""


def blob_bytes(size_bytes: int) -> int:
    """What a blob takes on disk while it is fetched: whole blocks, and its journal's."""
    journal = _BLOCK + size_bytes // _STEP * _JOURNAL_BYTES_PER_STEP
    return -(-size_bytes // _BLOCK) * _BLOCK + -(-journal // _BLOCK) * _BLOCK


def overhead(files: int, folders: int) -> Amount:
    """Links, directories, the record: a block and an inode each, and some for their directories' growth."""
    return Amount((files + folders) * _BLOCK + files * 1024 + _OWN_FILES * _BLOCK, files + folders + _OWN_FILES)


def selection_bytes(entries: list[FileEntry]) -> int:
    """What a selection takes on disk from nothing."""
    folders = {entry.path.rpartition("/")[0] for entry in entries}
    unique = {entry.digest: entry.size_bytes for entry in entries}
    return sum(map(blob_bytes, unique.values())) + overhead(len(entries), len(folders)).size_bytes

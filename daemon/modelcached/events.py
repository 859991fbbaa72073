"""What happened, for whoever watches (metrics, history). Those who tell depend on nobody who listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """An EnsureModel call came to its end."""

    outcome: str
    """hit, joined, downloaded, error or cancelled."""
    reason: str
    """Of an error; else empty."""
    seconds: float


@dataclass(frozen=True, slots=True)
class BytesFetched:
    """A blob was published."""

    origin: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SnapshotEvicted:
    """A snapshot went."""

    repo_id: str
    commit: str
    freed_bytes: int
    reason: str
    """space or operator."""


@dataclass(frozen=True, slots=True)
class BlobCondemned:
    """A blob on disk was not what its name says and went to quarantine."""

    repo_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class BlobScrubbed:
    """A blob at rest was read again."""

    size_bytes: int
    right: bool


@dataclass(frozen=True, slots=True)
class HubCalled:
    """A question to the Hub's API was answered, or not."""

    call: str
    outcome: str


@dataclass(frozen=True, slots=True)
class DriftFound:
    """Somebody else changed what lies in hub/, and belief was corrected."""

    kind: str
    """What, of which kind of thing: blob_gone, ref_moved, …"""
    count: int


@dataclass(frozen=True, slots=True)
class UpkeepRan:
    """A loop beside the requests had its turn."""

    loop: str
    outcome: str
    """ok or error."""


Event = (
    RequestEnded | BytesFetched | SnapshotEvicted | BlobCondemned | BlobScrubbed | HubCalled | DriftFound | UpkeepRan
)
Observer = Callable[[Event], None]

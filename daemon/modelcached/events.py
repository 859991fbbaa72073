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
    models: tuple[str, ...] = ()
    """As asked for, each ``org/name@revision``; the base model first."""
    holder: str = ""
    """Who asked, as far as it said."""
    request_id: str = ""
    message: str = ""
    """Of an error."""


@dataclass(frozen=True, slots=True)
class ModelsFetched:
    """What one set of models lacked was fetched and published, whoever waits for it."""

    models: tuple[str, ...]
    """Each ``org/name@commit``; the base model first."""
    fetched_bytes: int
    linked_bytes: int
    """Of them, what another repository of the cache had."""
    seconds: float
    queued_seconds: float
    """Of them, until it had its turn and its space."""
    background: bool
    """Nobody waited for its end."""


@dataclass(frozen=True, slots=True)
class OperatorActed:
    """Somebody on the operators' socket changed what is kept, or ended something."""

    action: str
    """pinned, unpinned, released or cancelled."""
    target: str
    """A model or a lease."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DaemonStarted:
    """The daemon serves."""

    version: str
    models: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BytesReceived:
    """A piece of a blob came, or was copied."""

    origin: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FirstByteCame:
    """A blob began to come."""

    seconds: float
    """Since it was wanted."""


@dataclass(frozen=True, slots=True)
class RangeRetried:
    """A part of a blob is asked for again."""

    reason: str


@dataclass(frozen=True, slots=True)
class FlightFailed:
    """A blob could not be had, and nobody had ended it."""

    reason: str


@dataclass(frozen=True, slots=True)
class RateLimited:
    """Upstream asked all flights of the node to wait."""

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
    """space, watermark, full, bad or operator."""


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
    RequestEnded
    | ModelsFetched
    | OperatorActed
    | DaemonStarted
    | BytesReceived
    | FirstByteCame
    | RangeRetried
    | FlightFailed
    | RateLimited
    | BytesFetched
    | SnapshotEvicted
    | BlobCondemned
    | BlobScrubbed
    | HubCalled
    | DriftFound
    | UpkeepRan
)
Observer = Callable[[Event], None]

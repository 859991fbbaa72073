"""What the cache is asked for, and what it answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from modelcached.ledger.leases import Lease, LeaseKind
from modelcached.ledger.use import Pin
from modelcached.model import Digest, Profile, RepoId, Revision, Selection, SnapshotId
from modelcached.store.index import SnapshotState


class Outcome(enum.Enum):
    """What an answer was made from."""

    HIT = "hit"
    JOINED = "joined"
    DOWNLOADED = "downloaded"


class Phase(enum.IntEnum):
    """Where a request stands."""

    QUEUED = 1
    RESOLVING = 2
    RESERVING = 3
    DOWNLOADING = 4
    VERIFYING = 5
    PUBLISHING = 6
    READY = 7


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One repository as asked for."""

    repo_id: RepoId
    revision: Revision
    profile: Profile


@dataclass(frozen=True, slots=True)
class LeaseWish:
    """Which proof of use the caller can give."""

    pod_uid: str = ""
    stream: bool = False
    holder: str = ""
    ttl: timedelta | None = None

    @property
    def who(self) -> str:
        """The caller in words; empty where it did not say."""
        return self.holder or (f"pod {self.pod_uid}" if self.pod_uid else "")


@dataclass(frozen=True, slots=True)
class EnsureRequest:
    """A base model and its adapters: one admission."""

    models: tuple[ModelRequest, ...]
    lease: LeaseWish
    token: str | None = field(default=None, repr=False)
    request_id: str = ""
    prewarm: bool | None = None
    """None: as ``cache.prewarm`` says."""
    wait_for_space: timedelta = timedelta(0)
    """How long others may take to make room, where there is none now."""
    with_files: bool = False
    """Its progress tells of each file."""
    folder: str = ""
    """Where to take it from instead of upstream; absolute."""
    moves: bool = False
    """What was taken from there is removed there."""


@dataclass(frozen=True, slots=True)
class FileProgress:
    """One file that is being fetched."""

    repo_id: RepoId
    path: str
    bytes_total: int
    bytes_done: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A request under way, at this moment."""

    phase: Phase
    bytes_total: int = 0
    bytes_done: int = 0
    bytes_per_second: int = 0
    waiters: int = 1
    detail: str = ""
    files: tuple[FileProgress, ...] = ()
    """What is under way of it, where somebody wants to know."""

    @property
    def eta(self) -> timedelta | None:
        """None while nothing is known."""
        left = self.bytes_total - self.bytes_done
        if self.phase is not Phase.DOWNLOADING or self.bytes_per_second <= 0 or left < 0:
            return None
        return timedelta(seconds=left / self.bytes_per_second)


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """One repository as served."""

    snapshot: SnapshotId
    revision: Revision
    path: str
    selection: Selection
    outcome: Outcome
    bytes_total: int
    bytes_fetched: int
    bytes_linked: int
    stale: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """The end of a request."""

    models: tuple[ReadyModel, ...]
    lease: Lease
    hub_dir: str


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One snapshot, as listed."""

    snapshot: SnapshotId
    path: str
    revisions: tuple[Revision, ...]
    profiles: tuple[str, ...]
    size_bytes: int
    unique_bytes: int
    used_at: float | None
    pinned: bool
    leases: tuple[str, ...]
    state: SnapshotState


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One file of a snapshot."""

    path: str
    size_bytes: int
    digest: Digest
    cached: bool
    """On the disk, as believed."""
    verified: bool
    verified_at: float | None
    """When it was last read and found right, seconds since the epoch; None where it never was."""
    shared_with: tuple[SnapshotId, ...]
    """Other snapshots that need the same blob."""


@dataclass(frozen=True, slots=True)
class ModelDetail:
    """All that is known of one snapshot."""

    model: CachedModel
    files: tuple[CachedFile, ...]
    selections: tuple[Selection, ...]
    leases: tuple[Lease, ...]
    pins: tuple[Pin, ...]
    kept_by: tuple[str, ...]
    """What keeps it from being evicted now."""


@dataclass(frozen=True, slots=True)
class EvictionRule:
    """Which of the models that nothing keeps an operator means."""

    older_than: timedelta | None = None
    """Not asked for within this time."""
    until_free_bytes: int | None = None
    """No more than are needed until so much of the filesystem is free."""


class Verdict(enum.Enum):
    """What is wrong with a file."""

    BAD = "bad"
    """Its content has another digest."""
    MISSING = "missing"
    UNREADABLE = "unreadable"


@dataclass(slots=True)
class BadFile:
    """A file that is not as it should be."""

    snapshot: SnapshotId
    path: str
    digest: Digest
    verdict: Verdict
    repaired: bool = False
    detail: str = ""
    """Why it could not be repaired."""


@dataclass(slots=True)
class Reading:
    """An operator's reading of models, as far as it is."""

    bytes_total: int = 0
    bytes_done: int = 0
    files_total: int = 0
    files_done: int = 0
    models: int = 0
    now: str = ""
    """``org/name@commit path``."""
    bad: list[BadFile] = field(default_factory=list)


class GarbageKind(enum.Enum):
    """What lies in the cache beside models."""

    PARTIAL = "partial"
    ORPHAN = "orphan"
    QUARANTINE = "quarantine"
    TRASH = "trash"


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that is no model."""

    kind: GarbageKind
    name: str
    repo_id: RepoId | None
    size_bytes: int
    """What du loses with it."""
    modified_at: float
    """Seconds since the epoch."""
    in_use: bool


@dataclass(frozen=True, slots=True)
class Transfer:
    """A model on its way."""

    snapshot: SnapshotId
    progress: Progress
    background: bool


class Standing(enum.StrEnum):
    """How a model of the model list stands."""

    HELD = "held"
    FETCHING = "fetching"
    WAITING = "waiting"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Listed:
    """One model of the model list."""

    model: ModelRequest
    priority: int
    standing: Standing
    detail: str
    """What it waits for, or why it fails; empty where it is held."""


@dataclass(frozen=True, slots=True)
class Status:
    """The disk's truth at one moment; bytes."""

    budget_bytes: int
    used_bytes: int
    reserved_bytes: int
    partial_bytes: int
    trash_bytes: int
    quarantine_bytes: int
    pinned_bytes: int
    leased_bytes: int
    filesystem_free_bytes: int
    filesystem_total_bytes: int
    min_free_bytes: int
    models: int
    pinned_models: int
    leased_models: int
    leases: int
    filesystem_inodes: int | None
    """None where the filesystem makes them as they are wanted."""
    filesystem_free_inodes: int | None
    reserved_inodes: int
    min_free_inodes: int
    room_bytes: int
    """What may be promised without evicting; negative when over."""
    transfers: tuple[Transfer, ...]
    hub_dir: str
    degraded: tuple[str, ...]
    oldest_check: float | None
    """When the blob that was read longest ago was read; seconds since the epoch."""
    listed: tuple[Listed, ...]
    pins: int
    leases_by_kind: Mapping[LeaseKind, int]
    witness_healthy: bool
    """The kubelet's pods directory shows what is there, or nobody needs it."""
    may_evict: bool
    """There is a model that may go."""
    oldest_idle_at: float | None
    """When the model was asked for that is the next to be evicted, seconds since the epoch; None where nothing may go,
    or it never was."""
    flights: int
    """Blobs in flight."""
    scrub_due_bytes: int
    latest: tuple[CachedModel, ...]
    """As many as ``metrics.models`` says, of those that were asked for last."""


class Fit(enum.Enum):
    """Whether models would fit."""

    CACHED = "cached"
    NOW = "now"
    AFTER_EVICTION = "after eviction"
    NOT_NOW = "not now"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One repository as it would be served."""

    snapshot: SnapshotId
    revision: Revision
    selection: Selection
    bytes_total: int
    bytes_to_fetch: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What making models whole would take."""

    models: tuple[PlannedModel, ...]
    fit: Fit
    bytes_needed: int
    bytes_room: int
    """Negative when already over."""
    evicts: tuple[Evicted, ...]
    why: str
    """Of NOT_NOW and NEVER."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """A snapshot that went, or would go."""

    snapshot: SnapshotId
    freed_bytes: int

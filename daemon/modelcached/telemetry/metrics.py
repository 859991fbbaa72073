"""Prometheus metrics, as tables: what there is and what it means. docs/metrics.md is made from them.

Gauges are read from the cache at each scrape; counters and histograms follow its events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from modelcached import __version__
from modelcached.cache.requests import Phase, Standing, Status
from modelcached.errors import Reason
from modelcached.events import (
    BlobCondemned,
    BlobScrubbed,
    BytesFetched,
    BytesReceived,
    DriftFound,
    Event,
    FirstByteCame,
    FlightFailed,
    HubCalled,
    ModelsFetched,
    RangeRetried,
    RateLimited,
    RequestEnded,
    SnapshotEvicted,
    UpkeepRan,
)
from modelcached.ledger.leases import LeaseKind

M = TypeVar("M", Counter, Histogram)

PREFIX = "modelcached_"

# A hit takes milliseconds, a cold 140 GB model hours.
_REQUEST_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
_WAIT_SECONDS = (0.05, 0.2, 1, 5, 15, 60, 300, 900, 3600)


@dataclass(frozen=True, slots=True)
class Counted:
    """A counter; its sample's name ends in ``_total``."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    begins: tuple[tuple[str, ...], ...] = ()
    """Values of the labels that are there from the start, at 0: a rate sees their first rise too."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A histogram of seconds."""

    name: str
    text: str
    buckets: tuple[float, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gauged:
    """A gauge, read from the status: a number, or one for each value of its labels. None: there is nothing to say."""

    name: str
    text: str
    read: Callable[[Status], float | Iterable[tuple[tuple[str, ...], float]] | None]
    labels: tuple[str, ...] = ()


_ALERTING = (
    Reason.NO_SPACE_NOW,
    Reason.OVER_BUDGET,
    Reason.STORAGE_ERROR,
    Reason.OVERLOADED,
    Reason.DIGEST_MISMATCH,
    Reason.UPSTREAM_UNAVAILABLE,
)
_OUTCOMES = (
    *((outcome, "") for outcome in ("hit", "joined", "downloaded", "cancelled")),
    *(("error", reason.value) for reason in _ALERTING),
)
_ORIGINS = (("hub",), ("xet",), ("local",))

COUNTERS = (
    Counted("requests", "EnsureModel calls by outcome; of errors the reason", ("outcome", "reason"), _OUTCOMES),
    Counted("received_bytes", "Bytes taken from upstream as they come, repeats included", ("origin",), _ORIGINS),
    Counted("fetched_bytes", "Bytes of blobs published, by origin", ("origin",), _ORIGINS),
    Counted("transfer_retries", "Ranges of files that were asked for again, by why", ("reason",)),
    Counted("transfer_failures", "Blobs whose transfer failed for good, by why", ("reason",)),
    Counted("rate_limits", "How often upstream asked to be left alone (429)"),
    Counted("rate_limit_wait_seconds", "For how long it asked so, all together"),
    Counted(
        "evictions",
        "Snapshots evicted, by what for",
        ("reason",),
        (("space",), ("watermark",), ("full",), ("bad",), ("operator",)),
    ),
    Counted("evicted_bytes", "Bytes that evictions freed, by what for", ("reason",)),
    Counted("blobs_condemned", "Blobs on disk that were not what their name says, moved to quarantine"),
    Counted("scrubbed_bytes", "Bytes at rest that were read again, by the scrub or by cachectl verify"),
    Counted("scrub_failures", "Blobs at rest that were read and found bad"),
    Counted("hub_calls", "Questions to the Hub's API by outcome", ("call", "outcome")),
    Counted("drift", "Things in hub/ that somebody else had changed, by kind", ("kind",)),
    Counted("upkeep_runs", "Turns of the loops beside requests, by outcome", ("loop", "outcome")),
)

HISTOGRAMS = (
    Timed("request_duration_seconds", "How long EnsureModel calls took", _REQUEST_SECONDS, ("outcome",)),
    Timed("queue_seconds", "How long models waited for their turn and for space", _WAIT_SECONDS),
    Timed("first_byte_seconds", "How long blobs waited for a connection and for their first byte", _WAIT_SECONDS),
)


def _age(moment: float | None) -> float | None:
    return None if moment is None else max(0.0, time.time() - moment)


GAUGES = (
    Gauged("budget_bytes", "Most that the cache may use", lambda s: s.budget_bytes),
    Gauged("used_bytes", "All that du sees under cache.dir", lambda s: s.used_bytes),
    Gauged("reserved_bytes", "Promised to requests, not yet allocated", lambda s: s.reserved_bytes),
    Gauged("partial_bytes", "Unfinished blobs, a part of used", lambda s: s.partial_bytes),
    Gauged("trash_bytes", "Out of sight, not yet off the disk, a part of used", lambda s: s.trash_bytes),
    Gauged("quarantine_bytes", "Bad blobs kept out of reach, a part of used", lambda s: s.quarantine_bytes),
    Gauged("pinned_bytes", "Under pins", lambda s: s.pinned_bytes),
    Gauged("leased_bytes", "Under leases", lambda s: s.leased_bytes),
    Gauged("min_free_bytes", "Free space that is left to others", lambda s: s.min_free_bytes),
    Gauged("filesystem_free_bytes", "Free for unprivileged writers on it", lambda s: s.filesystem_free_bytes),
    Gauged("filesystem_size_bytes", "Size of the cache's filesystem", lambda s: s.filesystem_total_bytes),
    Gauged("filesystem_inodes", "Inodes of it, where they are numbered", lambda s: s.filesystem_inodes),
    Gauged("filesystem_free_inodes", "Free ones of them", lambda s: s.filesystem_free_inodes),
    Gauged("reserved_inodes", "Promised to requests, not yet made", lambda s: s.reserved_inodes),
    Gauged("min_free_inodes", "Free inodes that are left to others", lambda s: s.min_free_inodes),
    Gauged("models", "Cached snapshots", lambda s: s.models),
    Gauged("pins", "Names that operators and the model list have pinned", lambda s: s.pins),
    Gauged(
        "leases",
        "Leases, by how they end",
        lambda s: [((kind.value,), s.leases_by_kind.get(kind, 0)) for kind in LeaseKind],
        ("kind",),
    ),
    Gauged(
        "witness_healthy",
        "Whether the kubelet's pods directory shows what is there (1), so that pod leases end",
        lambda s: float(s.witness_healthy),
    ),
    Gauged("evictable", "Whether there is a model that may be evicted (1)", lambda s: float(s.may_evict)),
    Gauged(
        "oldest_idle_seconds",
        "Since the model was asked for that is the next to be evicted; absent where there is none, or it never was",
        lambda s: _age(s.oldest_idle_at),
    ),
    Gauged("transfers", "Models on their way", lambda s: len(s.transfers)),
    Gauged(
        "transfers_queued",
        "Models that wait for their turn (transfer.models) or for space, a part of transfers",
        lambda s: sum(t.progress.phase is Phase.QUEUED for t in s.transfers),
    ),
    Gauged(
        "transfer_waiters", "Calls that wait for a transfer", lambda s: sum(t.progress.waiters for t in s.transfers)
    ),
    Gauged(
        "transfer_remaining_bytes",
        "What models on their way still lack",
        lambda s: sum(t.progress.bytes_total - t.progress.bytes_done for t in s.transfers),
    ),
    Gauged("flights", "Blobs in flight", lambda s: s.flights),
    Gauged("scrub_due_bytes", "At rest, and not read again within scrub.interval", lambda s: s.scrub_due_bytes),
    Gauged(
        "oldest_check_age_seconds",
        "Since the blob that was read longest ago was read; absent where there is none",
        lambda s: _age(s.oldest_check),
    ),
    Gauged("degraded", "Reasons why the daemon is not as it should be", lambda s: len(s.degraded)),
    Gauged(
        "model_list_entries",
        "Models of the model list, by how they stand",
        lambda s: [((each.value,), sum(entry.standing is each for entry in s.listed)) for each in Standing],
        ("state",),
    ),
    Gauged(
        "model_size_bytes",
        "Allocated size of each of the metrics.models cached snapshots that were asked for last",
        lambda s: [((m.snapshot.repo_id, m.snapshot.commit[:12]), m.size_bytes) for m in s.latest],
        ("model", "commit"),
    ),
    Gauged(
        "model_idle_seconds",
        "Since each of them was asked for",
        lambda s: [((m.snapshot.repo_id, m.snapshot.commit[:12]), _age(m.used_at) or 0.0) for m in s.latest],
        ("model", "commit"),
    ),
)


class Metrics:
    """The registry, and the observer that fills its counters."""

    def __init__(self, status: Callable[[], Status], tasks: Callable[[], int]) -> None:
        """``status`` and ``tasks`` (of the event loop) are called from the scrape's thread at each scrape."""
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(status, tasks))
        self._counters = {
            each.name: Counter(PREFIX + each.name, each.text, each.labels, registry=self.registry) for each in COUNTERS
        }
        for each in COUNTERS:
            for values in each.begins:
                self._counters[each.name].labels(*values)
        self._histograms = {
            each.name: Histogram(
                PREFIX + each.name, each.text, each.labels, buckets=each.buckets, registry=self.registry
            )
            for each in HISTOGRAMS
        }

        self._known: dict[tuple[str, tuple[str, ...]], Any] = {}

    def _count(self, name: str, *labels: str, by: float = 1) -> None:
        self._labelled(self._counters, name, labels).inc(by)

    def _time(self, name: str, seconds: float, *labels: str) -> None:
        self._labelled(self._histograms, name, labels).observe(seconds)

    def _labelled(self, metrics: Mapping[str, M], name: str, labels: tuple[str, ...]) -> M:
        """Kept: ``labels()`` takes longer than what is done with it, and each answer counts two."""
        found = self._known.get((name, labels))
        if found is None:
            found = self._known[name, labels] = metrics[name].labels(*labels) if labels else metrics[name]
        return found

    def observe(self, event: Event) -> None:  # noqa: C901, PLR0912 - a table
        """Counts what happened."""
        match event:
            case BytesReceived(origin, size):
                self._count("received_bytes", origin, by=size)
            case RequestEnded(outcome, reason, seconds):
                self._count("requests", outcome, reason)
                self._time("request_duration_seconds", seconds, outcome)
            case ModelsFetched(queued_seconds=seconds):
                self._time("queue_seconds", seconds)
            case FirstByteCame(seconds):
                self._time("first_byte_seconds", seconds)
            case BytesFetched(origin, size):
                self._count("fetched_bytes", origin, by=size)
            case RangeRetried(reason):
                self._count("transfer_retries", reason)
            case FlightFailed(reason):
                self._count("transfer_failures", reason)
            case RateLimited(seconds):
                self._count("rate_limits")
                self._count("rate_limit_wait_seconds", by=seconds)
            case SnapshotEvicted(_, _, freed, reason):
                self._count("evictions", reason)
                self._count("evicted_bytes", reason, by=max(0, freed))
            case BlobCondemned():
                self._count("blobs_condemned")
            case BlobScrubbed(size, right):
                self._count("scrubbed_bytes", by=size)
                self._count("scrub_failures", by=not right)
            case HubCalled(call, outcome):
                self._count("hub_calls", call, outcome)
            case DriftFound(kind, count):
                self._count("drift", kind, by=count)
            case UpkeepRan(loop, outcome):
                self._count("upkeep_runs", loop, outcome)
            case _:
                pass  # the history's


class _Gauges(Collector):
    def __init__(self, status: Callable[[], Status], tasks: Callable[[], int]) -> None:
        self._status = status
        self._tasks = tasks

    def describe(self) -> Iterator[Metric]:
        """Nothing is read when the registry is built."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The disk's truth at this moment."""
        yield InfoMetricFamily(f"{PREFIX}build", "Version of the daemon", {"version": __version__})
        status = self._status()
        for each in GAUGES:
            value = each.read(status)
            family = GaugeMetricFamily(PREFIX + each.name, each.text, labels=each.labels)
            if isinstance(value, int | float):
                family.add_metric((), value)
            else:
                for labels, number in value or ():
                    family.add_metric(labels, number)
            if family.samples:
                yield family
        tasks = "Running tasks; at rest always the same, or something was left behind"
        yield GaugeMetricFamily(f"{PREFIX}event_loop_tasks", tasks, value=self._tasks())

"""Prometheus metrics. Gauges are read from the cache at each scrape; counters follow its events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from modelcached import __version__
from modelcached.cache.requests import Phase, Standing, Status
from modelcached.events import (
    BlobCondemned,
    BlobScrubbed,
    BytesFetched,
    DriftFound,
    Event,
    HubCalled,
    RequestEnded,
    SnapshotEvicted,
    UpkeepRan,
)

# A hit takes milliseconds, a cold 140 GB model hours.
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)


class Metrics:
    """The registry, and the observer that fills its counters."""

    def __init__(self, status: Callable[[], Status], tasks: Callable[[], int]) -> None:
        """``status`` and ``tasks`` (of the event loop) are called from the scrape's thread at each scrape."""
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(status, tasks))
        self._requests = Counter(
            "modelcached_requests",
            "EnsureModel calls by outcome, and reason of the failed ones",
            ["outcome", "reason"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "modelcached_request_duration_seconds",
            "How long EnsureModel calls took",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._fetched = Counter(
            "modelcached_fetched_bytes", "Bytes of blobs published, by origin", ["origin"], registry=self.registry
        )
        self._evictions = Counter(
            "modelcached_evictions", "Snapshots evicted, by reason", ["reason"], registry=self.registry
        )
        self._evicted = Counter(
            "modelcached_evicted_bytes", "Bytes that evictions freed, by reason", ["reason"], registry=self.registry
        )
        self._condemned = Counter(
            "modelcached_blobs_condemned", "Blobs on disk that were not what their name says", registry=self.registry
        )
        self._scrubbed = Counter(
            "modelcached_scrubbed_bytes", "Bytes at rest that were read again", registry=self.registry
        )
        self._scrub_failures = Counter(
            "modelcached_scrub_failures", "Blobs at rest that were found bad", registry=self.registry
        )
        self._hub = Counter(
            "modelcached_hub_calls",
            "Questions to the Hub's API by outcome",
            ["call", "outcome"],
            registry=self.registry,
        )
        self._drift = Counter(
            "modelcached_drift",
            "Things in hub/ that somebody else had changed, by kind",
            ["kind"],
            registry=self.registry,
        )
        self._upkeep = Counter(
            "modelcached_upkeep_runs",
            "Turns of the loops beside requests, by outcome",
            ["loop", "outcome"],
            registry=self.registry,
        )

    def observe(self, event: Event) -> None:
        """Counts what happened."""
        match event:
            case RequestEnded(outcome, reason, seconds):
                self._requests.labels(outcome, reason).inc()
                self._seconds.labels(outcome).observe(seconds)
            case BytesFetched(origin, size):
                self._fetched.labels(origin).inc(size)
            case SnapshotEvicted(_, _, freed, reason):
                self._evictions.labels(reason).inc()
                self._evicted.labels(reason).inc(max(0, freed))
            case BlobCondemned():
                self._condemned.inc()
            case BlobScrubbed(size, right):
                self._scrubbed.inc(size)
                self._scrub_failures.inc(not right)
            case HubCalled(call, outcome):
                self._hub.labels(call, outcome).inc()
            case DriftFound(kind, count):
                self._drift.labels(kind).inc(count)
            case UpkeepRan(loop, outcome):
                self._upkeep.labels(loop, outcome).inc()


class _Gauges(Collector):
    def __init__(self, status: Callable[[], Status], tasks: Callable[[], int]) -> None:
        self._status = status
        self._tasks = tasks

    def describe(self) -> Iterator[Metric]:
        """Nothing is read when the registry is built."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The disk's truth at this moment."""
        yield InfoMetricFamily("modelcached_build", "Version of the daemon", {"version": __version__})
        status = self._status()
        gauges: dict[str, tuple[str, float]] = {
            "budget_bytes": ("Most that the cache may use", status.budget_bytes),
            "used_bytes": ("All that du sees under cache.dir", status.used_bytes),
            "reserved_bytes": ("Promised to requests, not yet allocated", status.reserved_bytes),
            "partial_bytes": ("Unfinished blobs, a part of used", status.partial_bytes),
            "trash_bytes": ("Out of sight, not yet off the disk, a part of used", status.trash_bytes),
            "quarantine_bytes": ("Bad blobs kept out of reach, a part of used", status.quarantine_bytes),
            "pinned_bytes": ("Under pins", status.pinned_bytes),
            "leased_bytes": ("Under leases", status.leased_bytes),
            "min_free_bytes": ("Free space that is left to others", status.min_free_bytes),
            "filesystem_free_bytes": (
                "Free for unprivileged writers on the cache's filesystem",
                status.filesystem_free_bytes,
            ),
            "filesystem_size_bytes": ("Size of the cache's filesystem", status.filesystem_total_bytes),
            "models": ("Cached snapshots", status.models),
            "leases": ("Leases", status.leases),
            "transfers": ("Models on their way", len(status.transfers)),
            "transfers_queued": (
                "Models that wait for their turn (transfer.models), a part of transfers",
                sum(t.progress.phase is Phase.QUEUED for t in status.transfers),
            ),
            "transfer_waiters": ("Calls that wait for a transfer", sum(t.progress.waiters for t in status.transfers)),
            "degraded": ("Reasons why the daemon is not as it should be", len(status.degraded)),
            "event_loop_tasks": ("Running tasks; at rest always the same, or something was left behind", self._tasks()),
        }
        if status.oldest_check is not None:
            age = max(0.0, time.time() - status.oldest_check)
            gauges["oldest_check_age_seconds"] = ("Since the blob that was read longest ago was read", age)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"modelcached_{name}", text, value=value)
        listed = GaugeMetricFamily(
            "modelcached_model_list_entries", "Models of the model list, by how they stand", labels=["state"]
        )
        for standing in Standing:
            listed.add_metric([standing.value], sum(entry.standing is standing for entry in status.listed))
        yield listed

"""What must hold, and what we aim for. The bench says where we are; it never fails for a figure."""

from __future__ import annotations

from dataclasses import dataclass

from tests.bench.ours import OURS, ModelcachedXet
from tests.bench.peers import Aria2, Curl, CurlHash, Snapshot, SnapshotXet


@dataclass(frozen=True)
class Target:
    """A limit on one figure of ours, or on how many times better than a peer's it is."""

    case: str
    key: str
    must: float
    against: str | None = None
    """The contender whose figure ours is compared with; None: our own figure is."""
    aim: float | None = None
    who: str = OURS

    @property
    def at_least(self) -> bool:
        """Whether more is better: ratios, which are given as times better than a peer, and rates."""
        return self.against is not None or self.key == "rate"

    def met(self, value: float) -> bool:
        """Whether the limit holds."""
        return value >= self.must if self.at_least else value < self.must


def _cold(case: str) -> tuple[Target, ...]:
    return (
        Target(case, "seconds", 2.0, Snapshot.name, 2.5),
        Target(case, "seconds", 1.0, Aria2.name, 1.3),
        Target(case, "seconds", 1.2, CurlHash.name, 1.4),
        Target(case, "seconds", 0.65, Curl.name, 0.8),
        Target(case, "cpu_gib", 2.0, Snapshot.name),
        Target(case, "peak", 300.0),
    )


TARGETS = (
    *_cold("cold-shards"),
    *_cold("cold-file"),
    Target("far-50", "seconds", 4.0, Snapshot.name),
    Target("xet", "seconds", 0.8, SnapshotXet.name, who=ModelcachedXet.name),
    Target("xet", "peak", 600.0, who=ModelcachedXet.name),
    Target("hit-1", "p50", 1.2),
    Target("hit-1", "p99", 5.0),
    Target("hit-64", "rate", 1500.0),
    Target("hit-64", "p99", 80.0),
    Target("process", "ms", 1 / 1.15, "bare script: grpc, stubs, one call"),  # at most 1.15 times its time
    Target("process", "ms", 1 / 0.4, "hf download"),  # at most 0.4 of its time
    Target("meanwhile", "p99", 20.0, who="during a transfer"),
    Target("meanwhile", "lag_p999", 50.0, who="during a transfer"),
    Target("scale", "seconds", 2.0),
    Target("scale", "mib", 200.0),
    Target("scale", "status", 100.0),
    Target("scale", "ls", 300.0),
    Target("scale", "page", 300.0),
    Target("scale", "cachectl_ls", 300.0),
    Target("scale", "cachectl_status", 300.0),
    Target("scale", "cachectl_top", 300.0),
    Target("scale", "many", 10.0),
)

"""Leases: proofs of use, each with its own kind of end (the rules are pure; time comes in as numbers).

========== ======================================= ==============================================
kind       granted when                            ends when
========== ======================================= ==============================================
pod        the pod's directory was seen             seen absent twice while the witness is healthy
stream     the caller will open HoldModel           gone for ``reconnect_grace``
ttl        otherwise                                ``ttl`` after the last renewal
recovered  state.db, or a lease in it, was lost     an operator, or a new proof of use
========== ======================================= ==============================================

Time is CLOCK_BOOTTIME with the boot's id: a wall clock that jumps ends nothing,
and another boot starts a lease's time anew (longer, never shorter).
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, fields, replace

from modelcached.model import Commit, RepoId, Revision, SnapshotId

POD_ABSENCES = 2
"""How often in a row a pod's directory must be missed: one miss may be a race with the lister."""


class LeaseKind(enum.Enum):
    """How a lease ends."""

    POD = "pod"
    STREAM = "stream"
    TTL = "ttl"
    RECOVERED = "recovered"


@dataclass(frozen=True, slots=True)
class LeasedModel:
    """A snapshot under a lease, and by which branch or tag it was asked for (empty: by commit)."""

    snapshot: SnapshotId
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """One proof of use."""

    id: str
    kind: LeaseKind
    holder: str
    models: tuple[LeasedModel, ...]
    granted_at: float
    """Seconds since the epoch; shown, never reckoned with."""
    ttl_seconds: float | None
    """From the last renewal; for a pod lease ``max_pod_lease``; None where only an event ends it."""
    boot_id: str
    renewed_boottime: float
    """CLOCK_BOOTTIME, in ``boot_id``."""
    pod_uid: str = ""

    def __str__(self) -> str:
        """Who holds it and how, for refusals: what an operator needs to find them."""
        pod = f", pod {self.pod_uid}" if self.pod_uid and self.pod_uid not in self.holder else ""
        return f"{self.holder or 'unnamed'} ({self.kind.value} lease {self.id}{pod})"

    def to_json(self) -> str:
        """As it lies in state.db."""
        data = {name: getattr(self, name) for name in _FIELDS}
        data["kind"] = self.kind.value
        data["models"] = [[m.snapshot.repo_id, m.snapshot.commit, m.revision] for m in self.models]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Lease:
        """Raises ValueError, KeyError or TypeError for what is none.

        Strict, for one that is not understood counts as lost, while one half understood may keep nothing.
        """
        data = json.loads(text)
        data["kind"] = LeaseKind(data["kind"])
        data["models"] = tuple(
            LeasedModel(SnapshotId(RepoId(repo), Commit(commit)), revision) for repo, commit, revision in data["models"]
        )
        lease = cls(**data)
        texts = [lease.id, lease.holder, lease.boot_id, lease.pod_uid]
        texts += [text for m in lease.models for text in (m.snapshot.repo_id, m.snapshot.commit, m.revision)]
        numbers = [lease.granted_at, lease.renewed_boottime, 0.0 if lease.ttl_seconds is None else lease.ttl_seconds]
        if not lease.models or not all(isinstance(text, str) for text in texts):
            raise ValueError("names no model")
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("has a time that is none")
        return lease

    def expires_in(self, now: float, boot_id: str) -> float | None:
        """Seconds to its end; None where only an event ends it."""
        if self.ttl_seconds is None:
            return None
        if boot_id != self.boot_id:
            return self.ttl_seconds
        return self.renewed_boottime + self.ttl_seconds - now

    def renewed(self, now: float, boot_id: str) -> Lease:
        """The same with its time begun anew."""
        return replace(self, boot_id=boot_id, renewed_boottime=now)

    def covers(self, snapshot: SnapshotId, refs: dict[Revision, Commit]) -> bool:
        """The commit it was granted for, and whatever the branch it was asked by points to now."""
        for model in self.models:
            if model.snapshot.repo_id != snapshot.repo_id:
                continue
            if model.snapshot.commit == snapshot.commit:
                return True
            if model.revision and refs.get(Revision(model.revision)) == snapshot.commit:
                return True
        return False


@dataclass(frozen=True, slots=True)
class PodsSeen:
    """One look at the kubelet's pods directory."""

    uids: frozenset[str]
    healthy: bool
    """It could be listed and showed a pod that is known to be there: only then does absence mean anything."""


class PodWitness:
    """Counts in how many healthy looks in a row each pod was missing."""

    def __init__(self) -> None:
        self._absent: dict[str, int] = {}

    def look(self, seen: PodsSeen, leased_uids: set[str]) -> set[str]:
        """The leased pods that are proven gone by now."""
        if not seen.healthy:
            return set()
        gone = set()
        for uid in leased_uids:
            if uid in seen.uids:
                self._absent.pop(uid, None)
                continue
            self._absent[uid] = self._absent.get(uid, 0) + 1
            if self._absent[uid] >= POD_ABSENCES:
                gone.add(uid)
                del self._absent[uid]
        return gone


_FIELDS = tuple(field.name for field in fields(Lease))

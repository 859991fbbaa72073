"""Between the contract's messages and the cache's values. Everything from outside is checked here."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from modelcache.v1 import cache_pb2, common_pb2

from modelcached.cache.requests import (
    CachedModel,
    EnsureRequest,
    LeaseWish,
    ModelRequest,
    Outcome,
    Progress,
    Ready,
)
from modelcached.errors import CacheError, Reason
from modelcached.ledger.clock import Clock
from modelcached.ledger.leases import Lease, LeaseKind
from modelcached.model import Commit, SnapshotId, is_token, parse_repo_id, parse_revision, shown
from modelcached.profiles import parse_profile
from modelcached.store.index import SnapshotState

MAX_ADAPTERS = 64
MAX_TEXT_CHARACTERS = 256

_OUTCOMES = {
    Outcome.HIT: common_pb2.OUTCOME_HIT,
    Outcome.JOINED: common_pb2.OUTCOME_JOINED,
    Outcome.DOWNLOADED: common_pb2.OUTCOME_DOWNLOADED,
}
_KINDS = {
    LeaseKind.POD: common_pb2.LEASE_KIND_POD,
    LeaseKind.STREAM: common_pb2.LEASE_KIND_STREAM,
    LeaseKind.TTL: common_pb2.LEASE_KIND_TTL,
    LeaseKind.RECOVERED: common_pb2.LEASE_KIND_RECOVERED,
}
_STATES = {
    SnapshotState.READY: common_pb2.MODEL_STATE_READY,
    SnapshotState.UNVERIFIED: common_pb2.MODEL_STATE_UNVERIFIED,
    SnapshotState.CONDEMNED: common_pb2.MODEL_STATE_CONDEMNED,
}


def _text(name: str, value: str, limit: int = MAX_TEXT_CHARACTERS) -> str:
    if len(value) > limit or not value.isprintable():
        raise CacheError(
            Reason.INVALID_REQUEST,
            f"{name} must be at most {limit} printable characters, got '{shown(value)}'",
            metadata={"field": name},
        )
    return value


def model_request(message: common_pb2.ModelReference) -> ModelRequest:
    """Raises CacheError INVALID_REPO_ID, INVALID_REVISION or INVALID_PATTERN."""
    profile = message.profile
    return _parsed(message.repo_id, message.revision, profile.name, tuple(profile.include), tuple(profile.exclude))


@functools.lru_cache(maxsize=256)  # a node's pods ask for the same few models again and again
def _parsed(
    repo_id: str, revision: str, profile: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> ModelRequest:
    return ModelRequest(parse_repo_id(repo_id), parse_revision(revision), parse_profile(profile, include, exclude))


def model_requests(messages: Iterable[common_pb2.ModelReference]) -> tuple[ModelRequest, ...]:
    """Several as one. Raises CacheError INVALID_*."""
    models = tuple(map(model_request, messages))
    if len(models) > 1 and len({(model.repo_id, model.revision, model.profile) for model in models}) != len(models):
        raise CacheError(Reason.INVALID_REQUEST, "the request names one of its models twice")
    return models


def ensure_request(message: cache_pb2.EnsureModelRequest) -> EnsureRequest:
    """Raises CacheError INVALID_*."""
    if len(message.adapters) > MAX_ADAPTERS:
        raise CacheError(
            Reason.INVALID_REQUEST,
            f"a request may have {MAX_ADAPTERS} adapters, this one has {len(message.adapters)}",
            metadata={"limit": MAX_ADAPTERS},
        )
    models = model_requests([message.model, *message.adapters])
    token = message.token.strip()
    if token and not is_token(token):
        raise CacheError(Reason.INVALID_REQUEST, "the token given is not one word of visible ASCII, or far too long")
    lease = message.lease
    pod_uid = _text("lease.pod_uid", lease.pod_uid, 64)
    if pod_uid and not pod_uid.replace("-", "").isalnum():  # becomes a directory's name
        raise CacheError(Reason.INVALID_REQUEST, f"lease.pod_uid '{shown(pod_uid)}' is no pod's uid")
    ttl = lease.ttl.ToTimedelta() if lease.HasField("ttl") else None
    if ttl is not None and ttl <= timedelta(0):
        raise CacheError(Reason.INVALID_REQUEST, f"lease.ttl must be positive, got {ttl}")
    patience = message.wait_for_space.ToTimedelta() if message.HasField("wait_for_space") else timedelta(0)
    if patience < timedelta(0):
        raise CacheError(Reason.INVALID_REQUEST, f"wait_for_space must not be negative, got {patience}")
    return EnsureRequest(
        models,
        LeaseWish(pod_uid, lease.stream, _text("lease.holder", lease.holder), ttl),
        token or None,
        _text("request_id", message.request_id, 64) or os.urandom(16).hex(),
        message.prewarm if message.HasField("prewarm") else None,
        patience,
        message.with_files,
    )


def timestamp(seconds: float | None) -> Timestamp | None:
    """Seconds since the epoch as the contract says them."""
    if seconds is None:
        return None
    whole, nanos = divmod(int(seconds * 1e9), 10**9)
    return Timestamp(seconds=whole, nanos=nanos)


def duration(value: timedelta | None) -> Duration | None:
    """A time span as the contract says it."""
    if value is None:
        return None
    message = Duration()
    message.FromTimedelta(value)
    return message


def lease_message(lease: Lease, clock: Clock, seconds_left: float | None = None) -> common_pb2.Lease:
    """A lease, with its end as a wall-clock time for people; ``seconds_left`` where more than the lease is known."""
    left = lease.expires_in(clock.boottime(), clock.boot_id) if seconds_left is None else seconds_left
    return common_pb2.Lease(
        id=lease.id,
        kind=_KINDS[lease.kind],
        holder=lease.holder,
        models=[
            common_pb2.LeasedModel(repo_id=m.snapshot.repo_id, commit=m.snapshot.commit, revision=m.revision)
            for m in lease.models
        ],
        granted_at=timestamp(lease.granted_at),
        expires_at=timestamp(clock.wall() + left) if left is not None else None,
    )


def progress_message(progress: Progress, request_id: str) -> cache_pb2.EnsureModelResponse:
    """One step of a stream."""
    return cache_pb2.EnsureModelResponse(
        progress=cache_pb2.Progress(
            phase=cache_pb2.Phase.ValueType(int(progress.phase)),
            bytes_total=progress.bytes_total,
            bytes_done=progress.bytes_done,
            bytes_per_second=progress.bytes_per_second,
            eta=duration(progress.eta),
            waiters=progress.waiters,
            detail=progress.detail,
            request_id=request_id,
            files=[
                cache_pb2.FileProgress(
                    repo_id=file.repo_id, path=file.path, bytes_total=file.bytes_total, bytes_done=file.bytes_done
                )
                for file in progress.files
            ],
        )
    )


def ready_message(ready: Ready, clock: Clock) -> cache_pb2.EnsureModelResponse:
    """The end of a stream."""
    return cache_pb2.EnsureModelResponse(
        ready=cache_pb2.Ready(
            models=[
                common_pb2.ReadyModel(
                    repo_id=model.snapshot.repo_id,
                    revision=model.revision,
                    commit=model.snapshot.commit,
                    path=model.path,
                    outcome=_OUTCOMES[model.outcome],
                    profile=model.selection.profile,
                    format=model.selection.format,
                    bytes_total=model.bytes_total,
                    bytes_fetched=model.bytes_fetched,
                    bytes_linked=model.bytes_linked,
                    stale=model.stale,
                )
                for model in ready.models
            ],
            lease=lease_message(ready.lease, clock),
            hub_dir=ready.hub_dir,
        )
    )


def model_message(model: CachedModel) -> common_pb2.Model:
    """A line of the list."""
    return common_pb2.Model(
        repo_id=model.snapshot.repo_id,
        commit=model.snapshot.commit,
        revisions=model.revisions,
        profiles=model.profiles,
        size_bytes=model.size_bytes,
        unique_bytes=model.unique_bytes,
        last_used=timestamp(model.used_at),
        pinned=model.pinned,
        lease_ids=model.leases,
        state=_STATES[model.state],
        path=model.path,
    )


def page_token(snapshot: SnapshotId | None) -> str:
    """Where the next page begins; empty on the last."""
    return f"{snapshot.repo_id}@{snapshot.commit}" if snapshot else ""


def parse_page_token(token: str) -> SnapshotId | None:
    """Raises CacheError(INVALID_REQUEST) for what no answer of ours said."""
    if not token:
        return None
    repo_id, at, commit = token.rpartition("@")
    if not at or len(commit) != 40:
        raise CacheError(Reason.INVALID_REQUEST, f"page_token '{shown(token)}' is none of ours")
    return SnapshotId(parse_repo_id(repo_id), Commit(commit))

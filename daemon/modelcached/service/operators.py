"""What operators ask and are told: the messages of AdminService, beside those of translate.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

from modelcache.v1 import admin_pb2, cache_pb2, common_pb2

from modelcached.cache.requests import (
    EnsureRequest,
    Evicted,
    EvictionRule,
    Fit,
    Garbage,
    GarbageKind,
    Listed,
    ModelDetail,
    Plan,
    Reading,
    Standing,
    Status,
    Transfer,
    Verdict,
)
from modelcached.config import RELOADABLE, Config
from modelcached.doctor import Finding, Level
from modelcached.errors import CacheError, Reason
from modelcached.ledger.clock import Clock
from modelcached.ledger.history import Kind, Row
from modelcached.ledger.use import PinOwner
from modelcached.model import Digest, Selection, SnapshotId
from modelcached.profiles import parse_canonical
from modelcached.service.translate import duration, ensure_request, lease_message, model_message, timestamp

_FITS = {
    Fit.CACHED: admin_pb2.FIT_CACHED,
    Fit.NOW: admin_pb2.FIT_NOW,
    Fit.AFTER_EVICTION: admin_pb2.FIT_AFTER_EVICTION,
    Fit.NOT_NOW: admin_pb2.FIT_NOT_NOW,
    Fit.NEVER: admin_pb2.FIT_NEVER,
}
_STANDINGS = {
    Standing.HELD: admin_pb2.LISTED_STATE_HELD,
    Standing.FETCHING: admin_pb2.LISTED_STATE_FETCHING,
    Standing.WAITING: admin_pb2.LISTED_STATE_WAITING,
    Standing.FAILING: admin_pb2.LISTED_STATE_FAILING,
}


def transfer_message(transfer: Transfer) -> admin_pb2.Transfer:
    """A running transfer."""
    progress = transfer.progress
    return admin_pb2.Transfer(
        repo_id=transfer.snapshot.repo_id,
        commit=transfer.snapshot.commit,
        bytes_total=progress.bytes_total,
        bytes_done=progress.bytes_done,
        bytes_per_second=progress.bytes_per_second,
        eta=duration(progress.eta),
        waiters=progress.waiters,
        background=transfer.background,
        detail=progress.detail,
    )


def listed_message(listed: Listed) -> admin_pb2.ListedModel:
    """A model of the model list."""
    return admin_pb2.ListedModel(
        repo_id=listed.model.repo_id,
        revision=listed.model.revision,
        profile=listed.model.profile.canonical,
        priority=listed.priority,
        state=_STANDINGS[listed.standing],
        detail=listed.detail,
    )


def status_message(status: Status, *, version: str, started_at: float) -> admin_pb2.CacheStatus:
    """The disk's truth."""
    return admin_pb2.CacheStatus(
        budget_bytes=status.budget_bytes,
        used_bytes=status.used_bytes,
        reserved_bytes=status.reserved_bytes,
        partial_bytes=status.partial_bytes,
        trash_bytes=status.trash_bytes,
        quarantine_bytes=status.quarantine_bytes,
        pinned_bytes=status.pinned_bytes,
        leased_bytes=status.leased_bytes,
        filesystem_free_bytes=status.filesystem_free_bytes,
        filesystem_total_bytes=status.filesystem_total_bytes,
        min_free_bytes=status.min_free_bytes,
        models=status.models,
        transfers=map(transfer_message, status.transfers),
        leases=status.leases,
        hub_dir=status.hub_dir,
        version=version,
        started_at=timestamp(started_at),
        degraded=status.degraded,
        model_list=map(listed_message, status.listed),
        filesystem_inodes=status.filesystem_inodes or 0,
        filesystem_free_inodes=status.filesystem_free_inodes or 0,
        reserved_inodes=status.reserved_inodes,
        min_free_inodes=status.min_free_inodes,
        pinned_models=status.pinned_models,
        leased_models=status.leased_models,
        room_bytes=status.room_bytes,
    )


def plan_message(plan: Plan) -> admin_pb2.PlanModelsResponse:
    """A plan."""
    return admin_pb2.PlanModelsResponse(
        models=[
            admin_pb2.PlannedModel(
                repo_id=model.snapshot.repo_id,
                revision=model.revision,
                commit=model.snapshot.commit,
                profile=model.selection.profile,
                format=model.selection.format,
                bytes_total=model.bytes_total,
                bytes_to_fetch=model.bytes_to_fetch,
            )
            for model in plan.models
        ],
        fit=_FITS[plan.fit],
        bytes_needed=plan.bytes_needed,
        bytes_room=plan.bytes_room,
        evicts=map(evicted_message, plan.evicts),
        reason=plan.why,
    )


def evicted_message(evicted: Evicted) -> admin_pb2.EvictedModel:
    """What went, or would go."""
    snapshot = evicted.snapshot
    return admin_pb2.EvictedModel(repo_id=snapshot.repo_id, commit=snapshot.commit, bytes_freed=evicted.freed_bytes)


_EVENTS = {kind: admin_pb2.EventKind.Value(f"EVENT_KIND_{kind.name}") for kind in Kind}
_KINDS_OF_EVENTS = {value: kind for kind, value in _EVENTS.items()}


def event_kinds(values: Iterable[admin_pb2.EventKind.ValueType]) -> frozenset[Kind]:
    """Those that this daemon knows; all where none is named. Raises CacheError(INVALID_REQUEST)."""
    named = list(values)
    unknown = [value for value in named if value not in _KINDS_OF_EVENTS]
    if unknown:
        raise CacheError(Reason.INVALID_REQUEST, f"this daemon knows no event kind {unknown[0]}")
    return frozenset(_KINDS_OF_EVENTS[value] for value in named) or frozenset(Kind)


def event_message(row: Row) -> admin_pb2.Event:
    """A line of the history."""
    entry = row.entry
    return admin_pb2.Event(
        id=row.id,
        at=timestamp(row.at),
        kind=_EVENTS[entry.kind],
        model=entry.model,
        reason=entry.reason,
        bytes=max(0, entry.size_bytes),
        duration=duration(timedelta(seconds=entry.seconds)) if entry.seconds else None,
        holder=entry.holder,
        request_id=entry.request_id,
        detail=entry.detail,
    )


def _name(snapshot: SnapshotId) -> str:
    return f"{snapshot.repo_id}@{snapshot.commit}"


def _digest(digest: Digest) -> str:
    return f"{digest.algorithm.value}:{digest.hex}"


def _wanted(selection: Selection) -> common_pb2.Profile | None:
    profile = parse_canonical(selection.profile)
    if profile is None:
        return None
    return common_pb2.Profile(name=profile.name, include=profile.include, exclude=profile.exclude)


def detail_message(detail: ModelDetail, clock: Clock) -> admin_pb2.DescribeModelResponse:
    """One snapshot down to its files."""
    return admin_pb2.DescribeModelResponse(
        model=model_message(detail.model),
        files=[
            admin_pb2.ModelFile(
                path=file.path,
                size_bytes=file.size_bytes,
                digest=_digest(file.digest),
                cached=file.cached,
                verified=file.verified,
                verified_at=timestamp(file.verified_at),
                shared_with=map(_name, file.shared_with),
            )
            for file in detail.files
        ],
        selections=[
            admin_pb2.ModelSelection(
                profile=each.profile, format=each.format, paths=sorted(each.paths), wanted=_wanted(each)
            )
            for each in detail.selections
        ],
        leases=[lease_message(lease, clock) for lease in detail.leases],
        pins=[admin_pb2.ModelPin(revision=pin.revision, listed=pin.owner is PinOwner.LIST) for pin in detail.pins],
        kept_by=detail.kept_by,
    )


_VERDICTS = {verdict: admin_pb2.Verdict.Value(f"VERDICT_{verdict.name}") for verdict in Verdict}


def reading_message(reading: Reading) -> admin_pb2.VerifyModelsResponse:
    """How far a reading is."""
    return admin_pb2.VerifyModelsResponse(
        progress=admin_pb2.VerifyProgress(
            bytes_total=reading.bytes_total,
            bytes_done=min(reading.bytes_done, reading.bytes_total),
            files_total=reading.files_total,
            files_done=reading.files_done,
            reading=reading.now,
        )
    )


def read_message(reading: Reading) -> admin_pb2.VerifyModelsResponse:
    """The end of a reading."""
    return admin_pb2.VerifyModelsResponse(
        done=admin_pb2.VerifyDone(
            models=reading.models,
            files=reading.files_done,
            bytes=reading.bytes_done,
            bad=[
                admin_pb2.BadFile(
                    repo_id=bad.snapshot.repo_id,
                    commit=bad.snapshot.commit,
                    path=bad.path,
                    digest=_digest(bad.digest),
                    verdict=_VERDICTS[bad.verdict],
                    repaired=bad.repaired,
                    detail=bad.detail,
                )
                for bad in reading.bad
            ],
        )
    )


_GARBAGE = {kind: admin_pb2.GarbageKind.Value(f"GARBAGE_KIND_{kind.name}") for kind in GarbageKind}
_KINDS_OF_GARBAGE = {value: kind for kind, value in _GARBAGE.items()}


def garbage_kinds(values: Iterable[admin_pb2.GarbageKind.ValueType]) -> frozenset[GarbageKind]:
    """All where none is named. Raises CacheError(INVALID_REQUEST)."""
    named = list(values)
    unknown = [value for value in named if value not in _KINDS_OF_GARBAGE]
    if unknown:
        raise CacheError(Reason.INVALID_REQUEST, f"this daemon knows no garbage kind {unknown[0]}")
    return frozenset(_KINDS_OF_GARBAGE[value] for value in named) or frozenset(GarbageKind)


def garbage_message(item: Garbage) -> admin_pb2.Garbage:
    """One thing that is no model."""
    return admin_pb2.Garbage(
        kind=_GARBAGE[item.kind],
        name=item.name,
        repo_id=item.repo_id or "",
        bytes=item.size_bytes,
        modified_at=timestamp(item.modified_at),
        in_use=item.in_use,
    )


MAX_PATH_CHARACTERS = 4096
"""PATH_MAX of Linux."""


def import_request(message: admin_pb2.ImportModelRequest) -> EnsureRequest:
    """Raises CacheError INVALID_*."""
    if len(message.path) > MAX_PATH_CHARACTERS or "\0" in message.path:
        raise CacheError(Reason.INVALID_REQUEST, f"path must be at most {MAX_PATH_CHARACTERS} characters")
    asked = cache_pb2.EnsureModelRequest(
        model=message.model,
        lease=message.lease,
        request_id=message.request_id,
        prewarm=False,
        with_files=message.with_files,
    )
    return replace(ensure_request(asked), folder=message.path, moves=message.move)


def eviction_rule(message: admin_pb2.EvictionRule) -> EvictionRule:
    """Raises CacheError(INVALID_REQUEST)."""
    older = message.older_than.ToTimedelta() if message.HasField("older_than") else None
    if older is not None and older < timedelta(0):
        raise CacheError(Reason.INVALID_REQUEST, f"rule.older_than must not be negative, got {older}")
    return EvictionRule(older, message.until_free_bytes or None)


_LEVELS = {level: admin_pb2.FindingLevel.Value(f"FINDING_LEVEL_{level.name}") for level in Level}


def finding_message(finding: Finding) -> admin_pb2.DiagnoseResponse:
    """What one check says."""
    return admin_pb2.DiagnoseResponse(
        finding=admin_pb2.Finding(
            level=_LEVELS[finding.level], check=finding.check, text=finding.text, mend=finding.mend
        )
    )


def setting_messages(config: Config, written: Config) -> list[admin_pb2.Setting]:
    """Every setting in force, what it would be if nobody had set it, and what it will be."""
    defaults, following = Config().effective(), written.effective()
    return [
        admin_pb2.Setting(
            name=f"{section}.{key}",
            value=json.dumps(value),
            default_value=json.dumps(defaults[section][key]),
            reloadable=key in RELOADABLE.get(section, frozenset()),
            next_value="" if following[section][key] == value else json.dumps(following[section][key]),
        )
        for section, values in config.effective().items()
        for key, value in values.items()
    ]

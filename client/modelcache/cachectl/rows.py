"""What --json prints, as plain values; scripts rely on these keys. Sizes are bytes, times RFC 3339 or null."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from google.protobuf.message import Message

from modelcache.v1 import admin_pb2, common_pb2
from modelcache.words import (
    UNKNOWN,
    event_kind_word,
    finding_level_word,
    garbage_word,
    lease_kind_word,
    model_state_word,
    verdict_word,
)

Row = dict[str, object]

_LISTED_STATES: dict[int, str] = {
    admin_pb2.LISTED_STATE_HELD: "held",
    admin_pb2.LISTED_STATE_FETCHING: "fetching",
    admin_pb2.LISTED_STATE_WAITING: "waiting",
    admin_pb2.LISTED_STATE_FAILING: "failing",
}


def listed_state_word(state: int) -> str:
    """held, fetching, waiting or failing."""
    return _LISTED_STATES.get(state, UNKNOWN)


def status_row(status: admin_pb2.CacheStatus) -> Row:
    """The disk's truth; used_bytes is what `du` sees, and partial, trash and quarantine are parts of it."""
    return {
        "budget_bytes": status.budget_bytes,
        "used_bytes": status.used_bytes,
        "reserved_bytes": status.reserved_bytes,
        "partial_bytes": status.partial_bytes,
        "trash_bytes": status.trash_bytes,
        "quarantine_bytes": status.quarantine_bytes,
        "pinned_bytes": status.pinned_bytes,
        "leased_bytes": status.leased_bytes,
        "filesystem_free_bytes": status.filesystem_free_bytes,
        "filesystem_total_bytes": status.filesystem_total_bytes,
        "filesystem_inodes": status.filesystem_inodes or None,
        "filesystem_free_inodes": status.filesystem_free_inodes if status.filesystem_inodes else None,
        "reserved_inodes": status.reserved_inodes,
        "min_free_inodes": status.min_free_inodes,
        "room_bytes": status.room_bytes if status.HasField("room_bytes") else None,
        "min_free_bytes": status.min_free_bytes,
        "models": status.models,
        "pinned_models": status.pinned_models,
        "leased_models": status.leased_models,
        "leases": status.leases,
        "transfers": [transfer_row(transfer) for transfer in status.transfers],
        "hub_dir": status.hub_dir,
        "version": status.version,
        "degraded": list(status.degraded),
        "model_list": [listed_row(listed) for listed in status.model_list],
    }


def listed_row(listed: admin_pb2.ListedModel) -> Row:
    """A model of the model list; detail says what it waits for, or why it fails."""
    return {
        "repo_id": listed.repo_id,
        "revision": listed.revision,
        "profile": listed.profile,
        "priority": listed.priority,
        "state": listed_state_word(listed.state),
        "detail": listed.detail,
    }


def transfer_row(transfer: admin_pb2.Transfer) -> Row:
    """A running transfer; eta_seconds is null while nothing is known."""
    return {
        "repo_id": transfer.repo_id,
        "commit": transfer.commit,
        "bytes_total": transfer.bytes_total,
        "bytes_done": transfer.bytes_done,
        "bytes_per_second": transfer.bytes_per_second,
        "eta_seconds": transfer.eta.ToTimedelta().total_seconds() if transfer.HasField("eta") else None,
        "waiters": transfer.waiters,
        "background": transfer.background,
        "detail": transfer.detail or None,
    }


def model_row(model: common_pb2.Model) -> Row:
    """A cached snapshot."""
    return {
        "repo_id": model.repo_id,
        "commit": model.commit,
        "revisions": list(model.revisions),
        "profiles": list(model.profiles),
        "size_bytes": model.size_bytes,
        "unique_bytes": model.unique_bytes,
        "last_used": _moment(model, "last_used"),
        "pinned": model.pinned,
        "leases": list(model.lease_ids),
        "state": model_state_word(model.state),
    }


def lease_row(lease: common_pb2.Lease) -> Row:
    """A lease; expires_at is null where only an event ends it."""
    return {
        "id": lease.id,
        "kind": lease_kind_word(lease.kind),
        "holder": lease.holder,
        "models": [
            {"repo_id": model.repo_id, "commit": model.commit, "revision": model.revision or None}
            for model in lease.models
        ],
        "granted_at": _moment(lease, "granted_at"),
        "expires_at": _moment(lease, "expires_at"),
    }


def eviction_row(response: admin_pb2.EvictModelsResponse, *, dry_run: bool) -> Row:
    """What went, or with dry_run would go."""
    return {
        "dry_run": dry_run,
        "models": [
            {"repo_id": model.repo_id, "commit": model.commit, "bytes_freed": model.bytes_freed}
            for model in response.models
        ],
        "bytes_freed": response.bytes_freed,
        "bytes_short": response.bytes_short,
    }


_FITS = {
    admin_pb2.FIT_CACHED: "cached",
    admin_pb2.FIT_NOW: "now",
    admin_pb2.FIT_AFTER_EVICTION: "after_eviction",
    admin_pb2.FIT_NOT_NOW: "not_now",
    admin_pb2.FIT_NEVER: "never",
}


def plan_row(planned: admin_pb2.PlanModelsResponse) -> Row:
    """What models would take together; ``bytes_room`` is negative when the cache is over already."""
    return {
        "fit": _FITS.get(planned.fit, "unknown"),
        "reason": planned.reason or None,
        "bytes_needed": planned.bytes_needed,
        "bytes_room": planned.bytes_room,
        "models": [
            {
                "repo_id": model.repo_id,
                "revision": model.revision,
                "commit": model.commit,
                "profile": model.profile,
                "format": model.format,
                "bytes_total": model.bytes_total,
                "bytes_to_fetch": model.bytes_to_fetch,
            }
            for model in planned.models
        ],
        "evicts": [
            {"repo_id": model.repo_id, "commit": model.commit, "bytes_freed": model.bytes_freed}
            for model in planned.evicts
        ],
    }


def detail_row(detail: admin_pb2.DescribeModelResponse, events: Sequence[admin_pb2.Event]) -> Row:
    """A cached snapshot down to its files; ``events`` are the newest of its repository."""
    return {
        **model_row(detail.model),
        "path": detail.model.path,
        "files": [
            {
                "path": file.path,
                "size_bytes": file.size_bytes,
                "digest": file.digest,
                "cached": file.cached,
                "verified": file.verified,
                "verified_at": _moment(file, "verified_at"),
                "shared_with": list(file.shared_with),
            }
            for file in detail.files
        ],
        "selections": [
            {"profile": each.profile, "format": each.format, "paths": list(each.paths)} for each in detail.selections
        ],
        "leases": [lease_row(lease) for lease in detail.leases],
        "pins": [{"revision": pin.revision, "owner": "list" if pin.listed else "operator"} for pin in detail.pins],
        "kept_by": list(detail.kept_by),
        "events": [event_row(event) for event in events],
    }


def event_row(event: admin_pb2.Event) -> Row:
    """What happened; a field that has nothing to say is null."""
    return {
        "id": event.id,
        "at": _moment(event, "at"),
        "kind": event_kind_word(event.kind),
        "model": event.model or None,
        "reason": event.reason or None,
        "bytes": event.bytes,
        "seconds": event.duration.ToTimedelta().total_seconds() if event.HasField("duration") else None,
        "holder": event.holder or None,
        "request_id": event.request_id or None,
        "detail": event.detail or None,
    }


def verified_row(done: admin_pb2.VerifyDone) -> Row:
    """What was read, and what of it is not as it should be."""
    return {
        "models": done.models,
        "files": done.files,
        "bytes": done.bytes,
        "bad": [
            {
                "repo_id": bad.repo_id,
                "commit": bad.commit,
                "path": bad.path,
                "digest": bad.digest,
                "verdict": verdict_word(bad.verdict),
                "repaired": bad.repaired,
                "detail": bad.detail or None,
            }
            for bad in done.bad
        ],
    }


def garbage_row(response: admin_pb2.CollectGarbageResponse, *, removed: bool) -> Row:
    """What lies beside models, or with ``removed`` what of it went."""
    return {
        "removed": removed,
        "items": [
            {
                "kind": garbage_word(item.kind),
                "name": item.name,
                "repo_id": item.repo_id or None,
                "bytes": item.bytes,
                "modified_at": _moment(item, "modified_at"),
                "in_use": item.in_use,
            }
            for item in response.items
        ],
        "bytes_freed": response.bytes_freed,
    }


def finding_row(finding: admin_pb2.Finding) -> Row:
    """What one check says."""
    return {
        "level": finding_level_word(finding.level),
        "check": finding.check,
        "text": finding.text,
        "mend": finding.mend or None,
    }


def removed_row(response: admin_pb2.ImportModelResponse) -> Row:
    """What became of the folder of an import; beside what became of the model."""
    return {"removed_bytes": response.removed_bytes, "kept_paths": list(response.kept_paths)}


def config_row(response: admin_pb2.GetConfigResponse, settings: Iterable[admin_pb2.Setting]) -> Row:
    """Settings by name; values are as the configuration file would have them."""
    return {
        "config_file": response.config_file or None,
        "settings": {
            each.name: {
                "value": json.loads(each.value),
                "default": json.loads(each.default_value),
                "reloadable": each.reloadable,
                **({"next_value": json.loads(each.next_value)} if each.next_value else {}),
            }
            for each in settings
        },
    }


def _moment(message: Message, field: str) -> str | None:
    return str(getattr(message, field).ToJsonString()) if message.HasField(field) else None

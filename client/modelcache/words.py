"""The contract's enums as the lower-case words that scripts see."""

from __future__ import annotations

from modelcache.v1 import admin_pb2, common_pb2

UNKNOWN = "unknown"
"""A value that a newer daemon sends and this client has no word for."""

_OUTCOMES: dict[int, str] = {
    common_pb2.OUTCOME_HIT: "hit",
    common_pb2.OUTCOME_JOINED: "joined",
    common_pb2.OUTCOME_DOWNLOADED: "downloaded",
}
_LEASE_KINDS: dict[int, str] = {
    common_pb2.LEASE_KIND_POD: "pod",
    common_pb2.LEASE_KIND_STREAM: "stream",
    common_pb2.LEASE_KIND_TTL: "ttl",
    common_pb2.LEASE_KIND_RECOVERED: "recovered",
}
_MODEL_STATES: dict[int, str] = {
    common_pb2.MODEL_STATE_READY: "ready",
    common_pb2.MODEL_STATE_UNVERIFIED: "unverified",
    common_pb2.MODEL_STATE_CONDEMNED: "condemned",
}


EVENT_KINDS: dict[str, admin_pb2.EventKind.ValueType] = {
    "started": admin_pb2.EVENT_KIND_STARTED,
    "asked": admin_pb2.EVENT_KIND_ASKED,
    "refused": admin_pb2.EVENT_KIND_REFUSED,
    "fetched": admin_pb2.EVENT_KIND_FETCHED,
    "evicted": admin_pb2.EVENT_KIND_EVICTED,
    "damaged": admin_pb2.EVENT_KIND_DAMAGED,
    "drifted": admin_pb2.EVENT_KIND_DRIFTED,
    "pinned": admin_pb2.EVENT_KIND_PINNED,
    "unpinned": admin_pb2.EVENT_KIND_UNPINNED,
    "released": admin_pb2.EVENT_KIND_RELEASED,
    "cancelled": admin_pb2.EVENT_KIND_CANCELLED,
}
GARBAGE_KINDS: dict[str, admin_pb2.GarbageKind.ValueType] = {
    "partial": admin_pb2.GARBAGE_KIND_PARTIAL,
    "orphan": admin_pb2.GARBAGE_KIND_ORPHAN,
    "quarantine": admin_pb2.GARBAGE_KIND_QUARANTINE,
    "trash": admin_pb2.GARBAGE_KIND_TRASH,
}
_EVENT_KINDS: dict[int, str] = {kind: word for word, kind in EVENT_KINDS.items()}
_GARBAGE: dict[int, str] = {kind: word for word, kind in GARBAGE_KINDS.items()}
_VERDICTS: dict[int, str] = {
    admin_pb2.VERDICT_BAD: "bad",
    admin_pb2.VERDICT_MISSING: "missing",
    admin_pb2.VERDICT_UNREADABLE: "unreadable",
}


_LEVELS: dict[int, str] = {
    admin_pb2.FINDING_LEVEL_OK: "ok",
    admin_pb2.FINDING_LEVEL_WARNING: "warning",
    admin_pb2.FINDING_LEVEL_FAILURE: "failure",
    admin_pb2.FINDING_LEVEL_SKIPPED: "skipped",
}


def finding_level_word(level: int) -> str:
    """ok, warning, failure or skipped."""
    return _LEVELS.get(level, UNKNOWN)


def event_kind_word(kind: int) -> str:
    """started, asked, refused, fetched, evicted, damaged, drifted, pinned, unpinned, released or cancelled."""
    return _EVENT_KINDS.get(kind, UNKNOWN)


def verdict_word(verdict: int) -> str:
    """bad, missing or unreadable."""
    return _VERDICTS.get(verdict, UNKNOWN)


def garbage_word(kind: int) -> str:
    """partial, orphan, quarantine or trash."""
    return _GARBAGE.get(kind, UNKNOWN)


def outcome_word(outcome: int) -> str:
    """hit, joined or downloaded."""
    return _OUTCOMES.get(outcome, UNKNOWN)


def lease_kind_word(kind: int) -> str:
    """pod, stream, ttl or recovered."""
    return _LEASE_KINDS.get(kind, UNKNOWN)


def model_state_word(state: int) -> str:
    """ready, unverified or condemned."""
    return _MODEL_STATES.get(state, UNKNOWN)

"""The contract's enums as the lower-case words that scripts see."""

from __future__ import annotations

from modelcache.v1 import common_pb2

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


def outcome_word(outcome: int) -> str:
    """hit, joined or downloaded."""
    return _OUTCOMES.get(outcome, UNKNOWN)


def lease_kind_word(kind: int) -> str:
    """pod, stream, ttl or recovered."""
    return _LEASE_KINDS.get(kind, UNKNOWN)


def model_state_word(state: int) -> str:
    """ready, unverified or condemned."""
    return _MODEL_STATES.get(state, UNKNOWN)

"""The one table of what can go wrong: situation, gRPC code, reason, exit status and mend.

Both sides import it: the daemon raises by reason, the clients turn a reason
into an exit status. docs/errors.md and tests are made from it. Exit statuses
follow sysexits.h; 75 (EX_TEMPFAIL) always means "the same call may succeed later".
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

DOMAIN = "modelcached"
"""ErrorInfo.domain of every error of ours."""

EXIT_READY = 0
EXIT_USAGE = 64
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_TEMPORARY = 75


class Code(enum.IntEnum):
    """The gRPC status codes in use (google.rpc.Code), without importing grpc."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """Stable names; ErrorInfo.reason on the wire."""

    INVALID_REPO_ID = "INVALID_REPO_ID"
    INVALID_REVISION = "INVALID_REVISION"
    INVALID_PATTERN = "INVALID_PATTERN"
    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_MANIFEST = "INVALID_MANIFEST"
    REPO_NOT_FOUND = "REPO_NOT_FOUND"
    REVISION_NOT_FOUND = "REVISION_NOT_FOUND"
    MODEL_NOT_CACHED = "MODEL_NOT_CACHED"
    LEASE_NOT_FOUND = "LEASE_NOT_FOUND"
    PIN_NOT_FOUND = "PIN_NOT_FOUND"
    EMPTY_SELECTION = "EMPTY_SELECTION"
    GATED_REPO = "GATED_REPO"
    TOKEN_REJECTED = "TOKEN_REJECTED"  # noqa: S105 - the name of a reason
    POLICY = "POLICY"
    OVER_BUDGET = "OVER_BUDGET"
    NO_SPACE_NOW = "NO_SPACE_NOW"
    UPSTREAM_UNAVAILABLE = "UPSTREAM_UNAVAILABLE"
    UPSTREAM_STALLED = "UPSTREAM_STALLED"
    RATE_LIMITED = "RATE_LIMITED"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    STORAGE_ERROR = "STORAGE_ERROR"
    TRANSFER_CANCELLED = "TRANSFER_CANCELLED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    OVERLOADED = "OVERLOADED"
    IN_USE = "IN_USE"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row: what happened, how it is told, and what to do about it."""

    situation: str
    code: Code
    exit_status: int
    mend: str


TABLE: dict[Reason, Entry] = {
    Reason.INVALID_REPO_ID: Entry(
        "malformed repository id", Code.INVALID_ARGUMENT, 64, "write it as org/name, as on the Hub"
    ),
    Reason.INVALID_REVISION: Entry(
        "malformed revision", Code.INVALID_ARGUMENT, 64, "give a branch, a tag or a 40-hex commit"
    ),
    Reason.INVALID_PATTERN: Entry(
        "malformed profile or pattern",
        Code.INVALID_ARGUMENT,
        64,
        "use vllm, transformers, full, gguf:<quant>, or include/exclude patterns",
    ),
    Reason.INVALID_REQUEST: Entry(
        "malformed request", Code.INVALID_ARGUMENT, 64, "correct the field that the message names"
    ),
    Reason.INVALID_MANIFEST: Entry(
        "upstream lists files that cannot be stored safely",
        Code.FAILED_PRECONDITION,
        65,
        "the repository is broken or hostile; report it to its owner, or raise hub.max_files if it is only large",
    ),
    Reason.REPO_NOT_FOUND: Entry(
        "repository unknown",
        Code.NOT_FOUND,
        66,
        "check the spelling; a private repository needs a token that may see it",
    ),
    Reason.REVISION_NOT_FOUND: Entry(
        "revision unknown", Code.NOT_FOUND, 66, "check the branch, tag or commit on the Hub"
    ),
    Reason.MODEL_NOT_CACHED: Entry("model not in the cache", Code.NOT_FOUND, 66, "ensure it first"),
    Reason.LEASE_NOT_FOUND: Entry(
        "lease unknown or ended", Code.NOT_FOUND, 66, "ensure the model again to get a new lease"
    ),
    Reason.PIN_NOT_FOUND: Entry("no such pin", Code.NOT_FOUND, 66, "see the pins with cachectl ls"),
    Reason.EMPTY_SELECTION: Entry(
        "the profile selects no file",
        Code.FAILED_PRECONDITION,
        66,
        "choose another profile, or include/exclude patterns that match",
    ),
    Reason.GATED_REPO: Entry(
        "gated or private repository",
        Code.PERMISSION_DENIED,
        77,
        "accept its terms on the Hub and give a token that may read it",
    ),
    Reason.TOKEN_REJECTED: Entry(
        "token missing or not valid", Code.UNAUTHENTICATED, 77, "give a valid token in hub.token_file"
    ),
    Reason.POLICY: Entry(
        "refused by the node's policy", Code.PERMISSION_DENIED, 77, "see [policy] in the daemon's configuration"
    ),
    Reason.OVER_BUDGET: Entry(
        "can never fit", Code.RESOURCE_EXHAUSTED, 73, "raise cache.budget or choose a smaller model or profile"
    ),
    Reason.NO_SPACE_NOW: Entry(
        "cannot fit now", Code.RESOURCE_EXHAUSTED, 75, "unpin or release what is named, or come again when it is idle"
    ),
    Reason.UPSTREAM_UNAVAILABLE: Entry(
        "upstream down and nothing cached", Code.UNAVAILABLE, 69, "check the way to hub.endpoints; come again"
    ),
    Reason.UPSTREAM_STALLED: Entry(
        "upstream silent and nothing cached", Code.UNAVAILABLE, 69, "check the way to hub.endpoints; come again"
    ),
    Reason.RATE_LIMITED: Entry(
        "upstream limits our rate", Code.UNAVAILABLE, 75, "come again after the delay given; a token raises the limit"
    ),
    Reason.DIGEST_MISMATCH: Entry(
        "bytes differ from their digest after retries",
        Code.DATA_LOSS,
        65,
        "upstream or the way to it alters data; check mirrors and proxies",
    ),
    Reason.STORAGE_ERROR: Entry(
        "the cache's disk fails or is read-only", Code.UNAVAILABLE, 74, "check the disk below cache.dir"
    ),
    Reason.TRANSFER_CANCELLED: Entry(
        "cancelled by an operator", Code.CANCELLED, 75, "ask again; what was fetched is kept"
    ),
    Reason.SHUTTING_DOWN: Entry("the daemon is stopping", Code.UNAVAILABLE, 75, "ask again when it is back"),
    Reason.OVERLOADED: Entry("too many requests at once", Code.RESOURCE_EXHAUSTED, 75, "come again"),
    Reason.IN_USE: Entry(
        "asked to evict what is in use",
        Code.FAILED_PRECONDITION,
        75,
        "stop, unpin or release who holds it (named in the message)",
    ),
    Reason.INTERNAL: Entry(
        "a fault of the daemon", Code.INTERNAL, 70, "report it with the daemon's log lines of that request id"
    ),
}

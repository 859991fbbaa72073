"""What upstream can do wrong, and what a request may then cost and come to. The test is made from this.

Settings: ``hub.timeout`` 5 s, ``transfer.stall_timeout`` 2 s, ``transfer.retry_timeout`` 6 s. The model has a small
file and one in LFS; without a fault it takes five requests: revision, tree, both files, and the CDN.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.reasons import Reason

from tests.hub import Fault, FaultKind

SETTINGS = {"hub": {"timeout": "5s"}, "transfer": {"stall_timeout": "2s", "retry_timeout": "6s"}}
SMALL, LARGE = "config.json", "model.safetensors"
START_SECONDS = 1.5
"""What the processes of a request take on a busy machine, added to every row's seconds."""


@dataclass(frozen=True)
class Row:
    """One fault: what upstream does, how the request ends, within which time and how many requests to upstream."""

    fault: str
    outcome: Reason | None
    """None is success."""
    most_seconds: float
    most_requests: int
    faults: tuple[Fault, ...] = ()
    refused: bool = False
    """Nobody listens at either address."""
    says: tuple[str, ...] = ()
    """What the last word names, beside what to do about it; {endpoint}, {repo} and {commit} are filled in."""
    least_seconds: float = 0.0
    """For how long upstream is left alone about what failed, as its counters have it."""


def _status(code: int, where: str, **how: object) -> tuple[Fault, ...]:
    return (Fault(FaultKind.STATUS, where=where, status=code, **how),)  # type: ignore[arg-type]


_FILE = "{repo}@{commit}/" + LARGE
_LIMIT = "transfer.retry_timeout is 6 s"

TABLE: tuple[Row, ...] = (
    Row(
        "401: the API rejects the token",
        Reason.TOKEN_REJECTED,
        1,
        1,
        _status(401, "api", error_message="Invalid credentials in Authorization header"),
        says=("{endpoint}", "{repo}", "401"),
    ),
    Row(
        "401: the file's address rejects the token",
        Reason.TOKEN_REJECTED,
        1,
        4,
        _status(401, "resolve", error_message="Invalid credentials in Authorization header"),
        says=("{endpoint}", "{repo}@{commit}/", "401"),
    ),
    Row(
        "403: the repository is gated, says the API",
        Reason.GATED_REPO,
        1,
        1,
        _status(403, "api", error_code="GatedRepo"),
        says=("{repo} is gated", "there is no token to read it"),
    ),
    Row(
        "403: the repository is gated, says the file's address",
        Reason.GATED_REPO,
        1,
        4,
        _status(403, "resolve", error_code="GatedRepo"),
        says=("{endpoint}", "{repo}@{commit}/", "no token", "403"),
    ),
    Row(
        "404: no such repository",
        Reason.REPO_NOT_FOUND,
        1,
        1,
        _status(404, "api", error_code="RepoNotFound"),
        says=("{repo} does not exist on {endpoint}", "there is no token to see it"),
    ),
    Row(
        "404: no such revision",
        Reason.REVISION_NOT_FOUND,
        1,
        1,
        _status(404, "api", error_code="RevisionNotFound"),
        says=("{repo} has no revision main",),
    ),
    Row(
        "404: the repository went between its listing and its files",
        Reason.REPO_NOT_FOUND,
        1,
        4,
        _status(404, "resolve", error_code="RepoNotFound"),
        says=("{endpoint}", "{repo}@{commit}/", "404"),
    ),
    Row(
        "429 with Retry-After: 1, then 200, at the API",
        None,
        2,
        6,
        _status(429, "api", times=1, retry_after=1),
        least_seconds=1,
    ),
    Row(
        "429 with Retry-After: 1, then 200, at the CDN",
        None,
        2,
        7,
        _status(429, "cdn", times=1, retry_after=1),
        least_seconds=1,
    ),
    Row(
        "429 for ever, at the API",
        Reason.RATE_LIMITED,
        5,
        5,
        _status(429, "api", retry_after=1),
        says=("{endpoint}", "limits our rate (429)"),
    ),
    Row(
        "429 for ever, at the CDN",
        Reason.RATE_LIMITED,
        8,
        19,
        _status(429, "cdn", retry_after=1),
        says=(_FILE, "limits our rate (429)", _LIMIT),
    ),
    Row(
        "429 with Retry-After: 1h: told, not waited for",
        Reason.RATE_LIMITED,
        1,
        5,
        _status(429, "cdn", retry_after=3600),
        says=(_FILE, "limits our rate (429)", "3600 s", _LIMIT),
    ),
    Row("500 twice, then 200, at the API", None, 2, 7, _status(500, "api", times=2)),
    Row("500 twice, then 200, at the CDN", None, 2, 9, _status(500, "cdn", times=2)),
    Row(
        "500 for ever, at the API",
        Reason.UPSTREAM_UNAVAILABLE,
        5,
        5,
        _status(500, "api"),
        says=("{endpoint} answered 500", "{repo}"),
    ),
    Row(
        "500 for ever, at the CDN",
        Reason.UPSTREAM_UNAVAILABLE,
        7,
        33,
        _status(500, "cdn"),
        says=("upstream answered 500", _FILE, _LIMIT),
    ),
    Row(
        "connection refused",
        Reason.UPSTREAM_UNAVAILABLE,
        5,
        0,
        refused=True,
        says=("{endpoint} cannot be reached", "refused"),
    ),
    Row(
        "reset in mid-body",
        None,
        1,
        6,
        (Fault(FaultKind.RESET, where="cdn", times=1, at_fraction=0.5),),
    ),
    Row(
        "clean close in mid-body",
        None,
        1,
        6,
        (Fault(FaultKind.CLOSE, where="cdn", times=1, at_fraction=0.5),),
    ),
    Row(
        "clean close in mid-body of a small file",
        None,
        1,
        6,
        (Fault(FaultKind.CLOSE, where="resolve", path=SMALL, times=1, at_fraction=0.5),),
    ),
    Row(
        "accepts and stays silent, at the API",
        Reason.UPSTREAM_STALLED,
        5.5,
        1,
        (Fault(FaultKind.SILENT, where="api"),),
        says=("{endpoint} did not answer within 5.0 s", "(hub.timeout)"),
    ),
    Row(
        "accepts and stays silent, at the CDN",
        Reason.UPSTREAM_STALLED,
        8.5,
        11,
        (Fault(FaultKind.SILENT, where="cdn"),),
        says=(_FILE, "within 2 s (transfer.stall_timeout)", _LIMIT),
    ),
    Row(
        "goes silent in mid-body",
        None,
        3,
        6,
        (Fault(FaultKind.STALL, where="cdn", times=1, at_fraction=0.5),),
        least_seconds=2,
    ),
    Row(
        "the CDN's address expires in mid-file",
        None,
        1,
        8,
        (Fault(FaultKind.EXPIRE_URL, where="cdn", times=1, at_fraction=0.5),),
    ),
)

"""What upstream can do wrong to the bytes of a large file, and what that may cost. The tests are made from this.

Each fault happens once, at 5 %, 50 % and 95 % of a file of 256 MiB; then to 1 % and to 10 % of the requests for a
model of the same size in one large and many small files; then for ever. Once or by rate it must end in the right
bytes; for ever in what the row names.

Settings: ``transfer.stall_timeout`` 1 s, ``transfer.retry_timeout`` 10 s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelcache.reasons import Reason

from tests.hub import MIB, Fault, FaultKind

SETTINGS = {"hub": {"timeout": "5s"}, "transfer": {"stall_timeout": "1s", "retry_timeout": "10s"}}
SIZE = 256 * MIB
PLACES = (0.05, 0.5, 0.95)
RATES = (0.01, 0.1)
AGAIN_BYTES = 16 * MIB
"""Most that may be fetched twice for each fault."""
RETRY_SECONDS = 10.0
TRANSFER_SECONDS = 30.0
"""What the bytes alone may take on a busy machine; added to each row's seconds."""

Where = Mapping[str, Any]
"""The fields of a Fault that say when it happens."""


@dataclass(frozen=True)
class Row:
    """One kind of fault."""

    name: str
    faults: Callable[[Where, str], tuple[Fault, ...]]
    """From when it happens, and the address that a redirect may lead to."""
    seconds: float
    """What one such fault may cost."""
    for_ever: Reason | None
    """How a request ends whose file meets it at every try; None is success."""
    says: str = ""
    """A word of that end."""
    dead_address: str = ""
    """Where a redirect leads; {tls} is filled in: the port of a server whose certificate nobody has signed."""


def _body(kind: FaultKind, **how: Any) -> Callable[[Where, str], tuple[Fault, ...]]:
    return lambda where, _: (Fault(kind, where="cdn", **how, **where),)


def _redirect(where: Where, address: str) -> tuple[Fault, ...]:
    """A redirect leads nowhere: in mid-file the CDN's own, by rate any first one.

    One fault, not a refusal and then a bad redirect: a fresh address that another range got between them would do.
    """
    meets = {"where": "cdn" if "at_file_byte" in where else "resolve", **where}
    return (Fault(FaultKind.STATUS, status=302, headers={"Location": f"{address}/model"}, **meets),)


_GONE, _SILENT = Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_STALLED

MATRIX: tuple[Row, ...] = (
    Row("reset", _body(FaultKind.RESET), 1, _GONE, "reset by peer"),
    Row("clean close", _body(FaultKind.CLOSE), 1, _GONE, "bytes early"),
    Row("stall", _body(FaultKind.STALL), 3, _SILENT, "transfer.stall_timeout"),
    Row("429", _body(FaultKind.STATUS, status=429, retry_after=1), 2, Reason.RATE_LIMITED, "limits our rate (429)"),
    Row("500", _body(FaultKind.STATUS, status=500), 1, _GONE, "answered 500"),
    Row("503", _body(FaultKind.STATUS, status=503), 1, _GONE, "answered 503"),
    Row("short 206", _body(FaultKind.SHORT_BODY), 1, _GONE, "bytes early"),
    Row("wrong range answered", _body(FaultKind.WRONG_CONTENT_RANGE), 1, _GONE, "upstream answered 'bytes "),
    Row("200 for 206", _body(FaultKind.FULL_FOR_RANGE), 1, _GONE, "200 where a 206 was asked"),
    Row("slow trickle", _body(FaultKind.TRICKLE, seconds_per_byte=0.5), 4, _SILENT, "4096 bytes a second for 1 s"),
    Row("URL expiry", _body(FaultKind.EXPIRE_URL), 1, _GONE, "transfer.retry_timeout"),
    Row("ETag change", _body(FaultKind.ETAG_CHANGE), 1, None),
    Row("DNS failure", _redirect, 1, _GONE, "not known", "http://cdn.invalid"),
    Row("TLS failure", _redirect, 1, _GONE, "certificate verify failed", "https://localhost:{tls}"),
)

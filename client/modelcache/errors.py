"""What the daemon answers when it refuses, decoded once, with its exit status.

An error travels as google.rpc.Status in the trailing metadata
``grpc-status-details-bin``. Our own wire-compatible messages decode it, so
that the client needs no further package.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import cast

import grpc
from google.protobuf.message import DecodeError

from modelcache.reasons import EXIT_SOFTWARE, EXIT_TEMPORARY, EXIT_UNAVAILABLE, TABLE, Reason
from modelcache.units import printable
from modelcache.v1 import common_pb2

_DETAILS_KEY = "grpc-status-details-bin"

_BY_CODE: dict[grpc.StatusCode, tuple[int, str]] = {
    # Errors that carry no ErrorInfo come from gRPC itself, from a proxy, or from something that is no modelcached.
    grpc.StatusCode.UNAVAILABLE: (EXIT_UNAVAILABLE, "check that modelcached runs and that its socket is mounted here"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (EXIT_TEMPORARY, "come again, or give it more time"),
    grpc.StatusCode.CANCELLED: (EXIT_TEMPORARY, "ask again"),
    grpc.StatusCode.UNIMPLEMENTED: (EXIT_UNAVAILABLE, "the daemon is older than this client: upgrade it"),
}
_BY_NO_CODE = (EXIT_SOFTWARE, "report it with the daemon's log lines of that request id")


class ModelCacheError(Exception):
    """A refusal or failure that the daemon, or gRPC on the way to it, reported.

    ``reason`` is a name of the table in modelcache.reasons, or empty when the
    answer carried none; ``metadata`` names the limit, the value, who holds
    what; ``retry_delay`` is how long to wait before asking again.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        retry_delay: timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_delay = retry_delay

    @property
    def exit_status(self) -> int:
        """What a command exits with; 75 always means that the same call may succeed later."""
        if (known := _known(self.reason)) is not None:
            return TABLE[known].exit_status
        return _BY_CODE.get(self.code, _BY_NO_CODE)[0]

    @property
    def mend(self) -> str:
        """What to do about it: as the daemon says, else as the table does."""
        if own := self.metadata.get("mend"):
            return own
        if (known := _known(self.reason)) is not None:
            return TABLE[known].mend
        return _BY_CODE.get(self.code, _BY_NO_CODE)[1]

    @property
    def text(self) -> str:
        """``message; mend``, once: the daemon's message may already end with the mend."""
        return self.message if self.mend in self.message else f"{self.message}; {self.mend}"

    @property
    def label(self) -> str:
        """The reason, or the gRPC code where there is none: one word for logs and JSON."""
        return self.reason or self.code.name

    @property
    def connection_lost(self) -> bool:
        """Nobody answered, or who answered went away: the daemon is starting, stopping or restarting.

        A bare CANCELLED is a server that dropped its streams as it stopped; an operator's cancel has a reason.
        """
        if self.reason:
            return self.reason == Reason.SHUTTING_DOWN
        return self.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def _known(reason: str) -> Reason | None:
    """The table's row for a reason; None for one of a newer daemon."""
    return Reason(reason) if reason in Reason.__members__ else None


def from_rpc_error(error: grpc.RpcError) -> ModelCacheError:
    """Decodes any error of a call; details that are not ours, or are garbage, leave the code and its words."""
    call = cast(grpc.Call, error)
    code, message = call.code(), printable(call.details() or "")
    reason, metadata, retry_delay = "", {}, None
    for detail in _status_of(call).details:
        # The type URL ends the same in google.rpc and in modelcache.v1; the prefix before it is free.
        name = detail.type_url.rpartition(".")[2]
        try:
            if name == "ErrorInfo":
                info = common_pb2.ErrorInfo.FromString(detail.value)
                reason, metadata = info.reason, {key: printable(value) for key, value in info.metadata.items()}
            elif name == "RetryInfo":
                retry_delay = common_pb2.RetryInfo.FromString(detail.value).retry_delay.ToTimedelta()
        except (DecodeError, OverflowError, ValueError):
            continue
    if not reason and code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the daemon does not know this call ({message})"
    return ModelCacheError(code, printable(reason), message or code.name.lower(), metadata, retry_delay)


def _status_of(call: grpc.Call) -> common_pb2.Status:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return common_pb2.Status.FromString(value)
            except DecodeError:
                break
    return common_pb2.Status()

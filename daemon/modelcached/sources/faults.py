"""What can go wrong upstream and may go right on another try."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from datetime import timedelta

from modelcached.errors import CacheError, Reason

_COME_AGAIN = {
    Reason.UPSTREAM_UNAVAILABLE: timedelta(seconds=10),
    Reason.UPSTREAM_STALLED: timedelta(seconds=10),
    Reason.RATE_LIMITED: timedelta(seconds=30),
}
"""What the caller is told where the server named no time."""


REFUSALS = {Reason.GATED_REPO, Reason.TOKEN_REJECTED, Reason.REPO_NOT_FOUND, Reason.REVISION_NOT_FOUND}
"""What an endpoint says for good. A mirror gets no token and may not have everything: from it, it is no last word."""


class TransientError(Exception):
    """Worth another try, after ``retry_after`` where the server named a time."""

    def __init__(self, reason: Reason, message: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    def final(self) -> CacheError:
        """The same as a refusal, when there are no more tries."""
        return CacheError(self.reason, self.message, retry_delay=self.retry_after or _COME_AGAIN.get(self.reason))


def retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """When the server wants to be asked again: ``Retry-After`` (seconds or a date), else ``RateLimit``'s ``t=``.

    The Hub sends whole seconds and ``RateLimit: "api";r=0;t=42`` (huggingface_hub 2.4.0, utils/_http.py,
    parse_ratelimit_headers). Header names of either case are found.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    seconds: float | None = None
    text = lower.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif text and (date := email.utils.parsedate_tz(text)) is not None:
        seconds = email.utils.mktime_tz(date) - time.time()
    elif match := re.search(r"\bt=(\d+)", lower.get("ratelimit", "")):
        seconds = float(match[1])
    return timedelta(seconds=max(0.0, seconds)) if seconds is not None else None

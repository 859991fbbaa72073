"""The daemon's own token: what only it may read is refused when the Hub takes it no more, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from modelcached.errors import CacheError, Reason
from modelcached.model import is_token

_AGAIN_SECONDS = 60.0
"""A rejected token is tried again so soon: who has it may have made it valid again."""


class OwnTokenError(CacheError):
    """Only the daemon's own token could have helped. Nobody has said that the caller may not have the model."""


def read_token(file: Path | None) -> str | None:
    """The daemon's own token, without the newline that editors leave; None where there is none."""
    if file is None:
        return None
    try:
        token = file.read_bytes().decode("ascii", errors="replace").strip()
    except OSError as error:
        raise CacheError(Reason.TOKEN_REJECTED, f"hub.token_file {file} cannot be read: {error.strerror}") from error
    if token and not is_token(token):
        raise CacheError(Reason.TOKEN_REJECTED, f"hub.token_file {file} does not hold one word of visible ASCII")
    return token or None


class OwnToken:
    """What is in hub.token_file, and whether it is any good. The event loop's alone."""

    def __init__(self, file: Callable[[], Path | None], tell: Callable[[str], None]) -> None:
        """``tell``: what is wrong with it, for operators; empty when nothing is."""
        self._file = file
        self._tell = tell
        self._last: str | None = None
        self._rejected_at = float("-inf")
        self.trouble: CacheError | None = None

    def secret(self) -> str | None:
        """For a request that brings none of its own; None where there is none, or none that can be read."""
        try:
            token = read_token(self._file())
        except CacheError as error:
            self._last = None
            self._set(error)
            return None
        if token != self._last or token is None:
            self._last = token
            self._set(None)
        return token

    def is_used_by(self, token: str | None) -> bool:
        """A request with that token is one that brought none, as far as anybody can tell."""
        return token is None or token == self._last

    def worth_sending(self, token: str | None) -> str | None:
        """The token, unless it is ours and was rejected a moment ago: then what is public can still be had."""
        lately = time.monotonic() - self._rejected_at < _AGAIN_SECONDS
        return None if self.trouble is not None and token == self._last and lately else token

    def rejected(self, error: CacheError) -> None:
        """The Hub does not take it, where there is one."""
        if self._last is None or isinstance(error, OwnTokenError):
            return
        self._rejected_at = time.monotonic()
        self._set(error)

    def accepted(self) -> None:
        """The Hub has answered to it."""
        self._set(None)

    def _set(self, trouble: CacheError | None) -> None:
        before, self.trouble = self.trouble, trouble
        if (trouble and trouble.message) == (before and before.message):
            return
        if trouble is None:
            self._tell("")
            return
        self._tell(f"{trouble.message}; gated and private models come from the cache alone until it is replaced")

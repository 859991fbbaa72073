"""Signed, expiring URLs of the CDN, as the real Hub redirects to: nobody can make or prolong one."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import parse_qs, urlencode


class UrlSigner:
    """Signs paths with a key of its own; each URL has a nonce, so that one can be revoked alone."""

    def __init__(self, lifetime: timedelta, now: Callable[[], float] = time.time) -> None:
        self.lifetime = lifetime
        self._now = now
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._revoked: set[str] = set()

    def sign(self, path: str) -> str:
        """The path with its query: `expires` is in whole seconds since the epoch, rounded up."""
        expires = -int(-(self._now() + self.lifetime.total_seconds()) // 1)
        nonce = secrets.token_hex(8)
        signature = self._signature(path, str(expires), nonce)
        return f"{path}?{urlencode({'expires': expires, 'nonce': nonce, 'signature': signature})}"

    def refusal(self, path: str, query: str) -> str | None:
        """Why a request is refused (for the 403's body), or None when it is good."""
        fields = {name: values[-1] for name, values in parse_qs(query).items()}
        expires, nonce, given = (fields.get(name, "") for name in ("expires", "nonce", "signature"))
        if not given:
            return "Missing signature"
        if not hmac.compare_digest(given.encode(), self._signature(path, expires, nonce).encode()):
            return "Signature does not match"
        with self._lock:
            revoked = given in self._revoked
        if revoked or float(expires) <= self._now():
            return "Request has expired"
        return None

    def revoke(self, query: str) -> None:
        """Treat this one URL as expired from now on."""
        with self._lock:
            self._revoked.update(parse_qs(query).get("signature", []))

    def _signature(self, path: str, expires: str, nonce: str) -> str:
        return hmac.new(self._key, f"{path}\n{expires}\n{nonce}".encode(), hashlib.sha256).hexdigest()

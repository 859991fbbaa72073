"""What the status page shows, as one JSON object. Read-only; names go out as they are and are never markup there."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any

from modelcached import __version__
from modelcached.cache.requests import CachedModel, Status, Transfer
from modelcached.ledger.history import Row
from modelcached.store.index import SnapshotState

_SAME_SECONDS = 1.0
EVENTS = 20
"""The newest of the history."""


def shared(make: Callable[[], bytes]) -> Callable[[], bytes]:
    """The same answer for all who ask within a second: however many look, the event loop is asked once. Thread-safe."""
    lock = threading.Lock()
    last: list[tuple[float, bytes]] = []

    def answer() -> bytes:
        with lock:
            if not last or time.monotonic() - last[0][0] >= _SAME_SECONDS:
                last[:] = [(time.monotonic(), make())]
            return last[0][1]

    return answer


def html() -> bytes:
    """The page itself: one file, that asks for nothing but status.json."""
    return files(__package__).joinpath("page.html").read_bytes()


def policy(page: bytes) -> str:
    """Its Content-Security-Policy: its own script and style by their digests, its own data, and nothing else."""

    def digest(tag: str) -> str:
        text = page.split(f"<{tag}>".encode(), 1)[1].split(f"</{tag}>".encode(), 1)[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    return (
        f"default-src 'none'; connect-src 'self'; script-src {digest('script')}; style-src {digest('style')}; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def data(status: Status, models: Iterable[CachedModel], events: Iterable[Row], now: float) -> bytes:
    """``now``: seconds since the epoch."""
    shown = sorted(models, key=lambda model: -(model.used_at or 0.0))
    told = {
        "version": __version__,
        "status": {
            "budget_bytes": status.budget_bytes,
            "used_bytes": status.used_bytes,
            "reserved_bytes": status.reserved_bytes,
            "partial_bytes": status.partial_bytes,
            "filesystem_free_bytes": status.filesystem_free_bytes,
            "models": status.models,
            "leases": status.leases,
            "pins": status.pins,
            "degraded": status.degraded,
        },
        "transfers": list(map(_transfer, status.transfers)),
        "models": [_model(model, now) for model in shown],
        "events": [_event(row, now) for row in events],
    }
    return json.dumps(told).encode()


def _transfer(transfer: Transfer) -> dict[str, Any]:
    progress = transfer.progress
    return {
        "repo_id": transfer.snapshot.repo_id,
        "bytes_total": progress.bytes_total,
        "bytes_done": progress.bytes_done,
        "bytes_per_second": progress.bytes_per_second,
        "waiters": progress.waiters,
        "background": transfer.background,
        "detail": progress.detail,
    }


def _model(model: CachedModel, now: float) -> dict[str, Any]:
    kind = "pinned" if model.pinned else "leased" if model.leases else "idle"
    words = [] if model.state is SnapshotState.READY else [model.state.value]
    words += ["pinned"] if model.pinned else []
    words += [f"{len(model.leases)} lease{'' if len(model.leases) == 1 else 's'}"] if model.leases else []
    return {
        "repo_id": model.snapshot.repo_id,
        "commit": model.snapshot.commit,
        "revisions": model.revisions,
        "size_bytes": model.size_bytes,
        "unique_bytes": model.unique_bytes,
        "idle_seconds": None if model.used_at is None else max(0.0, now - model.used_at),
        "kind": kind,
        "state": ", ".join(words) or "idle",
    }


def _event(row: Row, now: float) -> dict[str, Any]:
    entry = row.entry
    return {
        "seconds_ago": max(0.0, now - row.at),
        "kind": entry.kind.value,
        "model": entry.model,
        "reason": entry.reason,
        "bytes": entry.size_bytes,
        "holder": entry.holder,
        "detail": entry.detail,
    }

"""The daemon's log, which says no error that is none."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import structlog
from modelcached.transfer import flights

from tests.property.machine import CacheMachine
from tests.property.universe import KIB

EXPECTED_ERRORS = ("proofs of use were lost", "state.db is damaged, starting a new one")


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the daemon logs as an error, each machine's own.

    Blobs here are small: those above 16 KiB are fetched as those above 1 MiB are, in parts, journalled, resumable.
    """
    logged: list[str] = []

    def keep(_logger: object, _name: str, event: MutableMapping[str, Any]) -> str:
        if event["event"] not in EXPECTED_ERRORS:
            logged.append(str(event))
        raise structlog.DropEvent

    monkeypatch.setattr(flights, "SMALL_BYTES", 16 * KIB)
    monkeypatch.setattr(CacheMachine, "errors", logged)
    structlog.configure(processors=[keep], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield logged
    structlog.reset_defaults()

"""I5, I6 and I7: what breaks at every try ends in time and by its name, and what had come by then stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.reasons import Reason

from tests.hub import MIB, Synthetic
from tests.integration.fault_matrix import AGAIN_BYTES, MATRIX, RETRY_SECONDS, TRANSFER_SECONDS, Row
from tests.integration.matrix import LARGE, Course, course
from tests.node.daemon import in_threads

SIZE = 32 * MIB
BROKEN_AT = SIZE // 2 + 1
"""In the second of two ranges."""
LIMITED = [row for row in MATRIX if row.for_ever is Reason.RATE_LIMITED]
OTHERS = [row for row in MATRIX if row not in LIMITED]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """A connection for each row, for each is held until its row has ended."""
    with course(tmp_path_factory.mktemp("course"), connections=2 * len(MATRIX)) as made:
        yield made


@dataclass(frozen=True)
class Ended:
    """How a request ended."""

    reason: str
    message: str
    seconds: float


def ask(shared: Course, repo_id: str) -> Ended:
    began = time.monotonic()
    reason = message = ""
    with shared.node.client() as client:
        try:
            list(client.ensure(reference(repo_id)))
        except ModelCacheError as error:
            reason, message = error.reason, error.message
    return Ended(reason, message, time.monotonic() - began)


@pytest.mark.deep
@pytest.mark.parametrize("rows", [OTHERS, LIMITED], ids=["all at once", "429, which holds back everybody"])
def test_a_fault_at_every_try_is_named_in_time_and_what_had_come_stays(shared: Course, rows: list[Row]) -> None:
    hub = shared.hub
    repos = [f"org/for-ever-{MATRIX.index(row)}" for row in rows]
    for number, (row, repo_id) in enumerate(zip(rows, repos, strict=True)):
        seed = 1000 * len(rows) + number
        hub.create_repo(repo_id).commit({LARGE: Synthetic(SIZE, seed)})
        for fault in shared.faults(row, {"at_file_byte": BROKEN_AT, "repo": repo_id}):
            hub.faults.add(fault)
    ended: list[Ended] = list(in_threads(len(repos), lambda number: ask(shared, repos[number])))
    assert {row.name: end.reason for row, end in zip(rows, ended, strict=True)} == {
        row.name: row.for_ever or "" for row in rows
    }
    for row, end in zip(rows, ended, strict=True):
        assert row.says in end.message
        assert end.seconds <= RETRY_SECONDS + TRANSFER_SECONDS + row.seconds
        assert row.for_ever is None or f"transfer.retry_timeout is {RETRY_SECONDS:g} s" in end.message
    hub.faults.clear()
    assert {ask(shared, repo_id).reason for repo_id in repos} == {""}
    again = {repo_id: hub.body_bytes(repo_id, LARGE) - SIZE for repo_id in repos}
    assert max(again.values()) <= 3 * AGAIN_BYTES

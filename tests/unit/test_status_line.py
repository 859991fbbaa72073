"""sd_notify: one line an assignment, and a status line that people read."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from modelcached.cache.requests import Phase, Progress, Transfer
from modelcached.model import Commit, RepoId, SnapshotId
from modelcached.upkeep.systemd import notify, status_line

GB = 1000**3


def _transfer(name: str, phase: Phase, done: int = 0, of: int = 0, *, background: bool = False) -> Transfer:
    snapshot = SnapshotId(RepoId(f"org/{name}"), Commit("a" * 40))
    return Transfer(snapshot, Progress(phase, of, done), background)


@pytest.mark.parametrize(
    ("transfers", "troubles", "line"),
    [
        ((), 0, "serving 3 models, 4.0 GB of 9.0 GB"),
        ((), 1, "serving 3 models, 4.0 GB of 9.0 GB; 1 trouble, see cachectl status"),
        (
            (_transfer("one", Phase.DOWNLOADING, 2 * GB - 1, 2 * GB),),
            2,
            "serving 3 models, 4.0 GB of 9.0 GB; downloading org/one, 99 % of 2.0 GB; 2 troubles, see cachectl status",
        ),
        (
            (
                _transfer("large", Phase.DOWNLOADING, 0, 9 * GB, background=True),
                _transfer("small", Phase.VERIFYING, 1 * GB, 1 * GB),
                _transfer("other", Phase.QUEUED),
            ),
            0,
            "serving 3 models, 4.0 GB of 9.0 GB; verifying org/small and 2 more",
        ),
    ],
    ids=["idle", "a trouble", "a download", "what somebody waits for first"],
)
def test_the_status_line(transfers: tuple[Transfer, ...], troubles: int, line: str) -> None:
    told = status_line(models=3, used_bytes=4 * GB, budget_bytes=9 * GB, transfers=transfers, troubles=troubles)
    assert told == line


def test_a_line_break_makes_no_assignment_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1", "STATUS=a name\nMAINPID=1\u2028X=1")
        assert manager.recv(4096).decode().split("\n") == ["READY=1", "STATUS=a name MAINPID=1 X=1"]


def test_a_manager_that_is_gone_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")

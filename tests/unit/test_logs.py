"""What is written to the log, and how: a stranger's text as text, priorities for the journal, progress now and then."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Literal

import pytest
import structlog
from modelcached.cache.requests import Phase, Progress, Transfer
from modelcached.config import LogSection
from modelcached.main import main
from modelcached.model import Commit, RepoId, SnapshotId
from modelcached.telemetry import logs
from modelcached.upkeep.loops import ProgressTeller


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_value_can_neither_steer_a_terminal_nor_forge_a_line(
    capsys: pytest.CaptureFixture[str], form: Literal["json", "console"]
) -> None:
    logs.configure(LogSection(format=form))
    try:
        structlog.get_logger().info("refused", why="evil\x1b[31m\x9b\nforged line\u2028", path="plain")
    finally:
        structlog.reset_defaults()
    written = capsys.readouterr().err
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", written) is None
    assert len(written.splitlines()) == 1
    assert "forged line" in written


@pytest.mark.parametrize(("level", "priority"), [("info", 6), ("warning", 4), ("error", 3), ("debug", 7)])
def test_under_the_journal_each_line_begins_with_its_priority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, priority: int
) -> None:
    with (tmp_path / "journal").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        logs.configure(LogSection(level="debug"))
        try:
            getattr(structlog.get_logger(), level)("something", number=1)
        finally:
            structlog.reset_defaults()
    written = (tmp_path / "journal").read_text()
    assert written.startswith(f"<{priority}>{{")
    assert json.loads(written[3:])["event"] == "something"


def test_prose_is_an_error_for_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert main(["--budget", "much"]) == 78
    assert (tmp_path / "journal").read_text().startswith("<3>modelcached: the command line: cache.budget: ")


def test_elsewhere_no_line_has_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")  # of the service that started us, before it sent us elsewhere
    logs.configure(LogSection(format="json"))
    try:
        structlog.get_logger().error("something")
    finally:
        structlog.reset_defaults()
    assert capsys.readouterr().err.startswith("{")


async def test_a_model_that_is_long_on_its_way_has_a_line_at_each_look(capsys: pytest.CaptureFixture[str]) -> None:
    snapshots = [SnapshotId(RepoId(f"org/{name}"), Commit("a" * 40)) for name in ("long", "short")]
    long, short = (
        Transfer(each, Progress(Phase.DOWNLOADING, 100, 42, 7, 3, "a detail"), background=False) for each in snapshots
    )
    under_way = [(long, short), (long,), ()]
    teller = ProgressTeller(lambda: under_way[0])
    logs.configure(LogSection(format="json"))
    try:
        lines = []
        while under_way:
            await teller.look()
            lines.append(capsys.readouterr().err.splitlines())
            under_way.pop(0)
    finally:
        structlog.reset_defaults()
    assert [len(each) for each in lines] == [0, 1, 0]
    told = json.loads(lines[1][0])
    assert (told["event"], told["model"], told["phase"]) == ("progress", str(snapshots[0]), "downloading")
    assert (told["bytes_done"], told["bytes_total"], told["waiters"]) == (42, 100, 3)

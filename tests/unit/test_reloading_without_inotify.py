"""Where this machine gives no inotify instance, the daemon runs all the same, and SIGHUP stays."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import structlog
from modelcached.upkeep import file_watch
from modelcached.upkeep.file_watch import FileWatcher


@pytest.mark.parametrize("where", ["instance", "watch"])
async def test_a_file_that_cannot_be_watched_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, f"inotify {where} limit reached")

    if where == "instance":
        monkeypatch.setattr(file_watch, "Observer", refuse)
    else:
        monkeypatch.setattr(file_watch.Observer, "start", refuse)
    watcher = FileWatcher()
    with structlog.testing.capture_logs() as logged:
        watcher.follow("configuration", tmp_path / "config.toml", lambda: None)
    assert [entry["event"] for entry in logged] == ["a file is not watched"]
    assert f"inotify {where} limit reached" in logged[0]["why"]
    watcher.stop()

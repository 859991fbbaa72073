"""Where this machine gives no inotify instance, the daemon runs all the same, and SIGHUP stays."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import structlog
from modelcached.config import Config
from modelcached.upkeep import reload
from modelcached.upkeep.reload import Reloader


@pytest.mark.parametrize("where", ["instance", "watch"])
async def test_a_file_that_cannot_be_watched_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, f"inotify {where} limit reached")

    if where == "instance":
        monkeypatch.setattr(reload, "Observer", refuse)
    else:
        monkeypatch.setattr(reload.Observer, "start", refuse)
    reloader = Reloader(Config(), Config, lambda _config: None, lambda _why: None)
    with structlog.testing.capture_logs() as logged:
        reloader.watch(tmp_path / "config.toml")
    assert [entry["event"] for entry in logged] == ["configuration is not watched, use SIGHUP"]
    assert f"inotify {where} limit reached" in logged[0]["why"]
    reloader.stop()

"""A stranger's text reaches a log as text."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import structlog
from modelcached.config import LogSection
from modelcached.telemetry import logs


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

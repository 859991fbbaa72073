"""structlog: one event dictionary a line, JSON or for a terminal, on stderr. No secret ever."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from modelcached.config import LogSection
from modelcached.model import shown

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def _printable(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A stranger's control characters must not reach a terminal, nor forge a line."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key not in ("exception", "event"):
            event[key] = shown(value, 10_000)
    return event


_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog(3)."""


def into_journal() -> bool:
    """Whether stderr is the journal's own stream, as systemd says it (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def error_prefix() -> str:
    """Before a line of prose, so that the journal files it as an error; nothing elsewhere."""
    return f"<{_PRIORITIES['error']}>" if into_journal() else ""


def _with_priority(renderer: Any) -> Any:
    """Each line begins with its priority, which journald takes off and files it under (sd-daemon(3))."""

    def render(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
        priority = _PRIORITIES.get(str(event.get("level")), 6)
        return f"<{priority}>{renderer(logger, name, event)}"

    return render


def configure(section: LogSection) -> None:
    """May be called again with another level."""
    terminal = sys.stderr.isatty()
    console = section.format == "console" or (section.format == "auto" and terminal)
    renderer: Any = structlog.dev.ConsoleRenderer(colors=terminal) if console else structlog.processors.JSONRenderer()
    if into_journal():
        renderer = _with_priority(renderer)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([] if console else [structlog.processors.format_exc_info]),
            _printable,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[section.level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    # Libraries speak through logging; only what matters, in our own form.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s", force=True)

"""What all tests begin with."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import structlog
from _pytest.terminal import TerminalReporter


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make soak` asks for more."""
    group = parser.getgroup("property", "the cache against a plain model (tests/property)")
    group.addoption("--property-steps", type=int, default=10_000, help="how many (default %(default)s)")
    group.addoption("--property-seed", type=int, default=0, help="another one, another run (default %(default)s)")
    group = parser.getgroup("churn", "a cache that is much too small, under load (tests/system)")
    group.addoption("--churn-seconds", type=float, default=60, help="for how long (default %(default)s)")
    group.addoption("--churn-seed", type=int, default=0, help="another one, other traffic (default %(default)s)")


_DEEP = (
    "tests/property/",
    "tests/crash/",
    "/test_adoption.py",
    "/test_crash_points.py",
    "/test_directories.py",
    "/test_faults_by_rate.py",
    "/test_large_cache.py",
    "/test_model_list.py",
    "/test_planted_links.py",
    "/test_state_database.py",
    "/test_watching.py",
)
"""What `make deep` runs, and `make test` leaves to it: together they would take more than ten minutes."""
_LONGEST = ("test_watching", "test_state_machine", "test_xet", "test_leases", "test_turns")
"""A file is one worker's: the longest go first, so that nobody waits for them at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is deep, and begins with what takes longest."""
    for item in items:
        if any(part in item.path.as_posix() for part in _DEEP):
            item.add_marker("deep")
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A daemon in this process may have pointed the log to a stream that ends with the test."""
    yield
    structlog.reset_defaults()


def pytest_configure() -> None:
    """Programs under test inherit what is ignored here, and a shell's background and nohup ignore these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """What tests have counted (record_property("count", ...)), on success too: it is part of what they say."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    counts = sorted(str(value) for report in reports for key, value in report.user_properties if key == "count")
    if counts:
        terminalreporter.section("counts")
        for count in counts:
            terminalreporter.write_line(count)

"""What all tests begin with."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Programs under test inherit what is ignored here, and a shell's background and nohup ignore these."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)

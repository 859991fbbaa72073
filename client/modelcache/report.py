r"""All that ensure-model says on stderr: progress, waits, warnings, its last word.

A bar on a terminal; elsewhere a line at each change of phase and every five
seconds, after a minute of the same every thirty, because `\r` under CRI logs is unreadable. A timer of the kernel
makes the line come when the daemon is silent, too; no thread is needed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from modelcache.units import format_duration, printable

if TYPE_CHECKING:
    from modelcache.v1 import cache_pb2

LINE_EVERY_SECONDS = 5.0
LATER_LINE_EVERY_SECONDS = 30.0
LATER_SECONDS = 60.0
"""After so long of the same, a line says little that the one before did not."""
BAR_EVERY_SECONDS = 0.1
SILENCE_SECONDS = 15.0
"""A daemon that says nothing for so long is mentioned; it tells how it stands every five, changed or not."""

_STDERR = 2
_CLEAR_LINE = "\r\x1b[K"


class Reporter:
    """Writes to stderr, one whole line at a time, and keeps the token out of every one."""

    def __init__(self, *, quiet: bool = False, secret: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """``quiet`` leaves out progress and waits, never warnings. ``secret`` is blotted out wherever it turns up."""
        self._quiet = quiet
        self._secret = secret
        self._clock = clock
        self._terminal = os.isatty(_STDERR)
        self._bar_shown = False
        self._busy = False
        self._current: cache_pb2.Progress | None = None
        self._waiting_for = ""
        self._heard = self._said = self._began = clock()

    @property
    def doing(self) -> str:
        """What the run waits for at this moment, in words."""
        if self._waiting_for or self._current is None:
            return self._waiting_for or "an answer from the daemon"
        from modelcache.progress import describe  # noqa: PLC0415 - needs protobuf, which may not be loaded yet

        return describe(self._current)

    def redact(self, text: str) -> str:
        """The text on one line, without the token."""
        text = printable(text)
        return text.replace(self._secret, "***") if self._secret else text

    def say(self, text: str) -> None:
        """A line of progress; nothing when quiet."""
        if not self._quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """A line that is written even when quiet."""
        self._line(f"warning: {text}")

    def note(self, text: str) -> None:
        """Good news after a warning, written even when quiet."""
        self._line(text)

    def fail(self, text: str) -> None:
        """The last word."""
        self._line(text)

    def progress(self, progress: cache_pb2.Progress) -> None:
        """News from the daemon: shown at once when the phase changed, else when it is time."""
        changed = self._current is None or self._waiting_for or self._current.phase != progress.phase
        self._current, self._waiting_for, self._heard = progress, "", self._clock()
        self._show(changed=bool(changed))

    def waiting(self, reason: str) -> None:
        """There is no daemon to talk to: said at once when the reason is new, else when it is time."""
        changed, self._waiting_for = reason != self._waiting_for, reason
        self._show(changed=changed)

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Within it a line comes when it is time even if nothing happens. For the main thread."""
        previous = signal.signal(signal.SIGALRM, self._tick)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            self._clear_bar()

    def _tick(self, _signum: int, _frame: FrameType | None) -> None:
        # The handler may have interrupted a line that is being written.
        if not self._busy:
            self._show(changed=False)

    def _show(self, *, changed: bool) -> None:
        now = self._clock()
        since = now - self._said
        if changed:
            self._began = now
        if self._quiet:
            return
        if self._terminal and not self._waiting_for and self._current is not None:
            if changed or since >= BAR_EVERY_SECONDS:
                self._draw(self._current)
        elif changed or since >= lines_every(now - self._began):
            silence = now - self._heard
            unheard = f", no word from the daemon for {format_duration_seconds(silence)}"
            waiting = "" if self._current and not self._waiting_for else "waiting for "
            self._line(waiting + self.doing + (unheard if silence >= SILENCE_SECONDS and not self._waiting_for else ""))

    def _draw(self, progress: cache_pb2.Progress) -> None:
        from modelcache.progress import bar  # noqa: PLC0415 - as above

        self._write(_CLEAR_LINE + self.redact(bar(progress, _columns())))
        self._bar_shown = True

    def _line(self, text: str) -> None:
        clear = _CLEAR_LINE if self._bar_shown else ""
        self._bar_shown = False
        self._write(f"{clear}ensure-model: {self.redact(text)}\n")

    def _clear_bar(self) -> None:
        if self._bar_shown:
            self._bar_shown = False
            self._write(_CLEAR_LINE)

    def _write(self, text: str) -> None:
        self._said = self._clock()
        self._busy = True
        try:
            # Straight to the descriptor: a buffer interrupted by our own timer would refuse to be entered again.
            # A log pipe that is gone is no reason to fail a download.
            with suppress(OSError):
                os.write(_STDERR, text.encode())
        finally:
            self._busy = False


def lines_every(same_for: float) -> float:
    """Seconds between two lines when nothing but numbers has changed for so long."""
    return LINE_EVERY_SECONDS if same_for < LATER_SECONDS else LATER_LINE_EVERY_SECONDS


def format_duration_seconds(seconds: float) -> str:
    """``"1m 5s"``."""
    from datetime import timedelta  # noqa: PLC0415 - not needed on the way of a hit

    return format_duration(timedelta(seconds=seconds))


def _columns() -> int:
    try:
        return os.get_terminal_size(_STDERR).columns or 80
    except OSError:
        return 80

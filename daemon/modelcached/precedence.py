"""Answers go before bytes: while a call is being answered, the threads of a transfer wait between two pieces.

They fight with the event loop for the cores and for the interpreter's lock, and an answer needs three threads one after
the other. `make bench CASE=meanwhile` shows what a hit takes during a transfer, and how long that took.
"""

from __future__ import annotations

import threading
import time

LONGEST_SECONDS = 0.01
"""A piece waits no longer, whatever is being answered."""
REST_SECONDS = 0.03
"""How long none waits after one has waited in vain: where calls never end, bytes have three quarters of the time."""


class Answer:
    """A call that is being answered from what is there. The event loop's alone."""

    def __init__(self, precedence: Precedence) -> None:
        self._precedence: Precedence | None = precedence

    def end(self) -> None:
        """It has its answer, or has to wait itself. Once is enough."""
        if self._precedence is not None:
            self._precedence.ended()
            self._precedence = None


class Precedence:
    """Of answers over bytes."""

    def __init__(self) -> None:
        self._answers = 0
        self._rests_until = 0.0
        self._waiting = 0
        self._none = threading.Condition()

    def begin(self) -> Answer:
        """A call that may be answered at once has come. The event loop's alone."""
        self._answers += 1
        return Answer(self)

    def ended(self) -> None:
        """See ``Answer.end``."""
        self._answers -= 1
        if self._answers == 0 and self._waiting:
            with self._none:
                self._none.notify_all()

    def let_pass(self) -> None:
        """Between two pieces: waits while there is something to answer, and a moment at most. Any other thread."""
        if not self._answers or time.monotonic() < self._rests_until:
            return
        with self._none:
            self._waiting += 1  # before it looks again: what ends from now on tells it
            none = not self._answers or self._none.wait(LONGEST_SECONDS)
            self._waiting -= 1
        if not none:
            self._rests_until = time.monotonic() + REST_SECONDS

"""The line for downloading: at most ``transfer.models`` have their turn, for many at once come late, all of them.

Who is waited for goes before background work, then first come, first served. Background work
steps aside for a request that somebody waits for: it keeps what it has, fetches nothing, and goes on
when it is its turn again. Nobody is made to step aside for an equal.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

PASSING_BYTES = 32 << 20
"""What lacks no more than this needs no turn: an index file, a tokenizer or a small adapter is a few seconds of one
connection, and must not wait behind 140 GB."""


@dataclass(slots=True, eq=False)
class Turn:
    """A place in the line."""

    number: int
    urgent: bool
    """Somebody waits for it."""
    told: Callable[[], None]
    """Called in the step in which ``held`` changed."""
    held: bool = False


class Turns:
    """The event loop's alone."""

    def __init__(self, limit: Callable[[], int]) -> None:
        """``limit`` may change at any time; ``settle`` then."""
        self._limit = limit
        self._line: list[Turn] = []
        self._numbers = itertools.count()
        self.stopping = False
        self.change = asyncio.Event()
        """The next change of the line. Take it before looking, then wait for it: nothing is missed."""

    def enter(self, told: Callable[[], None], *, urgent: bool) -> Turn:
        """At the end of the line, or straight through it. ``leave`` must follow."""
        turn = Turn(next(self._numbers), urgent, told)
        self._line.append(turn)
        self.settle()
        return turn

    def leave(self, turn: Turn) -> None:
        """It is done, or wants no more."""
        self._line.remove(turn)
        self.settle()

    def hurry(self, turn: Turn, *, urgent: bool) -> None:
        """Somebody waits for it now, or nobody any more."""
        turn.urgent = urgent
        self.settle()

    def settle(self) -> None:
        """Gives the turns to those that come first."""
        self._line.sort(key=lambda turn: (not turn.urgent, not turn.held, turn.number))
        limit = self._limit()
        for place, turn in enumerate(self._line):
            held = place < limit
            if held != turn.held:
                turn.held = held
                turn.told()
        before, self.change = self.change, asyncio.Event()
        before.set()

    def stop(self) -> None:
        """Whoever is in the line looks at ``stopping`` now."""
        self.stopping = True
        self.settle()

    def detail(self, turn: Turn) -> str:
        """What a request in the line waits for."""
        ahead = self._line.index(turn)
        models = f"{ahead} models come" if ahead > 1 else f"{ahead} model comes"
        return f"{models} first, transfer.models is {self._limit()}"

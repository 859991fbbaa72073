"""The enumeration: a protocol dies before its first call, before its second, and so on until it comes to its end."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .zygote import Zygote

AT_ONCE = 16


@dataclass(frozen=True)
class Point:
    """One death."""

    at: int
    """Just before this call; behind the last one when it came to its end."""
    call: str
    ended: bool
    cache_dir: Path
    """As it left it."""


def calls_of(zygote: Zygote, name: str, base: Path, work: Path) -> list[str]:
    """What a protocol announces when nothing stops it."""
    done = zygote.run("act", name=name, source=str(base), cache_dir=str(work / "whole"))
    shutil.rmtree(work / "whole")
    shutil.rmtree(work / "whole.given", ignore_errors=True)
    assert done.told, "it announces what it does"
    return done.told


def deaths(zygote: Zygote, name: str, base: Path, work: Path) -> Iterator[Point]:
    """Every one, and the end. The state that each leaves is its receiver's to remove.

    A sync changes nothing that a kill could show: behind it the state is the one before it, and is not made again.
    """
    calls = calls_of(zygote, name, base, work)
    for at in itertools.count(1):
        ended = at > len(calls)
        if at > 1 and is_sync(calls[at - 2]) and not ended:
            continue
        state = work / f"{at}"
        died = zygote.run("act", name=name, source=str(base), cache_dir=str(state), at=at)
        assert died.told == calls[: at - 1], "the calls come in the same order in every run"
        yield Point(at, "the end" if ended else calls[at - 1], ended, state)
        if ended:
            return


def is_sync(call: str) -> bool:
    return call.startswith(("fsync ", "fdatasync "))


class Checks:
    """Starts over what deaths have left, some at a time, and finds nothing wrong."""

    def __init__(self, zygote: Zygote, name: str, *, lost_power: bool = False) -> None:
        self._zygote = zygote
        self._name = name
        self._lost_power = lost_power
        self._waiting: list[tuple[Path, bool, str]] = []
        self.count = 0
        self.kept: list[dict[str, int]] = []
        """Of each state, in order: bytes that need not be fetched again, by digest."""

    def add(self, cache_dir: Path, where: str, *, ended: bool) -> None:
        """A state to look at; removed when it was."""
        self._waiting.append((cache_dir, ended, where))
        if len(self._waiting) == AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Looks at all that is left."""
        states = [(str(cache_dir), ended) for cache_dir, ended, _ in self._waiting]
        checked = self._zygote.run(
            "recover_and_check", name=self._name, states=states, lost_power=self._lost_power
        ).result
        for found, (cache_dir, _, where) in zip(checked, self._waiting, strict=True):
            assert found["wrong"] == {}, f"died before {where}\n{json.dumps(found, indent=1)}"
            shutil.rmtree(cache_dir)
            shutil.rmtree(f"{cache_dir}.given", ignore_errors=True)  # what was imported
            self.kept.append(found["kept"])
        self.count += len(states)
        self._waiting.clear()

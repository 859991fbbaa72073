"""Who downloads when: waited for before background, then by arrival, and never more than the limit."""

from __future__ import annotations

import asyncio

from modelcached.cache.turns import Turn, Turns


class Line:
    """A line whose limit can be moved, and who was told in which order that something changed for it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.told: list[str] = []
        self.turns = Turns(lambda: self.limit)
        self.known: dict[str, Turn] = {}

    def enter(self, *names: str, urgent: bool = True) -> None:
        for name in names:
            self.known[name] = self.turns.enter(lambda name=name: self.told.append(name), urgent=urgent)

    def leave(self, name: str) -> None:
        self.turns.leave(self.known.pop(name))

    def hurry(self, name: str, *, urgent: bool) -> None:
        self.turns.hurry(self.known[name], urgent=urgent)

    @property
    def held(self) -> set[str]:
        return {name for name, turn in self.known.items() if turn.held}


def test_first_come_first_served_and_never_more_than_the_limit() -> None:
    line = Line(2)
    line.enter("a", "b", "c", "d")
    assert line.held == {"a", "b"}
    line.leave("b")
    assert line.held == {"a", "c"}
    line.leave("d")
    line.enter("e")
    line.leave("a")
    assert line.held == {"c", "e"}
    assert line.told == ["a", "b", "c", "e"], "each once, when it was its turn"


def test_background_work_steps_aside_for_a_request_and_goes_on_after_the_last() -> None:
    line = Line(1)
    line.enter("background", urgent=False)
    assert line.held == {"background"}
    line.enter("pod", "later pod")
    assert line.held == {"pod"}
    line.leave("pod")
    assert line.held == {"later pod"}
    line.leave("later pod")
    assert line.held == {"background"}
    assert line.told == ["background", "pod", "background", "later pod", "background"]


def test_of_several_the_last_in_the_background_steps_aside() -> None:
    line = Line(2)
    line.enter("old", "new", urgent=False)
    line.enter("pod")
    assert line.held == {"old", "pod"}


def test_nobody_steps_aside_for_an_equal() -> None:
    """Somebody asks again for what stood aside: it was there first, but its turn is not taken from another request."""
    line = Line(1)
    line.enter("first")
    line.hurry("first", urgent=False)
    line.enter("second", "third")
    assert line.held == {"second"}
    line.hurry("first", urgent=True)
    assert line.held == {"second"}
    line.leave("second")
    assert line.held == {"first"}, "but it is before those who came later"


def test_who_loses_its_last_caller_makes_room_at_once() -> None:
    line = Line(1)
    line.enter("first", "second")
    line.hurry("first", urgent=False)
    assert line.held == {"second"}


def test_the_limit_can_change() -> None:
    line = Line(1)
    line.enter("a", "b", "c")
    line.limit = 2
    line.turns.settle()
    assert line.held == {"a", "b"}
    line.limit = 1
    line.turns.settle()
    assert line.held == {"a"}


def test_a_place_in_the_line_says_who_is_before_it_and_whose_limit_it_is() -> None:
    line = Line(1)
    line.enter("a", "b", "c")
    assert line.turns.detail(line.known["b"]) == "1 model comes first, transfer.models is 1"
    assert line.turns.detail(line.known["c"]) == "2 models come first, transfer.models is 1"


async def test_every_change_of_the_line_wakes_those_who_look_at_it() -> None:
    line = Line(1)
    line.enter("a", "b")
    for change in (
        lambda: line.enter("c"),
        lambda: line.hurry("c", urgent=False),
        lambda: line.leave("a"),
        line.turns.settle,
        line.turns.stop,
    ):
        looking = asyncio.create_task(line.turns.change.wait())
        await asyncio.sleep(0)
        change()
        async with asyncio.timeout(10):
            await looking
    assert line.turns.stopping

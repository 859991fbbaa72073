"""How far something is: a bar on a terminal that goes away again, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn

from modelcache.cachectl.session import Session
from modelcache.units import printable

Draw = Callable[[int, int, str], None]
"""Called with what is done, of how much (0: nobody knows), and a text beside it."""


def has_bars(session: Session) -> bool:
    """Whether somebody would see one."""
    return session.err.is_terminal and not session.json


@contextmanager
def bar(session: Session, name: str = "") -> Iterator[Draw]:
    """One bar on stderr."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=session.err, transient=True, disable=not has_bars(session)) as display:
        task = display.add_task(printable(name), total=None, text="")

        def draw(done: int, total: int, text: str) -> None:
            display.update(task, total=total or None, completed=done, text=printable(text))

        yield draw

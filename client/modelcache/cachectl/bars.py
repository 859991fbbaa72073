"""How far something is: a bar on a terminal that goes away again, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from modelcache.cachectl.session import Session
from modelcache.units import format_size, printable

Draw = Callable[[int, int, str], None]
"""Called with what is done, of how much (0: nobody knows), and a text beside it."""
DrawAll = Callable[[int, int, str, Mapping[str, tuple[int, int]]], None]
"""The same, with what is done of each file under way, and how large it is, by path."""
_PATH_COLUMNS = 40


def has_bars(session: Session) -> bool:
    """Whether somebody would see one."""
    return session.err.is_terminal and not session.json


@contextmanager
def bar(session: Session, name: str = "") -> Iterator[Draw]:
    """One bar on stderr."""
    with _display(session) as display:
        task = display.add_task(printable(name), total=None, text="")

        def draw(done: int, total: int, text: str) -> None:
            display.update(task, total=total or None, completed=done, text=printable(text))

        yield draw


@contextmanager
def bars(session: Session, name: str) -> Iterator[DrawAll]:
    """One bar on stderr, and below it one for each file that is on its way."""
    # Two tables: the long text beside the first bar would leave those of the files no room.
    above, below = _display(session), _display(session)
    shown = Live(Group(above, below), console=session.err, transient=True) if has_bars(session) else nullcontext()
    with shown:
        whole = above.add_task(printable(name), total=None, text="")
        tasks: dict[str, TaskID] = {}

        def draw(done: int, total: int, text: str, files: Mapping[str, tuple[int, int]]) -> None:
            above.update(whole, total=total or None, completed=done, text=printable(text))
            for path in tasks.keys() - files.keys():
                below.remove_task(tasks.pop(path))
            for path in list(files)[: _rows(session)]:
                if path not in tasks:
                    tasks[path] = below.add_task(f"  {shortened(path)}", total=None, text="")
                of_file, size = files[path]
                below.update(tasks[path], total=size or None, completed=of_file, text=format_size(size))

        yield draw


def shortened(path: str) -> str:
    """The end of it, for that is where files of a model differ."""
    text = printable(path)
    return text if len(text) <= _PATH_COLUMNS else f"…{text[1 - _PATH_COLUMNS :]}"


def _rows(session: Session) -> int:
    """Bars that have room on the screen below the first one."""
    return max(0, session.err.size.height - 3)


def _display(session: Session) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    return Progress(*columns, console=session.err, transient=True, disable=not has_bars(session))

"""cachectl top: the status, live."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice

import click
from rich.console import Group
from rich.live import Live

from modelcache.cachectl.rows import status_row
from modelcache.cachectl.session import Session, duration_argument, verb
from modelcache.cachectl.status import status_view

_SECOND = timedelta(seconds=1)


@click.command("top", epilog="Example: cachectl top --interval 500ms")
@click.option("--interval", metavar="D", type=duration_argument, help="Between two looks; 1s.")
@click.option("--count", metavar="N", type=click.IntRange(1), help="Stop after so many looks.")
@verb
def top(session: Session, interval: timedelta | None, count: int | None) -> None:
    """Watch what the cache uses and what is under way, until Ctrl-C. With --json one object a line."""
    with session.admin.watch(interval or _SECOND) as stream:
        looks = islice(stream, count)
        if session.json:
            for now in looks:
                session.print_json_line(status_row(now))
            return
        with Live(console=session.out, screen=session.out.is_terminal, auto_refresh=False) as live:
            for now in looks:
                live.update(Group(*status_view(now, session.out)), refresh=True)

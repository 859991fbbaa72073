"""cachectl top: the status, live."""

from __future__ import annotations

from datetime import timedelta

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
    seen = 0
    with session.admin.watch(interval or _SECOND) as stream:
        if session.json:
            for now in stream:
                session.print_json_line(status_row(now))
                seen += 1
                if seen == count:
                    return
            return
        terminal = session.out.is_terminal
        with Live(console=session.out, screen=terminal, auto_refresh=False) as live:
            try:
                for now in stream:
                    live.update(Group(*status_view(now, session.out)), refresh=True)
                    seen += 1
                    if seen == count:
                        return
            except KeyboardInterrupt:
                return

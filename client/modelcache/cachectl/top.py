"""cachectl top: the status, live."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from modelcache.admin import Admin
from modelcache.cachectl.rows import status_row
from modelcache.cachectl.session import Session, duration_argument, verb
from modelcache.cachectl.status import status_view
from modelcache.errors import ModelCacheError
from modelcache.units import format_duration
from modelcache.v1 import admin_pb2

_SECOND = timedelta(seconds=1)


@click.command("top", epilog="Example: cachectl top --interval 500ms")
@click.option("--interval", metavar="D", type=duration_argument, help="Between two looks; 1s.")
@click.option("--count", metavar="N", type=click.IntRange(1), help="Stop after so many looks.")
@verb
def top(session: Session, interval: timedelta | None, count: int | None) -> None:
    """Watch what the cache uses and what is under way, until Ctrl-C. With --json one object a line.

    On a terminal a restart of the daemon is waited for; elsewhere it ends the watch.
    """
    interval = interval or _SECOND
    if session.json:
        for now in islice(_looks(session.admin, interval), count):
            session.print_json_line(status_row(now))
        return
    if not session.out.is_terminal:
        for number, now in enumerate(islice(_looks(session.admin, interval), count)):
            session.out.print(Group(*([Text()] if number else []), *status_view(now, session.out)))
        return
    seen, lost_at = 0, 0.0
    shown: list[Text] = []
    with Live(console=session.out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                for now in islice(_looks(session.admin, interval), count and count - seen):
                    seen, lost_at, shown = seen + 1, 0.0, status_view(now, session.out)
                    live.update(Group(*shown), refresh=True)
            except ModelCacheError as error:
                if not seen or not error.connection_lost:
                    raise
                lost_at = lost_at or time.monotonic()
                ago = format_duration(timedelta(seconds=time.monotonic() - lost_at))
                lost = Text(f"no daemon answers, for {ago}; this is how it was before", style="bold red")
                live.update(Group(lost, *shown), refresh=True)
                time.sleep(interval.total_seconds())
            else:
                return


def _looks(admin: Admin, interval: timedelta) -> Iterator[admin_pb2.CacheStatus]:
    with admin.watch(interval) as stream:
        yield from stream

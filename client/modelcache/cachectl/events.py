"""cachectl events: what happened, newest first."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import islice

import click
from rich.table import Table
from rich.text import Text

from modelcache.cachectl.rows import event_row
from modelcache.cachectl.session import Session, duration_argument, short, verb
from modelcache.cachectl.tables import new_table
from modelcache.units import format_age, format_duration, format_size, printable
from modelcache.v1 import admin_pb2
from modelcache.words import EVENT_KINDS, event_kind_word

_KIND = click.Choice(list(EVENT_KINDS))


@click.command("events", epilog="Example: cachectl events --kind refused --since 1d")
@click.argument("repo", metavar="[REPO]", default="")
@click.option("--kind", "kinds", metavar="KIND", multiple=True, type=_KIND, help=f"Only {', '.join(EVENT_KINDS)}.")
@click.option("--since", metavar="D", type=duration_argument, help="Only of the last 90m, 7d, ...")
@click.option("--limit", metavar="N", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@verb
def events(session: Session, repo: str, kinds: tuple[str, ...], since: timedelta | None, limit: int) -> None:
    """List what happened: what was fetched, for whom, what was refused, evicted, damaged. Hits leave no event."""
    after = datetime.now(UTC) - since if since is not None else None
    asked = session.admin.events(repo, [EVENT_KINDS[kind] for kind in kinds], after, page_size=min(limit, 500))
    found = list(islice(asked, limit))
    if session.json:
        session.print_json([event_row(event) for event in found])
        return
    if not found:
        session.say("nothing of that kind has happened")
        return
    session.out.print(events_table(found))


def events_table(found: Iterable[admin_pb2.Event]) -> Table:
    """One row an event."""
    table = new_table("AGO", "EVENT", "MODEL", "WHAT", right=("AGO",), folds=("MODEL", "WHAT"))
    for event in found:
        table.add_row(
            format_age(event.at.ToDatetime(tzinfo=UTC)).split(" ")[0],
            event_kind_word(event.kind),
            Text(printable(_model(event.model))),
            Text(printable(_what(event))),
        )
    return table


def _model(name: str) -> str:
    repo_id, at, revision = name.partition("@")
    return f"{repo_id}{at}{short(revision)}" or "-"


def _what(event: admin_pb2.Event) -> str:
    parts = [event.reason]
    if event.bytes:
        parts.append(format_size(event.bytes))
    if event.HasField("duration") and event.duration.ToTimedelta().total_seconds() >= 1:
        parts.append(f"in {format_duration(event.duration.ToTimedelta())}")
    if event.holder:
        parts.append(f"for {event.holder}")
    parts.append(event.detail)
    return ", ".join(filter(None, parts))

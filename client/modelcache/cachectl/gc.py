"""cachectl gc: what lies in the cache beside models."""

from __future__ import annotations

from datetime import UTC

import click
from rich.text import Text

from modelcache.cachectl.evict import DECLINED, agreed
from modelcache.cachectl.rows import garbage_row
from modelcache.cachectl.session import Session, verb
from modelcache.cachectl.tables import new_table
from modelcache.units import format_age, format_size, printable
from modelcache.v1 import admin_pb2
from modelcache.words import GARBAGE_KINDS, garbage_word

_WHAT = {
    "partial": "unfinished; who asks again goes on from there",
    "orphan": "whole, of a download that did not end",
    "quarantine": "went bad; kept to be looked at",
    "trash": "given up, not yet off the disk",
}
_SHORT = 12


@click.command("gc", epilog="Example: cachectl gc --kind partial --yes")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(sorted(GARBAGE_KINDS)), help="Only these.")
@click.option("--dry-run", is_flag=True, help="Show what there is, and stop.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@verb
def gc(session: Session, kinds: tuple[str, ...], dry_run: bool, yes: bool) -> int:
    """Remove what lies in the cache beside models: unfinished and orphaned blobs, quarantine, trash."""
    wanted = [GARBAGE_KINDS[kind] for kind in kinds]
    there = session.admin.garbage(wanted, remove=False)
    if dry_run and session.json:
        session.print_json(garbage_row(there, removed=False))
        return 0
    if not session.json:
        _show(session, there, to_stdout=dry_run)
    if dry_run:
        return 0
    if there.bytes_freed or any(not item.in_use for item in there.items):
        if not yes and not agreed(f"remove it and free {format_size(there.bytes_freed)}?"):
            session.say("nothing was removed")
            return DECLINED
        there = session.admin.garbage(wanted, remove=True)
    else:
        there = admin_pb2.CollectGarbageResponse()
    if session.json:
        session.print_json(garbage_row(there, removed=True))
    else:
        session.say(f"{len(there.items)} removed, {format_size(there.bytes_freed)} freed")
    return 0


def _show(session: Session, there: admin_pb2.CollectGarbageResponse, *, to_stdout: bool) -> None:
    console = session.out if to_stdout else session.err
    if not there.items:
        session.say("nothing lies there beside models")
        return
    table = new_table("KIND", "NAME", "SIZE", "AGE", "WHAT", right=("SIZE", "AGE"), folds=("WHAT",))
    for item in there.items:
        kind = garbage_word(item.kind)
        what = "in use: it stays" if item.in_use else _WHAT.get(kind, "")
        if item.repo_id:
            what = f"of {item.repo_id}: {what}"
        table.add_row(
            kind,
            Text(printable(item.name)[:_SHORT]),
            format_size(item.bytes),
            format_age(item.modified_at.ToDatetime(tzinfo=UTC)).split(" ")[0],
            Text(printable(what)),
        )
    console.print(table)

"""cachectl evict: shows what would go, asks, and then says what went."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.text import Text

from modelcache.cachectl.listing import new_table
from modelcache.cachectl.rows import eviction_row
from modelcache.cachectl.session import Session, model_argument, verb
from modelcache.units import format_size, printable
from modelcache.v1 import admin_pb2, common_pb2

DECLINED = 1
"""Somebody at a terminal said no."""

_SHORT_COMMIT = 8


@click.command("evict", epilog="Example: cachectl evict org/name@main other/model --dry-run")
@click.argument("models", metavar="MODEL[@REV]...", nargs=-1, required=True, type=model_argument)
@click.option("--dry-run", is_flag=True, help="Show what would go, and stop.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@verb
def evict(session: Session, models: tuple[common_pb2.ModelReference, ...], dry_run: bool, yes: bool) -> int:
    """Remove models that nothing uses. Without a revision, every commit of the repository."""
    planned = session.admin.evict(models, dry_run=True)
    if dry_run and session.json:
        session.print_json(eviction_row(planned, dry_run=True))
        return 0
    if not session.json:
        _show_plan(session.out if dry_run else session.err, planned)
    if dry_run:
        return 0
    if not yes and not _agreed(planned):
        session.say("nothing was evicted")
        return DECLINED
    gone = session.admin.evict(models, dry_run=False)
    if session.json:
        session.print_json(eviction_row(gone, dry_run=False))
    else:
        for model in gone.models:
            click.echo(f"{printable(model.repo_id)}@{printable(model.commit)}")
        session.say(f"freed {format_size(gone.bytes_freed)}")
    return 0


def _show_plan(console: Console, planned: admin_pb2.EvictModelsResponse) -> None:
    table = new_table("MODEL", "COMMIT", "FREES", right=("FREES",))
    for model in planned.models:
        table.add_row(Text(printable(model.repo_id)), model.commit[:_SHORT_COMMIT], format_size(model.bytes_freed))
    console.print(table)
    console.print(f"evicting {len(planned.models)} frees {format_size(planned.bytes_freed)}")


def _agreed(planned: admin_pb2.EvictModelsResponse) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("there is no terminal to ask on: give --yes to evict, or --dry-run to only look")
    return click.confirm(f"evict {len(planned.models)} and free {format_size(planned.bytes_freed)}?", err=True)

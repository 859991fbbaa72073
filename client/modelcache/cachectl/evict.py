"""cachectl evict: shows what would go, asks, and then says what went."""

from __future__ import annotations

import sys
from datetime import timedelta

import click
from rich.console import Console
from rich.text import Text

from modelcache.cachectl.rows import eviction_row
from modelcache.cachectl.session import Session, duration_argument, model_argument, short, size_argument, verb
from modelcache.cachectl.tables import new_table
from modelcache.client import reference
from modelcache.reasons import EXIT_TEMPORARY
from modelcache.units import format_size, printable
from modelcache.v1 import admin_pb2, common_pb2

DECLINED = 1
"""Somebody at a terminal said no."""


@click.command("evict", epilog="Example: cachectl evict --older-than 7d --until-free 200GB --dry-run")
@click.argument("models", metavar="[MODEL[@REV]]...", nargs=-1, type=model_argument)
@click.option("--older-than", metavar="D", type=duration_argument, help="Models not asked for within 7d, 12h, ...")
@click.option(
    "--until-free", metavar="SIZE", type=size_argument, help="As many as it takes until the disk has 200GB, ... free."
)
@click.option("--all-unpinned", is_flag=True, help="Every model that no pin, lease or transfer keeps.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and stop.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@verb
def evict(
    session: Session,
    models: tuple[common_pb2.ModelReference, ...],
    older_than: timedelta | None,
    until_free: int | None,
    all_unpinned: bool,
    dry_run: bool,
    yes: bool,
) -> int:
    """Remove models that nothing uses. Without a revision, every commit of the repository.

    Instead of models, --older-than and --until-free (which narrow each other) or --all-unpinned say which; what goes
    is what would go first by itself. Exits 75 where --until-free wants more than
    all of that frees; what can go still does.
    """
    rule = _rule(older_than, until_free, all_unpinned=all_unpinned)
    if bool(models) == (rule is not None):
        raise click.UsageError("name models, or say which by --older-than, --until-free or --all-unpinned")
    planned = session.admin.evict(models, dry_run=True, rule=rule)
    if dry_run and session.json:
        session.print_json(eviction_row(planned, dry_run=True))
    if not session.json:
        _show_plan(session.out if dry_run else session.err, planned, until_free or 0)
    if dry_run:
        return EXIT_TEMPORARY if planned.bytes_short else 0
    if not planned.models:
        gone = planned
    elif not yes and not agreed(f"evict {len(planned.models)} and free {format_size(planned.bytes_freed)}?"):
        session.say("nothing was evicted")
        return DECLINED
    else:
        # What was shown is what goes, by its commits: a rule might mean others by now.
        shown = [reference(model.repo_id, model.commit) for model in planned.models]
        gone = session.admin.evict(shown, dry_run=False)
        gone.bytes_short = planned.bytes_short
    if session.json:
        session.print_json(eviction_row(gone, dry_run=False))
    else:
        for model in gone.models:
            click.echo(f"{printable(model.repo_id)}@{printable(model.commit)}")
        session.say(f"freed {format_size(gone.bytes_freed)}")
    return EXIT_TEMPORARY if planned.bytes_short else 0


def _rule(older_than: timedelta | None, until_free: int | None, *, all_unpinned: bool) -> admin_pb2.EvictionRule | None:
    """None where there is none."""
    if all_unpinned and (older_than is not None or until_free is not None):
        raise click.UsageError("--all-unpinned means all of them: leave --older-than and --until-free out")
    if older_than is None and until_free is None and not all_unpinned:
        return None
    rule = admin_pb2.EvictionRule(until_free_bytes=until_free or 0)
    if older_than is not None:
        rule.older_than.FromTimedelta(older_than)
    return rule


def _show_plan(console: Console, planned: admin_pb2.EvictModelsResponse, until_free: int) -> None:
    lacking = (
        f"{format_size(until_free)} free cannot be had: {format_size(planned.bytes_short)} short; "
        "what is pinned, leased, in use or too young stays (cachectl show MODEL says why)"
    )
    if not planned.models:
        reached = "so much is free already" if until_free else "nothing that may go is like that"
        console.print(lacking if planned.bytes_short else reached)
        return
    table = new_table("MODEL", "COMMIT", "FREES", right=("FREES",))
    for model in planned.models:
        table.add_row(Text(printable(model.repo_id)), short(model.commit), format_size(model.bytes_freed))
    console.print(table)
    console.print(f"evicting {len(planned.models)} frees {format_size(planned.bytes_freed)}")
    if planned.bytes_short:
        console.print(lacking)


def agreed(question: str, instead: str = ", or --dry-run to only look") -> bool:
    """Whether somebody at a terminal says yes. Raises UsageError where there is nobody to ask."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"there is no terminal to ask on: give --yes{instead}")
    return click.confirm(question, err=True)

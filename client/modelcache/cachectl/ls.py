"""cachectl ls: what is cached, a row each.

Plain lines, without rich: a script that lists thousands would wait for its import, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any, NamedTuple

import click

from modelcache.cachectl.rows import model_row
from modelcache.cachectl.session import Session, short, state_words, verb
from modelcache.units import format_age, format_size, printable
from modelcache.v1 import common_pb2

_LEAST_NAME = 18
"""Columns for a name, on however narrow a terminal."""


_SORTS: dict[str, Callable[[common_pb2.Model], Any]] = {
    "name": lambda _: 0,  # as the daemon lists them
    "size": lambda model: -model.size_bytes,
    "unique": lambda model: -model.unique_bytes,
    "used": lambda model: -model.last_used.ToNanoseconds(),
    "unused": lambda model: model.last_used.ToNanoseconds(),
}
_FILTERS: dict[str, Callable[[common_pb2.Model], bool]] = {
    "pinned": lambda model: model.pinned,
    "leased": lambda model: bool(model.lease_ids),
    "idle": lambda model: not model.pinned and not model.lease_ids,
    "unverified": lambda model: model.state != common_pb2.MODEL_STATE_READY,
}


@click.command("ls", epilog="Example: cachectl ls 'Qwen/*' --only idle --sort unused")
@click.argument("globs", metavar="[GLOB]...", nargs=-1)
@click.option("--only", type=click.Choice(list(_FILTERS)), help="Only those; idle is what no pin and no lease keeps.")
@click.option(
    "--sort", type=click.Choice(list(_SORTS)), default="name", show_default=True, help="Largest, or latest, first."
)
@click.option("--tree", is_flag=True, help="Down to the files, and which other models share them.")
@verb
def ls(session: Session, globs: tuple[str, ...], only: str | None, sort: str, tree: bool) -> None:
    """List the cached models, all or those whose names match."""
    asked = session.admin.cache.list_models()
    width = session.width  # while the daemon makes the first page
    models = (
        model
        for model in asked
        if (not globs or any(fnmatchcase(model.repo_id, glob) for glob in globs))
        and (only is None or _FILTERS[only](model))
    )
    in_order = _SORTS[sort]
    if tree:
        from modelcache.cachectl.tree import print_tree  # noqa: PLC0415 - it needs rich

        print_tree(session, sorted(models, key=in_order))
        return
    if session.json:
        session.print_json([model_row(model) for model in sorted(models, key=in_order)])
        return
    # Each row is made when its model comes: the daemon makes the next page meanwhile.
    found = sorted(((in_order(model), _row(model)) for model in models), key=itemgetter(0))
    if not found:
        session.say(
            "no cached model is like that" if globs or only else "nothing is cached; cachectl pull fetches a model"
        )
        return
    session.print_lines(_lines([row for _, row in found], width))
    session.say(f"{len(found)} model{'' if len(found) == 1 else 's'}; UNIQUE is what evicting one alone would free")


class _Row(NamedTuple):
    name: str
    commit: str
    size: str
    unique: str
    used: str
    state: str


_HEAD = _Row("MODEL", "COMMIT", "SIZE", "UNIQUE", "USED", "STATE")


def _row(model: common_pb2.Model) -> _Row:
    used = format_age(model.last_used.ToDatetime(tzinfo=UTC)).split(" ")[0] if model.HasField("last_used") else "never"
    return _Row(
        printable(f"{model.repo_id}@{','.join(model.revisions)}" if model.revisions else model.repo_id),
        printable(short(model.commit)),
        format_size(model.size_bytes),
        format_size(model.unique_bytes),
        used,
        state_words(model),
    )


def _lines(rows: list[_Row], width: int) -> Iterator[str]:
    """One line a row, the names folded where they are too long."""
    table = [_HEAD, *rows]
    longest, commit, size, unique, used, state = (max(map(len, column)) for column in zip(*table, strict=True))
    room = min(longest, max(_LEAST_NAME, width - (commit + size + unique + used + state + 5)))
    for row in table:
        rest = f"{row.commit:<{commit}} {row.size:>{size}} {row.unique:>{unique}} {row.used:>{used}} {row.state}"
        yield f"{row.name[:room]:<{room}} {rest}".rstrip()
        yield from (row.name[at : at + room] for at in range(room, len(row.name), room))

"""cachectl ls and leases: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Literal

import click
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from modelcache.cachectl.rows import detail_row, lease_row, model_row
from modelcache.cachectl.session import Session, short, verb
from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.reasons import Reason
from modelcache.units import format_age, format_duration, format_size, printable
from modelcache.v1 import common_pb2
from modelcache.words import lease_kind_word, model_state_word

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
    models = [
        model
        for model in session.admin.cache.list_models()
        if (not globs or any(fnmatchcase(model.repo_id, glob) for glob in globs))
        and (only is None or _FILTERS[only](model))
    ]
    models.sort(key=_SORTS[sort])
    if tree:
        _tree(session, models)
        return
    if session.json:
        session.print_json([model_row(model) for model in models])
        return
    if not models:
        session.say(
            "no cached model is like that" if globs or only else "nothing is cached; cachectl pull fetches a model"
        )
        return
    session.print_lines(_lines(models, session.out.width))
    session.say(f"{len(models)} model{'' if len(models) == 1 else 's'}; UNIQUE is what evicting one alone would free")


def _tree(session: Session, models: list[common_pb2.Model]) -> None:
    details = []
    for model in models:
        with suppress_missing():  # evicted since it was listed
            details.append(session.admin.describe(reference(model.repo_id, model.commit)))
    if session.json:
        session.print_json([detail_row(detail, ()) for detail in details])
        return
    for detail in details:
        model = detail.model
        top = Tree(Text(f"{printable(model_line(model))}  {format_size(model.size_bytes)}  {_state(model)}"))
        for file in detail.files:
            shared = f"  shared with {', '.join(map(_short, file.shared_with))}" if file.shared_with else ""
            missing = "" if file.cached else "  missing"
            top.add(Text(f"{printable(file.path)}  {format_size(file.size_bytes)}{missing}{printable(shared)}"))
        session.out.print(top)


def model_line(model: common_pb2.Model) -> str:
    """``org/name@main`` and the commit where no branch says it."""
    return f"{model.repo_id}@{','.join(model.revisions) or short(model.commit)}"


def _short(name: str) -> str:
    repo_id, _, commit = name.rpartition("@")
    return f"{repo_id}@{short(commit)}"


@contextmanager
def suppress_missing() -> Iterator[None]:
    """What is not cached any more is passed over."""
    try:
        yield
    except ModelCacheError as error:
        if error.reason != Reason.MODEL_NOT_CACHED:
            raise


def _lines(models: list[common_pb2.Model], width: int) -> Iterator[str]:
    """One row a snapshot, the names folded where they are too long.

    Not by rich: measuring each cell of 2,000 rows takes it most of a second.
    """
    rows = [("COMMIT", "SIZE", "UNIQUE", "USED", "STATE")]
    for model in models:
        used = model.last_used.ToDatetime(tzinfo=UTC) if model.HasField("last_used") else None
        sizes = (format_size(model.size_bytes), format_size(model.unique_bytes))
        rows.append((printable(short(model.commit)), *sizes, format_age(used).split(" ")[0], _state(model)))
    commit, size, unique, age, state = (max(map(len, column)) for column in zip(*rows, strict=True))
    names = [
        "MODEL",
        *(printable(f"{m.repo_id}@{','.join(m.revisions)}" if m.revisions else m.repo_id) for m in models),
    ]
    room = max(_LEAST_NAME, width - (commit + size + unique + age + state + 5))
    room = min(room, max(map(len, names)))
    for name, row in zip(names, rows, strict=True):
        rest = f"{row[0]:<{commit}} {row[1]:>{size}} {row[2]:>{unique}} {row[3]:>{age}} {row[4]}"
        yield f"{name[:room]:<{room}} {rest}".rstrip()
        yield from (name[at : at + room] for at in range(room, len(name), room))


def _name(model: common_pb2.Model) -> str:
    return f"{model.repo_id}@{','.join(model.revisions)}" if model.revisions else model.repo_id


def _state(model: common_pb2.Model) -> str:
    words = [] if model.state == common_pb2.MODEL_STATE_READY else [model_state_word(model.state)]
    words += ["pinned"] if model.pinned else []
    if model.lease_ids:
        words.append(f"{len(model.lease_ids)} lease{'' if len(model.lease_ids) == 1 else 's'}")
    return ", ".join(words) or "idle"


@click.command("leases", epilog="Example: cachectl leases --json | jq '.[] | select(.kind == \"recovered\")'")
@verb
def leases(session: Session) -> None:
    """List who uses which model, oldest first."""
    found = list(session.admin.leases())
    if session.json:
        session.print_json([lease_row(lease) for lease in found])
        return
    if not found:
        session.say("nothing is leased")
        return
    session.out.print(leases_table(found))


def leases_table(found: Iterable[common_pb2.Lease]) -> Table:
    """One row a lease."""
    # The id is for copying into `cachectl release`: whatever else must fold, it stays in one piece.
    table = new_table("LEASE", "KIND", "HOLDER", "MODELS", "ENDS", folds=("HOLDER", "MODELS", "ENDS"))
    for lease in found:
        names = (f"{model.repo_id}@{model.revision or short(model.commit)}" for model in lease.models)
        table.add_row(
            Text(printable(lease.id)),
            lease_kind_word(lease.kind),
            Text(printable(lease.holder)),
            Text(printable(", ".join(names))),
            _ends(lease),
        )
    return table


def _ends(lease: common_pb2.Lease) -> str:
    if lease.HasField("expires_at"):
        left = lease.expires_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
        back = " unless its stream is back" if lease.kind == common_pb2.LEASE_KIND_STREAM else ""
        return f"in {format_duration(left)}{back}"
    endings: dict[int, str] = {
        common_pb2.LEASE_KIND_POD: "with its pod",
        common_pb2.LEASE_KIND_STREAM: "with its stream",
        common_pb2.LEASE_KIND_RECOVERED: "when released",
    }
    return endings.get(lease.kind, "-")


def new_table(
    *columns: str,
    right: tuple[str, ...] = (),
    folds: tuple[str, ...] = ("MODEL",),
) -> Table:
    """A table without lines, that folds long words rather than cutting them."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in folds)
    return table

"""cachectl ls and leases: tables that fit 80 columns."""

from __future__ import annotations

from datetime import UTC, datetime

import click
from rich.table import Table
from rich.text import Text

from modelcache.cachectl.rows import lease_row, model_row
from modelcache.cachectl.session import Session, verb
from modelcache.units import format_age, format_duration, format_size, printable
from modelcache.v1 import common_pb2
from modelcache.words import lease_kind_word, model_state_word

_SHORT_COMMIT = 8


@click.command("ls", epilog="Example: cachectl ls --json | jq -r '.[] | select(.pinned) | .repo_id'")
@verb
def ls(session: Session) -> None:
    """List the cached models."""
    models = list(session.admin.cache.list_models())
    if session.json:
        session.print_json([model_row(model) for model in models])
        return
    if not models:
        session.say("nothing is cached; cachectl pull fetches a model")
        return
    session.out.print(models_table(models))
    session.say(f"{len(models)} model{'' if len(models) == 1 else 's'}; UNIQUE is what evicting one alone would free")


def models_table(models: list[common_pb2.Model]) -> Table:
    """One row a snapshot."""
    table = new_table("MODEL", "COMMIT", "SIZE", "UNIQUE", "USED", "STATE", right=("SIZE", "UNIQUE", "USED"))
    for model in models:
        named = f"{model.repo_id}@{','.join(model.revisions)}" if model.revisions else model.repo_id
        used = model.last_used.ToDatetime(tzinfo=UTC) if model.HasField("last_used") else None
        table.add_row(
            Text(printable(named)),
            printable(model.commit[:_SHORT_COMMIT]),
            format_size(model.size_bytes),
            format_size(model.unique_bytes),
            format_age(used).split(" ")[0],
            Text(_state(model)),
        )
    return table


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
    table = new_table("LEASE", "KIND", "HOLDER", "MODELS", "ENDS")
    for lease in found:
        names = (f"{model.repo_id}@{model.revision or model.commit[:_SHORT_COMMIT]}" for model in lease.models)
        table.add_row(
            Text(printable(lease.id)),
            lease_kind_word(lease.kind),
            Text(printable(lease.holder)),
            Text(printable(", ".join(names))),
            _ends(lease),
        )
    session.out.print(table)


def _ends(lease: common_pb2.Lease) -> str:
    if lease.HasField("expires_at"):
        left = lease.expires_at.ToDatetime(tzinfo=UTC) - datetime.now(UTC)
        return f"in {format_duration(left)}"
    endings: dict[int, str] = {
        common_pb2.LEASE_KIND_POD: "with its pod",
        common_pb2.LEASE_KIND_STREAM: "with its stream",
        common_pb2.LEASE_KIND_RECOVERED: "when released",
    }
    return endings.get(lease.kind, "-")


def new_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines, that folds long words rather than cutting them."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        folds = column in {"MODEL", "MODELS", "HOLDER", "LEASE", "STATE"}
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=not folds)
    return table

"""cachectl leases: who uses which model."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import click
from rich.table import Table
from rich.text import Text

from modelcache.cachectl.rows import lease_row
from modelcache.cachectl.session import Session, short, verb
from modelcache.cachectl.tables import new_table
from modelcache.units import format_duration, printable
from modelcache.v1 import common_pb2
from modelcache.words import lease_kind_word


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

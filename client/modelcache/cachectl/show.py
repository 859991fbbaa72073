"""cachectl show: one cached model down to its files, and who keeps it."""

from __future__ import annotations

from datetime import UTC

import click
from rich.text import Text

from modelcache.cachectl.events import events_table
from modelcache.cachectl.leases import leases_table
from modelcache.cachectl.rows import detail_row
from modelcache.cachectl.session import Session, model_argument, model_line, verb
from modelcache.cachectl.tables import new_table
from modelcache.units import format_age, format_size, printable
from modelcache.v1 import admin_pb2, common_pb2

_EVENTS = 10
"""The newest of them."""
_SHORT_DIGEST = 19
"""sha256:0123456789ab"""


@click.command("show", epilog="Example: cachectl show Qwen/Qwen2.5-7B-Instruct@main")
@click.argument("model", metavar="MODEL[@REV]", type=model_argument)
@verb
def show(session: Session, model: common_pb2.ModelReference) -> None:
    """Show a cached model: its files and digests, profiles, leases, pins and history."""
    detail = session.admin.describe(model)
    events = []
    for event in session.admin.events(model.repo_id, page_size=_EVENTS):
        events.append(event)
        if len(events) == _EVENTS:
            break
    if session.json:
        session.print_json(detail_row(detail, events))
        return
    for line in _head(detail):
        session.out.print(line, soft_wrap=True)
    _files(session, detail)
    if detail.leases:
        session.out.print()
        session.out.print(leases_table(detail.leases))
    if events:
        session.out.print()
        session.out.print(events_table(events))


def _head(detail: admin_pb2.DescribeModelResponse) -> list[Text]:
    model = detail.model
    used = model.last_used.ToDatetime(tzinfo=UTC) if model.HasField("last_used") else None
    lines = [
        ("model", model_line(model)),
        ("commit", model.commit),
        ("path", model.path),
        ("size", f"{format_size(model.size_bytes)}; evicting it alone frees {format_size(model.unique_bytes)}"),
        ("used", f"{format_age(used)} ago" if used else "never asked for"),
    ]
    lines += [("profile", f"{each.profile}: {len(each.paths)} files, {each.format}") for each in detail.selections]
    lines += [("pin", f"{pin.revision}{' of the model list' if pin.listed else ''}") for pin in detail.pins]
    lines += [("kept by", reason) for reason in detail.kept_by] or [("kept by", "nothing: it may be evicted")]
    return [Text(f"{label:<9} {printable(text)}") for label, text in lines]


def _files(session: Session, detail: admin_pb2.DescribeModelResponse) -> None:
    session.out.print()
    table = new_table(
        "FILE", "SIZE", "DIGEST", "CHECKED", "SHARED", right=("SIZE", "CHECKED", "SHARED"), folds=("FILE",)
    )
    for file in detail.files:
        table.add_row(
            Text(printable(file.path)),
            format_size(file.size_bytes),
            file.digest[:_SHORT_DIGEST],
            _checked(file),
            str(len(file.shared_with)) if file.shared_with else "-",
        )
    session.out.print(table)
    if any(file.shared_with for file in detail.files):
        session.say("SHARED is how many other cached models need the same blob; --json names them")


def _checked(file: admin_pb2.ModelFile) -> str:
    if not file.cached:
        return "missing"
    if not file.verified:
        return "unverified"
    return format_age(file.verified_at.ToDatetime(tzinfo=UTC)).split(" ")[0]

"""cachectl plan: what models would take, before anybody takes it."""

from __future__ import annotations

import click
from rich.text import Text

from modelcache.cachectl.rows import plan_row
from modelcache.cachectl.session import Session, model_argument, short, verb
from modelcache.cachectl.tables import new_table
from modelcache.client import reference
from modelcache.reasons import TABLE, Reason
from modelcache.units import format_size, printable
from modelcache.v1 import admin_pb2, common_pb2

_STATUS = {
    admin_pb2.FIT_NOT_NOW: TABLE[Reason.NO_SPACE_NOW].exit_status,
    admin_pb2.FIT_NEVER: TABLE[Reason.OVER_BUDGET].exit_status,
}


@click.command("plan", epilog="Example: cachectl plan Qwen/Qwen2.5-7B-Instruct org/lora --profile vllm")
@click.argument("models", metavar="[MODEL[@REV]]...", nargs=-1, type=model_argument)
@click.option("--profile", metavar="P", default="", help="vllm (default), transformers, full or gguf:<quant>.")
@verb
def plan(session: Session, models: tuple[common_pb2.ModelReference, ...], profile: str) -> int:
    """Show what models would fetch and what would go for them; changes nothing. Without a model, the model list.

    Exits 0 if they fit together, 75 if something in use would have to end first, 73 if they never fit.
    """
    if profile and not models:
        raise click.UsageError("--profile is for models that are named; the model list has its own")
    wanted = [reference(model.repo_id, model.revision, profile=profile) for model in models]
    planned = session.admin.plan(wanted)
    if session.json:
        session.print_json(plan_row(planned))
    else:
        _show(session, planned)
    return _STATUS.get(planned.fit, 0)


def _show(session: Session, planned: admin_pb2.PlanModelsResponse) -> None:
    table = new_table("MODEL", "COMMIT", "PROFILE", "SIZE", "TO FETCH", right=("SIZE", "TO FETCH"))
    for model in planned.models:
        table.add_row(
            Text(f"{printable(model.repo_id)}@{printable(model.revision)}"),
            short(model.commit),
            Text(printable(model.profile)),
            format_size(model.bytes_total),
            format_size(model.bytes_to_fetch),
        )
    session.out.print(table)
    needed, room = format_size(planned.bytes_needed), format_size(max(0, planned.bytes_room))
    if planned.fit == admin_pb2.FIT_CACHED:
        session.out.print("all of it is cached")
    elif planned.fit == admin_pb2.FIT_NOW:
        session.out.print(f"fits: needs {needed}, there is room for {room}")
    elif planned.fit == admin_pb2.FIT_AFTER_EVICTION:
        session.out.print(f"fits once these have gone: needs {needed}, there is room for {room}")
        gone = new_table("EVICTS", "COMMIT", "FREES", right=("FREES",))
        for victim in planned.evicts:
            gone.add_row(Text(printable(victim.repo_id)), short(victim.commit), format_size(victim.bytes_freed))
        session.out.print(gone)
    else:
        when = "never" if planned.fit == admin_pb2.FIT_NEVER else "not now"
        session.out.print(Text(f"does not fit, {when}: {printable(planned.reason)}"))

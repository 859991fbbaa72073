"""cachectl verify: reads cached models again, against their digests."""

from __future__ import annotations

import click
from rich.text import Text

from modelcache.cachectl.bars import bar
from modelcache.cachectl.rows import verified_row
from modelcache.cachectl.session import Session, model_argument, short, verb
from modelcache.cachectl.tables import new_table
from modelcache.progress import percent
from modelcache.reasons import TABLE, Reason
from modelcache.units import format_size, printable
from modelcache.v1 import admin_pb2, common_pb2
from modelcache.words import verdict_word

DAMAGED = TABLE[Reason.DIGEST_MISMATCH].exit_status


@click.command("verify", epilog="Example: cachectl verify Qwen/Qwen2.5-7B-Instruct --repair")
@click.argument("models", metavar="[MODEL[@REV]]...", nargs=-1, type=model_argument)
@click.option("--all", "everything", is_flag=True, help="All that is cached.")
@click.option("--repair", is_flag=True, help="Fetch bad files again, and wait for it.")
@verb
def verify(session: Session, models: tuple[common_pb2.ModelReference, ...], everything: bool, repair: bool) -> int:
    """Read cached models again and compare each file with its digest. Asks nobody, but to repair.

    What is bad is served to no new request. Exits 65 where something stays bad.
    """
    if bool(models) == everything:
        raise click.UsageError("name models, or give --all")
    done = _follow(session, models, repair=repair)
    if session.json:
        session.print_json(verified_row(done))
    else:
        _tell(session, done)
    return 0 if all(bad.repaired for bad in done.bad) else DAMAGED


def _follow(session: Session, models: tuple[common_pb2.ModelReference, ...], *, repair: bool) -> admin_pb2.VerifyDone:
    done = None
    with bar(session) as draw, session.admin.verify(models, repair=repair) as stream:
        for event in stream:
            if isinstance(event, admin_pb2.VerifyDone):
                done = event
                continue
            text = f"{percent(event.bytes_done, event.bytes_total)} % of {format_size(event.bytes_total)}"
            draw(event.bytes_done, event.bytes_total, f"{text}  {event.reading}")
    if done is None:
        raise click.ClickException("the daemon ended the stream without an answer")
    return done


def _tell(session: Session, done: admin_pb2.VerifyDone) -> None:
    if done.bad:
        table = new_table("MODEL", "FILE", "VERDICT", "NOW", folds=("MODEL", "FILE", "NOW"))
        for bad in done.bad:
            now = "fetched again" if bad.repaired else bad.detail or "served to nobody new"
            name = f"{printable(bad.repo_id)}@{short(bad.commit)}"
            table.add_row(Text(name), Text(printable(bad.path)), verdict_word(bad.verdict), Text(printable(now)))
        session.out.print(table)
    read = f"{done.files} files of {done.models} model{'' if done.models == 1 else 's'} ({format_size(done.bytes)})"
    session.say(f"{read} read; {len(done.bad) or 'none'} bad")
    if done.bad and not all(bad.repaired or bad.detail for bad in done.bad):
        session.say("cachectl verify --repair fetches them again")

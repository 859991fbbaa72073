"""cachectl pin, unpin, cancel and release: what is kept, and for whom."""

from __future__ import annotations

import click

from modelcache.cachectl.rows import model_row
from modelcache.cachectl.session import Session, model_argument, spelt, verb
from modelcache.units import printable
from modelcache.v1 import common_pb2


@click.command("pin", epilog="Example: cachectl pin Qwen/Qwen2.5-7B-Instruct")
@click.argument("model", metavar="MODEL[@REV]", type=model_argument)
@verb
def pin(session: Session, model: common_pb2.ModelReference) -> None:
    """Never evict a model. A pin by branch follows the branch, one by commit does not."""
    covered = session.admin.pin(model)
    if session.json:
        session.print_json([model_row(snapshot) for snapshot in covered])
        return
    for snapshot in covered:
        click.echo(f"{printable(snapshot.repo_id)}@{printable(snapshot.commit)}")
    session.say(f"{spelt(model)} is pinned" if covered else f"{spelt(model)} is pinned; nothing of it is cached yet")


@click.command("unpin", epilog="Example: cachectl unpin Qwen/Qwen2.5-7B-Instruct")
@click.argument("model", metavar="MODEL[@REV]", type=model_argument)
@verb
def unpin(session: Session, model: common_pb2.ModelReference) -> None:
    """Let a model be evicted again when space is needed. What the model list pins goes with its line there."""
    listed = session.admin.unpin(model)
    if session.json:
        session.print_json({"repo_id": model.repo_id, "revision": model.revision or None, "listed": listed})
    session.say(f"{spelt(model)} is {'still pinned by the model list' if listed else 'no longer pinned'}")


@click.command("cancel", epilog="Example: cachectl cancel Qwen/Qwen2.5-7B-Instruct")
@click.argument("model", metavar="MODEL[@COMMIT]", type=model_argument)
@verb
def cancel(session: Session, model: common_pb2.ModelReference) -> None:
    """End running transfers of a model; its waiters are told, and what was fetched is kept."""
    cancelled = session.admin.cancel_transfer(model.repo_id, model.revision)
    if session.json:
        session.print_json({"cancelled": cancelled})
    elif cancelled:
        session.say(f"{cancelled} transfer{'' if cancelled == 1 else 's'} of {spelt(model)} cancelled")
    else:
        session.say(f"no transfer of {spelt(model)} is under way")


@click.command("release", epilog="Example: cachectl release --recovered")
@click.argument("lease_ids", metavar="[LEASE_ID]...", nargs=-1)
@click.option("--model", "repo_id", metavar="REPO", default="", help="Every lease on this repository.")
@click.option("--recovered", is_flag=True, help="Every lease that stands for one lost with the state database.")
@click.option("--all", "everything", is_flag=True, help="Every lease there is now.")
@verb
def release(session: Session, lease_ids: tuple[str, ...], repo_id: str, recovered: bool, everything: bool) -> None:
    """End leases. Their models may then be evicted, also under a workload that still runs."""
    if not (lease_ids or repo_id or recovered or everything):
        raise click.UsageError("name leases, or give --model, --recovered or --all")
    if everything:
        lease_ids = tuple(dict.fromkeys([*lease_ids, *(lease.id for lease in session.admin.leases())]))
        if not lease_ids:
            session.say("0 released")
            return
    ended = session.admin.release(lease_ids, repo_id=repo_id, recovered=recovered)
    if session.json:
        session.print_json({"lease_ids": ended})
        return
    for lease_id in ended:
        click.echo(printable(lease_id))
    for lease_id in sorted(set(lease_ids) - set(ended)):
        session.say(f"no lease {lease_id}")
    session.say(f"{len(ended)} released")

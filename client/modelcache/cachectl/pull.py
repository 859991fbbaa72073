"""cachectl pull: fetch models before anybody needs them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import click
from google.protobuf.duration_pb2 import Duration

from modelcache.cachectl.bars import bars, has_bars
from modelcache.cachectl.session import Session, model_argument, spelt, verb
from modelcache.client import EnsureEvent, Stream, reference
from modelcache.errors import ModelCacheError
from modelcache.output import answers, hub_directory, ready_of
from modelcache.progress import describe
from modelcache.report import lines_every
from modelcache.units import format_size
from modelcache.v1 import cache_pb2, common_pb2

LEASE_SECONDS = 60
"""Long enough to be released by us, short enough to be forgotten if we die."""


Told = dict[str, str | int | bool | None]


class _Watcher(Protocol):
    def __call__(self, progress: cache_pb2.Progress) -> None: ...


@click.command("pull", epilog="Example: cachectl pull Qwen/Qwen2.5-7B-Instruct org/name@v2 --profile transformers")
@click.argument("models", metavar="MODEL[@REV]...", nargs=-1, required=True, type=model_argument)
@click.option("--profile", metavar="P", default="", help="vllm (default), transformers, full or gguf:<quant>.")
@click.option("--include", metavar="GLOB", multiple=True, help="Instead of a profile; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Instead of a profile; may be repeated.")
@verb
def pull(
    session: Session,
    models: tuple[common_pb2.ModelReference, ...],
    profile: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Make models whole on this node; prints their paths."""
    if profile and (include or exclude):
        raise click.UsageError("--profile and --include/--exclude exclude each other")
    done = []
    try:
        for model in models:
            wanted = reference(model.repo_id, model.revision, profile=profile, include=include, exclude=exclude)
            done += _pull_one(session, wanted)
    except KeyboardInterrupt:
        session.say("\nstopped waiting; the transfer goes on (cachectl cancel ends it)")
        raise
    finally:
        if session.json and done:
            session.print_json(done)


def _pull_one(session: Session, model: common_pb2.ModelReference) -> list[Told]:
    lease = cache_pb2.LeaseRequest(holder="cachectl pull", ttl=Duration(seconds=LEASE_SECONDS))
    asked = session.admin.cache.ensure(model, lease=lease, with_files=has_bars(session))
    return followed(session, spelt(model), asked)


def followed(
    session: Session, name: str, asked: Stream[EnsureEvent], words: Mapping[str, str] | None = None
) -> list[Told]:
    """Shows how it goes, gives the lease back, prints the paths; what --json prints.

    ``words``: what an outcome is called here, where that is not its own name.
    """
    with _watching(session, name) as watch:
        ready = ready_of(asked, watch)
    _release(session, ready.lease.id)
    told = answers(ready, hub_directory(None, {}, ready.hub_dir))
    for answer in told:
        outcome = (words or {}).get(answer.outcome, answer.outcome)
        session.say(f"{answer.repo_id}: {outcome}, {format_size(answer.bytes_total)}")
        if not session.json:
            click.echo(answer.path)
    return [answer.as_dict() for answer in told]


def _release(session: Session, lease_id: str) -> None:
    if not lease_id:
        return
    try:
        session.admin.cache.release(lease_id)
    except ModelCacheError as error:
        session.say(f"lease {lease_id} not released, it ends within a minute: {error.message}")


@contextmanager
def _watching(session: Session, name: str) -> Iterator[_Watcher]:
    """Shows progress: bars on a terminal, else a line at each change of phase and when it is time."""
    if not has_bars(session):
        yield _Lines(session, name)
        return
    with bars(session, name) as draw:
        yield lambda progress: draw(
            progress.bytes_done,
            progress.bytes_total,
            describe(progress),
            {file.path: (file.bytes_done, file.bytes_total) for file in progress.files},
        )


class _Lines:
    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self._phase: int | None = None
        self._began = self._said = 0.0

    def __call__(self, progress: cache_pb2.Progress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._began, self._said = progress.phase, now, 0.0
        if now - self._said >= lines_every(now - self._began):
            self._said = now
            self._session.say(f"{self._name}: {describe(progress)}")

"""cachectl export: a cached model as a plain folder, which vLLM loads by its path."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import grpc
from google.protobuf.duration_pb2 import Duration

from modelcache.cachectl.bars import bar
from modelcache.cachectl.session import LocalDiskError, Session, model_argument, short, verb
from modelcache.errors import ModelCacheError
from modelcache.output import hub_directory, ready_of
from modelcache.progress import percent
from modelcache.reasons import Reason
from modelcache.units import format_size
from modelcache.v1 import admin_pb2, cache_pb2, common_pb2

_BLOCK_BYTES = 4 << 20
_LEASE = Duration(seconds=24 * 3600)
"""Released at the end; the longest that a copy may take after which the model may go."""


@click.command("export", epilog="Example: cachectl export Qwen/Qwen2.5-7B-Instruct /srv/qwen")
@click.argument("model", metavar="MODEL[@REV]", type=model_argument)
@click.argument("target", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--hub-dir", metavar="DIR", help="Where hub/ is for this process.")
@verb
def export(session: Session, model: common_pb2.ModelReference, target: Path, hub_dir: str | None) -> None:
    """Copy a cached model into a new plain folder, each file checked against its digest while it is read.

    The folder appears when it is whole; what is broken off leaves nothing. The model is leased meanwhile.
    """
    if os.path.lexists(target):
        raise click.UsageError(f"{target} is there already: export makes a new folder")
    detail = session.admin.describe(model)
    files = [file for file in detail.files if file.cached]
    with _leased(session, detail) as daemons_own:
        hub = Path(hub_directory(hub_dir, dict(os.environ), daemons_own).path)
        source = hub / detail.model.path
        if not source.is_dir():
            raise click.UsageError(f"{source} is not there for this process: give --hub-dir")
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            _copy_all(session, source, part, files)
            part.rename(target)
        except OSError as error:
            raise LocalDiskError(f"cannot copy to {target}: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    size = sum(file.size_bytes for file in files)
    if session.json:
        told = {"path": str(target.absolute()), "commit": detail.model.commit, "files": len(files), "bytes": size}
        session.print_json(told)
    else:
        click.echo(target.absolute())
        session.say(f"{len(files)} files, {format_size(size)}, each as its digest says")


@contextmanager
def _leased(session: Session, detail: admin_pb2.DescribeModelResponse) -> Iterator[str]:
    """Nobody evicts it meanwhile; the daemon's own path of hub/. By commit, so that nothing is asked of the Hub."""
    model = detail.model
    profiles = [each.wanted for each in detail.selections if each.HasField("wanted")]
    if not profiles:
        name = f"{model.repo_id}@{short(model.commit)}"
        raise click.UsageError(f"{name} was not fetched by the daemon and is not verified: cachectl pull it first")
    wanted = common_pb2.ModelReference(repo_id=model.repo_id, revision=model.commit, profile=profiles[0])
    lease = cache_pb2.LeaseRequest(holder="cachectl export", ttl=_LEASE)
    ready = ready_of(session.admin.cache.ensure(wanted, lease=lease))
    try:
        yield ready.hub_dir
    finally:
        session.admin.cache.release(ready.lease.id)


def _copy_all(session: Session, source: Path, target: Path, files: list[admin_pb2.ModelFile]) -> None:
    total, done = sum(file.size_bytes for file in files), 0
    with bar(session) as draw:
        for file in files:
            (target / file.path).parent.mkdir(parents=True, exist_ok=True)
            for size in _copy(source / file.path, target / file.path, file):
                done += size
                draw(done, total, f"{percent(done, total)} % of {format_size(total)}  {file.path}")


def _copy(source: Path, target: Path, file: admin_pb2.ModelFile) -> Iterator[int]:
    """Block by block; raises where it is not what its digest says."""
    algorithm, _, wanted = file.digest.partition(":")
    hasher = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(usedforsecurity=False)
    if algorithm != "sha256":
        hasher.update(b"blob %d\0" % file.size_bytes)  # git hash-object
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            hasher.update(block)
            writing.write(block)
            yield len(block)
        writing.flush()
        os.fsync(writing.fileno())
    if hasher.hexdigest() != wanted:
        message = f"{file.path} is not what its digest says ({file.digest[:19]})"
        mend = {"mend": "cachectl verify --repair fetches it again"}
        raise ModelCacheError(grpc.StatusCode.DATA_LOSS, Reason.DIGEST_MISMATCH.value, message, mend)

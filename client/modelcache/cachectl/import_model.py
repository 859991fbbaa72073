"""cachectl import: a model that lies on the node already, into the cache."""

from __future__ import annotations

from pathlib import Path

import click
from google.protobuf.duration_pb2 import Duration

from modelcache.cachectl.pull import LEASE_SECONDS, followed
from modelcache.cachectl.session import Session, model_argument, spelt, verb
from modelcache.client import reference
from modelcache.v1 import cache_pb2, common_pb2


@click.command("import", epilog="Example: cachectl import ~/.cache/huggingface Qwen/Qwen2.5-7B-Instruct")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("model", metavar="MODEL[@REV]", type=model_argument)
@click.option("--profile", metavar="P", default="", help="vllm (default), transformers, full or gguf:<quant>.")
@click.option("--include", metavar="GLOB", multiple=True, help="Instead of a profile; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Instead of a profile; may be repeated.")
@verb
def import_model(
    session: Session,
    folder: Path,
    model: common_pb2.ModelReference,
    profile: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Copy a model into the cache from a plain folder, or from a cache of huggingface_hub's.

    The Hub says what the model is; its files come from FOLDER, as the daemon sees it, and each is checked against its
    digest. What is broken off goes on from there when it is run again. FOLDER stays as it is.
    """
    if profile and (include or exclude):
        raise click.UsageError("--profile and --include/--exclude exclude each other")
    wanted = reference(model.repo_id, model.revision, profile=profile, include=include, exclude=exclude)
    lease = cache_pb2.LeaseRequest(holder="cachectl import", ttl=Duration(seconds=LEASE_SECONDS))
    asked = session.admin.import_model(str(folder.absolute()), wanted, lease)
    told = followed(session, spelt(model), asked)
    if session.json:
        session.print_json(told)

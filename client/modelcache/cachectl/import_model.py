"""cachectl import: a model that lies on the node already, into the cache."""

from __future__ import annotations

from pathlib import Path

import click
from google.protobuf.duration_pb2 import Duration

from modelcache.cachectl.bars import has_bars
from modelcache.cachectl.evict import DECLINED, agreed
from modelcache.cachectl.pull import LEASE_SECONDS, followed
from modelcache.cachectl.rows import removed_row
from modelcache.cachectl.session import Session, model_argument, spelt, verb
from modelcache.client import reference
from modelcache.units import format_size
from modelcache.v1 import admin_pb2, cache_pb2, common_pb2

_OUTCOMES = {"downloaded": "imported", "hit": "was cached already, the folder was not needed"}


@click.command("import", epilog="Example: cachectl import ~/.cache/huggingface Qwen/Qwen2.5-7B-Instruct")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("model", metavar="MODEL[@REV]", type=model_argument)
@click.option("--profile", metavar="P", default="", help="vllm (default), transformers, full or gguf:<quant>.")
@click.option("--include", metavar="GLOB", multiple=True, help="Instead of a profile; may be repeated.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Instead of a profile; may be repeated.")
@click.option("--move", is_flag=True, help="Remove from FOLDER what the cache has then.")
@click.option("--yes", "-y", is_flag=True, help="With --move: do not ask.")
@verb
def import_model(
    session: Session,
    folder: Path,
    model: common_pb2.ModelReference,
    profile: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    move: bool,
    yes: bool,
) -> int:
    """Take a model into the cache from a plain folder, or from a cache of huggingface_hub's.

    The Hub says what the model is; where it is silent, a cache of huggingface_hub's or what `hf download --local-dir`
    made says it itself. A model that the Hub does not know is taken only with hub.offline set.

    The files come from FOLDER, as the daemon sees it, and each is checked against its digest: cloned where the
    filesystem shares blocks, else copied (a file that is the daemon's own and read-only is linked: do not write it any
    more). With --move they are not copied where they lie on the cache's filesystem, and go from FOLDER when the model
    is whole here. Without it FOLDER stays as it is.
    """
    if profile and (include or exclude):
        raise click.UsageError("--profile and --include/--exclude exclude each other")
    wanted = reference(model.repo_id, model.revision, profile=profile, include=include, exclude=exclude)
    lease = cache_pb2.LeaseRequest(holder="cachectl import", ttl=Duration(seconds=LEASE_SECONDS))
    question = f"remove {spelt(model)} from {folder} when it is in the cache?"
    if move and not yes and not agreed(question, ", or leave --move out"):
        session.say("nothing was done")
        return DECLINED
    removed = admin_pb2.ImportModelResponse()
    asked = session.admin.import_model(
        str(folder.absolute()), wanted, lease, move=move, with_files=has_bars(session), ended=removed.CopyFrom
    )
    told = followed(session, spelt(model), asked, _OUTCOMES)
    if move:
        session.say(f"{folder}: {format_size(removed.removed_bytes)} removed")
    for path in removed.kept_paths:
        session.say(f"{folder}: {path} stays, for it has another content or could not be removed")
    if session.json:
        session.print_json([answer | removed_row(removed) for answer in told])
    return 0

"""cachectl doctor: the checklist that a person would go through, from the daemon's side and from ours."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from google.protobuf.duration_pb2 import Duration
from rich.text import Text

from modelcache.cachectl.rows import finding_row
from modelcache.cachectl.session import Session, model_argument, verb
from modelcache.cachectl.tables import new_table
from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.output import hub_directory, ready_of
from modelcache.reasons import Reason
from modelcache.units import format_rate, printable
from modelcache.v1 import admin_pb2, cache_pb2, common_pb2
from modelcache.words import finding_level_word

SICK = 1
"""Something that users want does not work."""

_OK, _WARNING = admin_pb2.FINDING_LEVEL_OK, admin_pb2.FINDING_LEVEL_WARNING
_FAILURE, _SKIPPED = admin_pb2.FINDING_LEVEL_FAILURE, admin_pb2.FINDING_LEVEL_SKIPPED
_STYLES: dict[int, str] = {_OK: "green", _WARNING: "yellow", _FAILURE: "bold red", _SKIPPED: "dim"}
_TRIED = "*.json"
"""What is fetched to try it: small, and nearly every model has some."""
_LEASE_SECONDS = 60


@click.command("doctor", epilog="Example: cachectl doctor --model Qwen/Qwen2.5-0.5B-Instruct")
@click.option("--model", metavar="REPO", type=model_argument, help="Try access, a download and an offline load of it.")
@verb
def doctor(session: Session, model: common_pb2.ModelReference | None) -> int:
    """Look at directory, disk, sockets, node and Hub; say what is wrong, and what to do.

    With --model its small files (*.json) are really fetched, and read as a workload would; they stay cached. Exits 1
    where something that users want does not work, 69 where no daemon answers.
    """
    found: list[admin_pb2.Finding] = []
    table = new_table("", "CHECK", "WHAT", folds=("WHAT",))
    for finding in _findings(session, model):
        found.append(finding)
        text = Text(printable(finding.text))
        if finding.mend and finding.level != _OK:
            text.append(f"\n-> {printable(finding.mend)}", style="bold")
        word = Text(finding_level_word(finding.level), style=_STYLES.get(finding.level, ""))
        table.add_row(word, Text(printable(finding.check)), text)
    if session.json:
        session.print_json([finding_row(finding) for finding in found])
    else:
        session.out.print(table)
        counts = Counter(finding_level_word(each.level) for each in found)
        session.say(", ".join(f"{count} {word}" for word, count in counts.items()))
    return SICK if any(each.level == _FAILURE for each in found) else 0


def _findings(session: Session, model: common_pb2.ModelReference | None) -> Iterator[admin_pb2.Finding]:
    with session.admin.diagnose(model.repo_id if model is not None else "") as stream:
        yield from stream
    if model is None:
        what = "no model was named, so that none was fetched"
        yield admin_pb2.Finding(level=_SKIPPED, check="download", text=what, mend="give --model REPO")
        return
    yield from _download(session, model)


def _download(session: Session, model: common_pb2.ModelReference) -> Iterator[admin_pb2.Finding]:
    wanted = reference(model.repo_id, model.revision, include=[_TRIED])
    lease = cache_pb2.LeaseRequest(holder="cachectl doctor", ttl=Duration(seconds=_LEASE_SECONDS))
    began = time.monotonic()
    try:
        ready = ready_of(session.admin.cache.ensure(wanted, lease=lease))
        session.admin.cache.release(ready.lease.id)
    except ModelCacheError as error:
        level = _SKIPPED if error.reason == Reason.EMPTY_SELECTION else _FAILURE  # a repository of GGUF files alone
        text = error.message.removesuffix(f"; {error.mend}")  # which stands below it
        yield admin_pb2.Finding(level=level, check="download", text=text, mend=error.mend)
        return
    (served,) = ready.models
    seconds = time.monotonic() - began
    how = f"{served.bytes_fetched} bytes fetched in {seconds:.1f} s" if served.bytes_fetched else "it was all cached"
    yield admin_pb2.Finding(level=_OK, check="download", text=f"{model.repo_id}: {how}")
    yield _load(Path(hub_directory(None, {}, ready.hub_dir).path), served)


@dataclass(frozen=True)
class _Loaded:
    files: int
    size_bytes: int
    seconds: float


def _load(hub: Path, served: common_pb2.ReadyModel) -> admin_pb2.Finding:
    """As a workload does without a network: by repository and branch, through the links."""
    if not hub.is_dir():
        text = f"{hub} is not there for this process: ask where it is mounted"
        return admin_pb2.Finding(level=_SKIPPED, check="offline load", text=text)
    try:
        loaded = _read(hub, served)
    except (OSError, ValueError) as error:
        mend = "cachectl verify --repair, and look at its permissions"
        return admin_pb2.Finding(level=_FAILURE, check="offline load", text=f"{served.path}: {error}", mend=mend)
    rate = format_rate(loaded.size_bytes / loaded.seconds)
    text = f"{loaded.files} files read through {hub} without the Hub, at {rate}"
    return admin_pb2.Finding(level=_OK, check="offline load", text=text)


def _read(hub: Path, served: common_pb2.ReadyModel) -> _Loaded:
    """Raises OSError, or ValueError for what is no JSON."""
    began = time.monotonic()
    snapshot = hub / served.path
    ref = snapshot.parent.parent / "refs" / served.revision
    if ref.exists() and ref.read_text() != served.commit:
        raise ValueError(f"{ref} says {ref.read_text()!r}, not {served.commit}")
    files = size = 0
    for directory, _, names in os.walk(snapshot):
        for name in names:
            if name.endswith(".json"):
                content = Path(directory, name).read_bytes()
                if name == "config.json":
                    json.loads(content)
                files, size = files + 1, size + len(content)
    if not files:
        raise ValueError("holds no file")
    return _Loaded(files, size, max(1e-6, time.monotonic() - began))

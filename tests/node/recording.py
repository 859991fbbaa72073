"""The daemon with a scribe beside its ledger: who used and kept what, in which order, and what was chosen to go.

``python recording.py FILE SECONDS [modelcached's arguments]``: a line of JSON for each thing that decides, in the order
in which the event loop did it. A choice is written with what the daemon believed then of its snapshots and blobs.
Unfinished blobs that nobody wants any more are looked for every so many SECONDS.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelcached import main
from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.ledger.leases import Lease
from modelcached.ledger.space import Amount
from modelcached.ledger.use import Pin, UseLedger
from modelcached.ledger.victims import Name, Victim
from modelcached.model import Commit, RepoId, Revision, SnapshotId
from modelcached.store.index import Snapshot, SnapshotState
from modelcached.upkeep import loops


def recording(file: Path, leftover_seconds: float = loops.LEFTOVER_SECONDS) -> list[str]:
    """The command, for ``Node.program``."""
    return [sys.executable, __file__, str(file), str(leftover_seconds)]


class _Scribe:
    def __init__(self, file: str) -> None:
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115 - as long as the process
        self._numbers = itertools.count()

    def note(self, event: str, **said: Any) -> None:
        self._file.write(json.dumps({"event": event, **said}) + "\n")
        self._file.flush()

    def number(self) -> int:
        return next(self._numbers)


def _before(owner: Any, name: str, tell: Callable[..., None]) -> None:
    """``tell`` is called with what the method is called with, just before it."""
    method = getattr(owner, name)

    def told(*arguments: Any, **named: Any) -> Any:
        tell(*arguments, **named)
        return method(*arguments, **named)

    setattr(owner, name, told)


def _listen(scribe: _Scribe) -> None:
    def lease(_: UseLedger, lease: Lease) -> None:
        models = [[*model.snapshot, model.revision] for model in lease.models]
        scribe.note("lease", id=lease.id, models=models)

    def named(_: UseLedger, repo_id: RepoId, revision: Revision, commit: Commit) -> None:
        scribe.note("named", repo=repo_id, revision=revision, commit=commit)

    def pin(event: str) -> Callable[[UseLedger, Pin], None]:
        return lambda _, pin: scribe.note(event, repo=pin.repo_id, revision=pin.revision, owner=pin.owner.value)

    def condemned(_: Core, ids: Iterable[SnapshotId], reason: str) -> None:
        scribe.note("condemned", snapshots=[list(snapshot) for snapshot in ids], reason=reason)

    _before(UseLedger, "touch", lambda _, snapshot: scribe.note("used", snapshot=list(snapshot)))
    _before(UseLedger, "forget", lambda _, snapshot: scribe.note("forgotten", snapshot=list(snapshot)))
    _before(UseLedger, "named", named)
    _before(UseLedger, "_enter", lease)
    _before(UseLedger, "drop", lambda _, lease_id: scribe.note("ended", id=lease_id))
    _before(UseLedger, "pin", pin("pinned"))
    _before(UseLedger, "unpin", pin("unpinned"))
    _before(eviction, "condemn", condemned)
    loops.condemn = eviction.condemn

    hold = UseLedger.hold

    @contextmanager
    def held(ledger: UseLedger, snapshots: Iterable[SnapshotId], names: frozenset[Name]) -> Iterator[None]:
        snapshots, number = list(snapshots), scribe.number()
        listed = [[name.repo_id, name.digest.hex] for name in names]
        scribe.note("held", number=number, snapshots=[list(snapshot) for snapshot in snapshots], names=listed)
        try:
            with hold(ledger, snapshots, names):
                yield
        finally:
            scribe.note("let go", number=number)

    UseLedger.hold = held  # type: ignore[method-assign]

    plan = eviction.plan

    def planned(core: Core, wanted: Amount, among: Iterable[Snapshot] | None = None) -> tuple[list[Victim], Amount]:
        victims, freed = plan(core, wanted, among)
        chosen = [list(victim.id) for victim in victims]
        said = {"wanted": wanted.size_bytes, "freed": freed.size_bytes, "victims": chosen}
        scribe.note("planned", **said, **_believed(core))
        return victims, freed

    eviction.plan = planned
    loops.plan = planned


def _believed(core: Core) -> dict[str, Any]:
    """Snapshots that are not going, refs, and what lies behind each name of a blob."""
    snapshots = [snapshot for snapshot in core.index.snapshots() if snapshot.state is not SnapshotState.CONDEMNED]
    return {
        "refs": [[repo_id, *ref] for repo_id, refs in core.refs().items() for ref in refs.items()],
        "snapshots": [[*s.id, {path: digest.hex for path, digest in s.links.items()}] for s in snapshots],
        "blobs": [
            [repo_id, digest.hex, blob.inode, blob.allocated_bytes, blob.link_count]
            for repo_id, repo in core.index.repos.items()
            for digest, blob in repo.blobs.items()
        ],
    }


def _run(file: str, leftover_seconds: float, arguments: Sequence[str]) -> int:
    loops.LEFTOVER_SECONDS = leftover_seconds
    _listen(_Scribe(file))
    return main.main(arguments)


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))

"""I5 and I8: a start may itself be killed before any call, whatever it recovers from; the next one does it all.

Each death of a protocol is recovered from, and each call of each recovery is a point. Recoveries that begin with the
same calls are killed there once: what else there is on the disk they do not touch. Behind a call that changed nothing
(a sync, a directory that was not empty) the state is the one before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .points import Checks, deaths, is_sync
from .zygote import Zygote


@pytest.mark.parametrize(
    "name",
    [
        "ensure",
        "ensure with links",
        "growth",
        "eviction that moves a branch back",
        "eviction of a repository's last",
    ],
)
def test_a_kill_in_a_recovery_is_recovered_from(
    zygote: Zygote,
    base: Callable[[str, Path], Path],
    memory: Path,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    checks, recoveries = Checks(zygote, name), set[tuple[str, ...]]()
    for point in deaths(zygote, name, base(name, memory), memory):
        whole = memory / f"{point.at}-whole"
        calls = zygote.run("start_and_die", source=str(point.cache_dir), cache_dir=str(whole)).told
        changes = [
            not is_sync(call) and not (call.startswith("rmdir") and (whole / call[6:]).exists()) for call in calls
        ]
        shutil.rmtree(whole)
        for at in range(1, len(calls) + 1):
            if tuple(calls[:at]) in recoveries or (at > 1 and not changes[at - 2]):
                continue
            recoveries.add(tuple(calls[:at]))
            again = memory / f"{point.at}-{at}"
            died = zygote.run("start_and_die", source=str(point.cache_dir), cache_dir=str(again), at=at)
            assert died.told == calls[: at - 1]
            where = f"call {point.at}: {point.call}, and in the recovery before {calls[at - 1]}"
            checks.add(again, where, ended=point.ended)
        shutil.rmtree(point.cache_dir)
    checks.finish()
    record_property("count", f"crash points, recovery from {name}: {checks.count}")

"""I1, I5 and I8 after a power loss: what nobody synced is gone, and nothing that is left lies or is wrongly believed.

The machine loses its power before any call that can make a difference; the next daemon runs in another boot. See
power.py for what a disk may leave. A disk that keeps only what was synced leaves something new behind each sync. One
that writes back more than it was asked for leaves something new that could lie behind each call by which something
is shown, hidden or trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .points import Checks, calls_of, is_sync
from .power import WAYS
from .world import FIRST, LARGE_BYTES, PART_BYTES
from .zygote import Zygote

SHOWS = re.compile(r"(rename|exchange|link|rmdir|mkdir hub|unlink (?!modelcached/staging)|the start)")
LARGE = FIRST.digest("model.safetensors").hex


def ways_at(calls: list[str], at: int) -> tuple[str, ...]:
    """What is tried when the power goes just before call ``at`` (from 1)."""
    if at > len(calls):
        return WAYS
    before = calls[at - 2] if at > 1 else "the start"
    if is_sync(before):
        return ("bare", "ordered")
    if before.startswith("append ") and before.endswith(".journal"):
        return ("named", "small")
    return ("named", "scattered") if SHOWS.match(before) else ()


def promised(calls: Sequence[str]) -> int:
    """Bytes of the large blob that outlive a power loss, by the protocol that journal.py tells of.

    Ranges whose data was synced before the journal that speaks of it, which has a name on the disk.
    """
    data = f"modelcached/partial/{LARGE}"
    parts, marked, durable, named, header, checkpoint = 0, 0, 0, False, False, False
    for call in calls:
        if call == f"append {data}.journal":
            parts += header and not checkpoint
            header, checkpoint = True, False
        elif call == f"fdatasync {data}":
            marked, checkpoint = parts, True
        elif call == f"fdatasync {data}.journal":
            durable = marked
        elif call == "fsync modelcached/partial":
            named = True
    return min(durable * PART_BYTES, LARGE_BYTES) if named else 0


def test_what_a_checkpoint_promises_outlives_a_power_loss(
    zygote: Zygote, base: Callable[[str, Path], Path], memory: Path
) -> None:
    """In whichever way the disk forgets; and a long file is promised piece by piece, not at its end."""
    source = base("ensure", memory)
    calls = calls_of(zygote, "ensure", source, memory)
    checks, promises = Checks(zygote, "ensure", lost_power=True), []
    previous = 0
    for at in range(1, len(calls) + 1):
        if (promise := promised(calls[: at - 1])) > previous:
            for way in WAYS:
                work = memory / f"{at}-{way}"
                zygote.run("act_on_forgetful_disk", name="ensure", source=str(source), work=str(work), at=at, way=way)
                checks.add(work / "cache", f"call {at}: {calls[at - 1]} ({way})", ended=False)
                promises.append(promise)
            previous = promise
    checks.finish()
    assert [kept[LARGE] for kept in checks.kept] == promises
    assert len(set(promises)) >= 2
    assert max(promises) == LARGE_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "first start",
        "ensure",
        "ensure that was broken off",
        "ensure with links",
        "growth",
        "eviction that moves a branch back",
        "eviction of a repository's last",
        "repair",
        "scrub of what is in use",
    ],
)
def test_a_power_loss_before_any_call_leaves_nothing_that_lies(
    zygote: Zygote,
    base: Callable[[str, Path], Path],
    memory: Path,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    source = base(name, memory)
    calls = calls_of(zygote, name, source, memory)
    checks = Checks(zygote, name, lost_power=True)
    for at in range(1, len(calls) + 2):
        ended = at > len(calls)
        for way in ways_at(calls, at):
            work = memory / f"{at}-{way}"
            died = zygote.run("act_on_forgetful_disk", name=name, source=str(source), work=str(work), at=at, way=way)
            assert died.told == calls[: at - 1], "the calls come in the same order in every run"
            checks.add(work / "cache", f"call {at}: {[*calls, 'the end'][at - 1]} ({way})", ended=ended)
    checks.finish()
    record_property("count", f"power losses, {name}: {checks.count}")

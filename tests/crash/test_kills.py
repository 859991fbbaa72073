"""I1, I5 and I8: a daemon that is killed before any call that changes the disk leaves nothing wrong and nothing behind.

Every call is a point: the process dies just before it, another one starts over what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .points import Checks, deaths
from .protocols import PROTOCOLS
from .zygote import Zygote


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_kill_before_any_call_leaves_nothing_wrong_and_nothing_behind(
    zygote: Zygote,
    base: Callable[[str, Path], Path],
    memory: Path,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    checks = Checks(zygote, name)
    for point in deaths(zygote, name, base(name, memory), memory):
        checks.add(point.cache_dir, f"call {point.at}: {point.call}", ended=point.ended)
    checks.finish()
    record_property("count", f"crash points, {name}: {checks.count}")

"""I1 to I5 and I8 after whatever may happen to a cache, in any order: the real one against a plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.machine import RULES, CacheMachine, Tally

LEAST_FIRED = 200
STEPS_OF_ONE = 60
MACHINES_A_ROUND = 40
LEAST_COMPARED = 0.01
"""Victims that a plain LRU was compared on, for each step."""


def run(number: int, tally: Tally, machines: int, only: frozenset[str] = frozenset()) -> None:
    """So many cache directories, each from empty."""
    machine = seed(number)(type("CacheMachine", (CacheMachine,), {"tally": tally, "only": only}))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=machines,
            stateful_step_count=STEPS_OF_ONE,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )


@pytest.mark.timeout(3600)
def test_invariants_hold_whatever_happens(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None], errors: list[str]
) -> None:
    """As many steps as were asked for, the same ones each time; and then those that came too seldom."""
    wanted = request.config.getoption("--property-steps")
    number = request.config.getoption("--property-seed") * 1_000_000
    least = LEAST_FIRED if wanted >= 10_000 else 1
    tally = Tally()
    while tally.steps < wanted:
        number += 1
        run(number, tally, MACHINES_A_ROUND)
    while lacking := {name for name in RULES if tally.fired[name] < least}:
        number += 1
        run(number, tally, MACHINES_A_ROUND // 4, frozenset(lacking | {"ensure_something"}))
    fired = [f"{count:7} {name}" for name, count in tally.fired.most_common()]
    seen = [f"{count:7} {name}" for name, count in sorted(tally.seen.items())]
    record_property("count", "\n".join([f"{tally.steps:7} steps, of which", *fired, "        and there were", *seen]))
    assert tally.seen["victims compared"] >= wanted * LEAST_COMPARED
    assert tally.seen["victims that a branch had left"] or wanted < 10_000
    assert not errors

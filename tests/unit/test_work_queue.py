"""The next free connection takes what is wanted most."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from modelcached.model import Algorithm, Digest, RepoId
from modelcached.sources.origin import LocalOrigin, Origin
from modelcached.transfer.flight import LEAD_BYTES, SMALL_BYTES, Flight, Part
from modelcached.transfer.queue import WorkQueue


class BoundedOrigin(LocalOrigin):
    """Of a kind of which two fetches may run."""

    label = "bounded"
    at_once = 2


ANYWHERE = LocalOrigin("/nowhere")
BOUNDED = BoundedOrigin("/nowhere")


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def flight(
    loop: asyncio.AbstractEventLoop,
    number: int,
    *,
    size: int = 1,
    urgent: int = 1,
    parts: int = 1,
    origin: Origin = ANYWHERE,
) -> Flight:
    done: asyncio.Future[os.stat_result] = loop.create_future()
    digest = Digest(Algorithm.SHA256, f"{number:064x}")
    made = Flight(digest, size, RepoId("org/model"), [origin], number, done, urgent=urgent)
    made.pending.extend(Part.of(start, start + 1) for start in range(parts))
    return made


def order(queue: WorkQueue) -> list[int]:
    taken = []
    while (found := queue.pop()) is not None:
        taken.append(found[0].number)
    return taken


def test_urgent_before_background_small_before_large_then_by_arrival(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    for made in (
        flight(loop, 1, urgent=0),
        flight(loop, 2, size=SMALL_BYTES + 1),
        flight(loop, 3, size=SMALL_BYTES),
        flight(loop, 4),
    ):
        queue.push(made)
    assert order(queue) == [3, 4, 2, 1]


def test_a_flight_keeps_its_place_until_all_its_parts_are_taken(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    queue.push(flight(loop, 2, parts=2))
    queue.push(flight(loop, 1, parts=3))
    assert order(queue) == [1, 1, 1, 2, 2]


def test_a_change_of_urgency_moves_it_and_takes_no_part_twice(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    first, second = flight(loop, 1, parts=2), flight(loop, 2, parts=2, urgent=0)
    queue.push(first)
    queue.push(second)
    first.urgent, second.urgent = 0, 1
    queue.push(first)
    queue.push(second)
    assert order(queue) == [2, 2, 1, 1]


def test_an_aborted_flight_is_passed_over_and_may_come_back(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    first, second = flight(loop, 1), flight(loop, 2)
    queue.push(first)
    queue.push(second)
    first.abort()
    assert order(queue) == [2]
    first.pending.append(Part.of(0, 1))
    queue.push(first)
    assert order(queue) == [1]


def test_an_origin_that_bounds_itself_waits_its_turn_and_holds_nobody(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    queue.push(flight(loop, 1, parts=3, origin=BOUNDED))
    queue.push(flight(loop, 2, origin=BOUNDED))
    queue.push(flight(loop, 3))
    assert order(queue) == [1, 1, 3]
    assert queue.over(BOUNDED)
    assert order(queue) == [1]
    assert not queue.over(ANYWHERE)
    queue.over(BOUNDED)
    assert order(queue) == [2]


def test_a_flight_that_changes_its_origin_waits_no_longer(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    queue.push(flight(loop, 1, parts=2, origin=BOUNDED))
    moved = flight(loop, 2, origin=BOUNDED)
    queue.push(moved)
    assert order(queue) == [1, 1]
    moved.origins = [ANYWHERE]
    queue.push(moved)
    assert order(queue) == [2]


def test_fetching_waits_for_hashing_that_fell_behind_and_others_go_on(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    ahead, other = flight(loop, 1, parts=2), flight(loop, 2)
    ahead.ranges.add(0, LEAD_BYTES + 1)
    queue.push(ahead)
    queue.push(other)
    assert order(queue) == [2]
    ahead.hash_reached(1)
    queue.push(ahead)
    assert order(queue) == [1, 1]


def test_what_an_earlier_try_left_unhashed_holds_nothing_up(loop: asyncio.AbstractEventLoop) -> None:
    """A hundred gigabytes take a minute to hash, in which the network can bring more."""
    queue = WorkQueue()
    resumed = flight(loop, 1, size=4 * LEAD_BYTES)
    resumed.ranges.add(0, 3 * LEAD_BYTES)
    resumed.plan()
    queue.push(resumed)
    assert set(order(queue)) == {1}
    resumed.hash_reached(3 * LEAD_BYTES - 1)
    assert resumed.level


def test_a_flight_that_nobody_with_a_turn_wants_is_passed_over(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    parked, shared = flight(loop, 1), flight(loop, 2)
    parked.interest = parked.parked = 1
    shared.interest, shared.parked = 2, 1
    for made in (parked, shared):
        queue.push(made)
    assert order(queue) == [2]
    shared.pending.extend([Part.of(1, 2)])
    queue.push(shared)
    shared.parked = 2  # while its parts wait
    assert order(queue) == []
    for made in (parked, shared):
        made.parked = 0
        queue.push(made)
    assert order(queue) == [1, 2]


def test_files_that_came_together_share_the_connections_and_later_ones_wait(loop: asyncio.AbstractEventLoop) -> None:
    queue = WorkQueue()
    first, second, later = (flight(loop, number, parts=2, size=SMALL_BYTES + 1) for number in (1, 2, 3))
    later.batch = 1
    for made in (later, second, first):
        queue.push(made)
    taken = []
    while (found := queue.pop()) is not None:
        chosen, part = found
        chosen.active[id(part)] = part
        queue.push(chosen)
        taken.append(chosen.number)
    assert taken == [1, 2, 1, 2, 3, 3]

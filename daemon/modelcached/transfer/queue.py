"""Which flight gets the next free connection, in logarithmic time: ten thousand small files wait at once."""

from __future__ import annotations

import heapq

from modelcached.transfer.flight import SMALL_BYTES, Flight, Part

_Place = tuple[bool, bool, int]


def _place(flight: Flight) -> _Place:
    """Waited for before background, small before large (an error in a config shows early), then by arrival."""
    return flight.urgent == 0, flight.size_bytes > SMALL_BYTES, flight.number


class WorkQueue:
    """Flights that have parts to fetch. The event loop's alone."""

    def __init__(self) -> None:
        self._heap: list[tuple[_Place, Flight]] = []

    def push(self, flight: Flight) -> None:
        """The flight has parts, or its place has changed; an entry that is out of date is passed over later."""
        if flight.pending:
            heapq.heappush(self._heap, (_place(flight), flight))

    def pop(self) -> tuple[Flight, Part] | None:
        """The part that is wanted most."""
        while self._heap:
            place, flight = self._heap[0]
            if flight.pending and place == _place(flight):
                return flight, flight.pending.popleft()
            heapq.heappop(self._heap)
        return None

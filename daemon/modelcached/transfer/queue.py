"""Which flight gets the next free connection, in logarithmic time: ten thousand small files wait at once."""

from __future__ import annotations

import heapq
from collections import Counter

from modelcached.sources.origin import Origin
from modelcached.transfer.flight import SMALL_BYTES, Flight, Part

_Place = tuple[bool, bool, int, int, int]


def _place(flight: Flight) -> _Place:
    """Waited for before background, small before large (an error in a config shows early), then by arrival.

    Of large files that came together the one that has fewest connections: two writers of one file wait for each other
    in the kernel, spinning, and two files are hashed by two threads.
    """
    return flight.urgent == 0, flight.size_bytes > SMALL_BYTES, flight.batch, len(flight.active), flight.number


class WorkQueue:
    """Flights that have parts to fetch, by the kind of their origin. The event loop's alone."""

    def __init__(self) -> None:
        self._heaps: dict[str, list[tuple[_Place, Flight]]] = {}
        self._running: Counter[str] = Counter()
        """Fetches under way, of those origins that bound them."""

    def push(self, flight: Flight) -> None:
        """The flight has parts, may go on, or its place has changed; an entry that is out of date is passed over."""
        if flight.has_work:
            heapq.heappush(self._heaps.setdefault(flight.origin.label, []), (_place(flight), flight))

    def pop(self) -> tuple[Flight, Part] | None:
        """The part that is wanted most of those whose turn it may be; say ``over`` when it is."""
        tops = [top for label in self._heaps if (top := self._top(label)) is not None]
        if not tops:
            return None
        _, flight = min(tops)
        if flight.origin.at_once is not None:
            self._running[flight.origin.label] += 1
        return flight, flight.pending.popleft()

    def over(self, origin: Origin) -> bool:
        """A fetch from the origin has ended; whether others may have waited for that."""
        if origin.at_once is None:
            return False
        self._running[origin.label] -= 1
        return True

    def _top(self, label: str) -> tuple[_Place, Flight] | None:
        heap = self._heaps[label]
        while heap:
            place, flight = heap[0]
            if flight.has_work and place == _place(flight) and flight.origin.label == label:
                most = flight.origin.at_once
                return heap[0] if most is None or self._running[label] < most else None
            heapq.heappop(heap)
        return None

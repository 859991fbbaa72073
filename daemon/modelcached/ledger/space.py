"""Bytes and inodes: what is used, promised, left. Bookkeeping alone; deleting is somebody else's.

``used`` is what du sees: allocated blocks, once per inode, in named areas that
are measured anew when something in them changed. Because areas hold inodes and
not sums, a file that moves from one to another is never counted twice.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Amount:
    """Of a disk: what somebody wants of it, or what would be given back."""

    size_bytes: int = 0
    inodes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.size_bytes + other.size_bytes, self.inodes + other.inodes)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.size_bytes - other.size_bytes, self.inodes - other.inodes)

    def covers(self, wanted: Amount) -> bool:
        """It is enough, in both."""
        return self.size_bytes >= wanted.size_bytes and self.inodes >= wanted.inodes


NOTHING = Amount()


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows."""

    budget_bytes: int
    min_free_bytes: int
    set_aside_bytes: int = 0
    """Kept out of every promise: what the daemon's own files may grow by without asking."""
    min_free_inodes: int = 0


@dataclass(slots=True, eq=False)
class Reservation:
    """Bytes and inodes promised to one request and not yet taken."""

    space: Space
    remaining_bytes: int
    holder: str
    number: int
    remaining_inodes: int = 0

    def spend(self, size_bytes: int) -> None:
        """Some of it is on the disk now and counted as used."""
        self._shrink(max(0, min(size_bytes, self.remaining_bytes)), 0)

    def spend_inodes(self) -> None:
        """Its files are made."""
        self._shrink(0, self.remaining_inodes)

    def split(self, part: Amount) -> Reservation:
        """A part of it with a life of its own: a transfer may outlive the request that promised its bytes."""
        made = self.space.reserve(NOTHING, self.holder)
        made.remaining_bytes = min(part.size_bytes, self.remaining_bytes)
        made.remaining_inodes = min(part.inodes, self.remaining_inodes)
        self.remaining_bytes -= made.remaining_bytes
        self.remaining_inodes -= made.remaining_inodes
        return made

    def release(self) -> None:
        """Gives back what was not spent. May be called again."""
        self._shrink(self.remaining_bytes, self.remaining_inodes)
        self.space.forget(self)

    def _shrink(self, size_bytes: int, inodes: int) -> None:
        self.remaining_bytes -= size_bytes
        self.remaining_inodes -= inodes
        self.space.reserved_bytes -= size_bytes
        self.space.reserved_inodes -= inodes
        if size_bytes or inodes:
            self.space.freed()


@dataclass(slots=True)
class Space:
    """The account of one cache."""

    limits: Limits
    used_bytes: int = 0
    reserved_bytes: int = 0
    reserved_inodes: int = 0
    _areas: dict[str, dict[int, int]] = field(default_factory=dict)
    _inodes: dict[int, int] = field(default_factory=dict)  # inode -> bytes
    _several: dict[int, int] = field(default_factory=dict)  # inode -> areas that have it, where that is more than one
    _added: dict[str, dict[int, int]] = field(default_factory=dict)  # since a look at that area began
    _reservations: dict[int, Reservation] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    freed: Callable[[], None] = lambda: None
    """Called in the step in which less is used or promised."""

    def begin_look(self, name: str) -> None:
        """Somebody begins to measure the area: what is added until then is not lost to an older look."""
        self._added[name] = {}

    def set_area(self, name: str, sizes: dict[int, int], *, keep: bool = False) -> None:
        """What the area holds now: allocated bytes by inode. Empty forgets the area.

        ``keep``: not all of it could be seen, so what was there before counts on.
        """
        sizes = {**(self._areas.get(name, {}) if keep else {}), **sizes, **self._added.pop(name, {})}
        used = self.used_bytes
        self._replace(name, sizes)
        if self.used_bytes < used:
            self.freed()

    def _replace(self, name: str, sizes: dict[int, int]) -> None:
        for inode in self._areas.pop(name, {}):
            self._leave(inode)
        if not sizes:
            return
        self._areas[name] = sizes
        if self._inodes.keys().isdisjoint(sizes):  # as nearly always at the start, when there are a hundred thousand
            self._inodes |= sizes
            self.used_bytes += sum(sizes.values())
            return
        for inode, size in sizes.items():
            self._enter(inode, size)

    def add(self, name: str, inode: int, size_bytes: int) -> None:
        """One more inode in the area, until it is measured again."""
        if (added := self._added.get(name)) is not None:
            added[inode] = size_bytes
        area = self._areas.setdefault(name, {})
        if inode in area:
            self._leave(inode)
        area[inode] = size_bytes
        self._enter(inode, size_bytes)

    def _enter(self, inode: int, size_bytes: int) -> None:
        before = self._inodes.get(inode)
        if before is not None:
            self._several[inode] = self._several.get(inode, 1) + 1
        self._inodes[inode] = size_bytes
        self.used_bytes += size_bytes - (before or 0)

    def _leave(self, inode: int) -> None:
        areas = self._several.pop(inode, 1)
        if areas == 1:
            self.used_bytes -= self._inodes.pop(inode)
        elif areas > 2:
            self._several[inode] = areas - 1

    def area_bytes(self, name: str) -> int:
        """What du sees of that area alone."""
        return sum(self._areas.get(name, {}).values())

    def areas(self) -> list[str]:
        """Names of all areas."""
        return list(self._areas)

    def room_bytes(self, free_bytes: int) -> int:
        """What can still be promised; negative when already over.

        ``free_bytes`` is f_bavail now: what is allocated has left it, what is only promised has not.
        """
        within_budget = self.limits.budget_bytes - self.limits.set_aside_bytes - self.used_bytes - self.reserved_bytes
        within_disk = free_bytes - self.limits.min_free_bytes - self.reserved_bytes
        return min(within_budget, within_disk)

    def room_inodes(self, free_inodes: int | None) -> int:
        """How many files can still be promised; negative when fewer are left than must be.

        ``free_inodes``: of the filesystem now (f_favail), without those that are only promised; None where it makes
        them as they are wanted.
        """
        if free_inodes is None:
            return sys.maxsize
        return free_inodes - self.limits.min_free_inodes - self.reserved_inodes

    def reserve(self, amount: Amount, holder: str) -> Reservation:
        """Promises it; the caller has seen that there is room, in the same step."""
        reservation = Reservation(self, amount.size_bytes, holder, next(self._numbers), amount.inodes)
        self._reservations[reservation.number] = reservation
        self.reserved_bytes += amount.size_bytes
        self.reserved_inodes += amount.inodes
        return reservation

    def forget(self, reservation: Reservation) -> None:
        """Only for Reservation.release."""
        self._reservations.pop(reservation.number, None)

    def reservations(self) -> list[Reservation]:
        """What is promised now, oldest first."""
        return list(self._reservations.values())

"""How much memory the page cache may still take without pushing anybody out: the machine's, and our control group's."""

from __future__ import annotations

import ctypes
import os

PROC = "/proc"
CGROUP = "/sys/fs/cgroup"
_M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20
"""A buffer of this size or more comes from the system and goes back there each time; see ``give_buffers_back``."""


def available_bytes(proc: str = PROC, cgroup: str = CGROUP) -> int:
    """MemAvailable, or less where a control group (v2) of ours has less left below its memory.max. Blocking.

    Page cache is charged to the group that touches it first, so what the daemon reads counts against
    its own limit. What of it was touched once only goes first when memory is wanted, so it counts as available, as it
    does in MemAvailable: else whoever has fetched as much as its limit could never read ahead again. Raises OSError
    where the kernel does not tell.
    """
    machine = _field(f"{proc}/meminfo", "MemAvailable:")
    if machine is None:
        raise OSError(f"{proc}/meminfo has no MemAvailable")
    return min([machine << 10, *_groups(proc, cgroup)])


def give_buffers_back() -> None:
    """Has what is freed of large buffers go back to the system at once, where the C library is glibc.

    By itself (mallopt(3), M_MMAP_THRESHOLD) it keeps what was freed for the next time, up to 32 MiB a buffer: after one
    transfer the daemon has 10 MiB more for ever. The price is that each page of a large buffer is new each time (up to
    a CPU second a GiB on a virtual machine): what is made anew for each piece of a transfer must be smaller.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


def smallest_limit_bytes(proc: str = PROC, cgroup: str = CGROUP) -> int | None:
    """The least memory.max of a control group (v2) of ours; None where there is no limit. Blocking."""
    limits = (number_in(f"{directory}/memory.max") for directory in _directories(proc, cgroup))
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(proc: str, cgroup: str) -> list[int]:
    """What each group from ours to the root has left; none where there is no version 2, or no limit."""
    left = []
    for directory in _directories(proc, cgroup):
        limit, current = number_in(f"{directory}/memory.max"), number_in(f"{directory}/memory.current")
        if limit is not None and current is not None:
            idle = _field(f"{directory}/memory.stat", "inactive_file") or 0
            left.append(max(0, limit - current + idle))
    return left


def _directories(proc: str, cgroup: str) -> list[str]:
    """Of each control group (v2) from the root to ours."""
    try:
        with open(f"{proc}/self/cgroup", encoding="utf-8") as file:
            paths = [line.rstrip("\n")[3:] for line in file if line.startswith("0::")]
    except OSError:
        return []
    found = []
    for path in paths:
        parts = [part for part in path.split("/") if part and part != ".."]
        found += [os.path.join(cgroup, *parts[:depth]) for depth in range(len(parts) + 1)]
    return found


def _field(path: str, name: str) -> int | None:
    """The number behind a name in a file of such lines."""
    with open(path, encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.split()[:1] == [name]), None)


def number_in(path: str) -> int | None:
    """Of a file that the kernel writes; None where the file is not there, or says "max"."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

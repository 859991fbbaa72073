"""How much memory the page cache may still take without pushing anybody out: the machine's, and our control group's."""

from __future__ import annotations

import os

PROC = "/proc"
CGROUP = "/sys/fs/cgroup"


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


def _groups(proc: str, cgroup: str) -> list[int]:
    """What each group from ours to the root has left; none where there is no version 2, or no limit."""
    try:
        with open(f"{proc}/self/cgroup", encoding="utf-8") as file:
            paths = [line.rstrip("\n")[3:] for line in file if line.startswith("0::")]
    except OSError:
        return []
    left = []
    for path in paths:
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            directory = os.path.join(cgroup, *parts[:depth])
            limit, current = _number(f"{directory}/memory.max"), _number(f"{directory}/memory.current")
            if limit is not None and current is not None:
                idle = _field(f"{directory}/memory.stat", "inactive_file") or 0
                left.append(max(0, limit - current + idle))
    return left


def _field(path: str, name: str) -> int | None:
    """The number behind a name in a file of such lines."""
    with open(path, encoding="ascii") as file:
        return next((int(line.split()[1]) for line in file if line.split()[:1] == [name]), None)


def _number(path: str) -> int | None:
    """None where the file is not there, or says "max"."""
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

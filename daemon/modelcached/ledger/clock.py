"""Time as the ledger knows it; replaced in tests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True, slots=True)
class Clock:
    """The machine's clocks."""

    boot_id: str

    @classmethod
    def system(cls) -> Clock:
        """This boot's."""
        return cls(_boot_id())

    def boottime(self) -> float:
        """Seconds since boot, sleep included; never jumps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since the epoch; only ever shown."""
        return time.time()

"""What the figures were measured on, and whether it was quiet."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from tests.bench.measure import tree_cpu_seconds

_SYSTEM_PATHS = "/usr/local/sbin:/usr/sbin:/sbin"
PACKAGES = {"nginx": "nginx-light", "aria2c": "aria2", "curl": "curl", "openssl": "openssl"}
"""Programs that the cases run, and the Debian packages that have them."""


def program(name: str) -> str | None:
    """Where a program lies; servers lie outside an ordinary user's PATH."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM_PATHS)


def missing_packages() -> list[str]:
    """Debian packages to install before anything can be measured."""
    return [package for name, package in PACKAGES.items() if program(name) is None]


def describe(directory: Path) -> dict[str, str]:
    """Machine, filesystem and versions, by name."""
    memory = psutil.virtual_memory().total / 2**30
    about = {
        "CPU": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "filesystem": _output("stat", "-f", "-c", "%T", str(directory)),
        "python": platform.python_version(),
    }
    for name in ("modelcached", "grpcio", "protobuf", "huggingface_hub", "hf_xet"):
        about[name] = importlib.metadata.version(name)
    nginx = program("nginx") or "nginx"
    about["nginx"] = _output(nginx, "-v").rpartition("/")[2]
    about["curl"] = _output("curl", "--version").split()[1]
    about["aria2"] = _output("aria2c", "--version").split()[2]
    about["openssl"] = _output("openssl", "version").split()[1]
    about["commit"] = _commit()
    return about


class Neighbours:
    """CPU that went to others than the bench and its children since this was made.

    The kernel's own threads (writing back to the disk) count as others, and so does what a hypervisor took.
    """

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), tree_cpu_seconds(psutil.Process())

    def share(self) -> float:
        """Of all cores' time, 0 to 1."""
        others = _busy_seconds() - self._busy - (tree_cpu_seconds(psutil.Process()) - self._own)
        return max(0.0, others / ((time.monotonic() - self._began) * (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The commit under test; a + says that the tree has changes."""
    root = str(Path(__file__).parents[2])
    return _output("git", "-C", root, "describe", "--always", "--abbrev=12", "--dirty=+") or "unknown"


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""

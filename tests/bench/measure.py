"""How a contender is measured: wall time, CPU of the whole process tree, memory above idle; and the disk before it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_SAMPLE_SECONDS = 0.02
_LIMIT_SECONDS = 3600.0
"""A peer that hangs (huggingface_hub has calls without a timeout) is killed, and the run fails."""
_WRITE_BYTES = 8 << 20
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LEFT_BYTES = 1 << 30
_FILLER_BYTES = 8 << 40


class ContenderError(Exception):
    """A contender failed, or what it delivered is not right: its time means nothing."""


@dataclass(frozen=True)
class Usage:
    """What one or several processes took. CPU counts every process of the tree that has ended."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Most resident memory of the tree at one moment, from samples 20 ms apart."""
    stdout: str = ""

    def __add__(self, then: Usage) -> Usage:
        """One after the other."""
        return Usage(
            self.seconds + then.seconds,
            self.cpu_seconds + then.cpu_seconds,
            max(self.peak_bytes, then.peak_bytes),
            self.stdout + then.stdout,
        )


class MemoryWatch:
    """Samples the resident memory of a process and all below it, until left.

    Not ru_maxrss: an exec'd child inherits its parent's high-water mark, so that curl would show our own.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self.idle_bytes = resident_bytes(pid)
        self.peak_bytes = self.idle_bytes
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def above_idle_bytes(self) -> int:
        """The peak less what was resident when the watch began."""
        return max(0, self.peak_bytes - self.idle_bytes)

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes(self._pid))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process tree; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            total = int(file.read().split()[1]) * _PAGE_BYTES
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                total += sum(resident_bytes(int(child)) for child in file.read().split())
    except (OSError, IndexError):
        return 0
    return total


def tree_cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a living process, its living children and its children that were waited for."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def tree_written_bytes(pid: int) -> int:
    """Bytes that a living process tree has given to write(): how far a download is, whoever makes it."""
    try:
        process = psutil.Process(pid)
        return sum(int(member.io_counters().write_chars) for member in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def start(argv: Sequence[str], environment: Mapping[str, str], directory: Path) -> subprocess.Popen[bytes]:
    """Starts a contender as the leader of a process group of its own."""
    with (directory / "stdout").open("ab") as out, (directory / "stderr").open("ab") as err:
        return subprocess.Popen(
            argv,
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], directory: Path, began: float) -> Usage:
    """Waits for what ``start`` started at ``began`` (perf_counter). Raises ContenderError unless it ends with 0."""
    watchdog = threading.Timer(_LIMIT_SECONDS, kill_group, [process])
    watchdog.start()
    try:
        with MemoryWatch(process.pid) as memory:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
    finally:
        watchdog.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = (directory / "stderr").read_text(errors="replace")[-2000:]
        raise ContenderError(f"{process.args!r} ended with {process.returncode}:\n{said}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, memory.peak_bytes, (directory / "stdout").read_text())


def run(argv: Sequence[str], environment: Mapping[str, str], directory: Path) -> Usage:
    """A whole process, from its start to its end."""
    for stream in ("stdout", "stderr"):
        (directory / stream).unlink(missing_ok=True)
    began = time.perf_counter()
    return finish(start(argv, environment, directory), directory, began)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a contender and everything that it started."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


def sync(directory: Path) -> float:
    """`sync -f DIRECTORY`; the seconds that it took."""
    began = time.perf_counter()
    subprocess.run(["sync", "-f", str(directory)], check=True)
    return time.perf_counter() - began


def touch_disk(directory: Path, size_bytes: int) -> None:
    """Writes and removes that much, so that no contender is the first to use a block of a thin disk."""
    file = directory / "touched"
    block = os.urandom(_WRITE_BYTES)
    with file.open("wb", buffering=0) as out:
        for _ in range(-(-size_bytes // _WRITE_BYTES)):
            out.write(block)
        os.fsync(out.fileno())
    file.unlink()
    sync(directory)


def fill_memory(directory: Path) -> None:
    """Fills free memory with page cache that can be given up at once, as it is on a machine that has run for long.

    A virtual machine whose host takes back what lies free pays for every page anew, 3 s a GiB where this was seen:
    then a contender is slow for having begun two seconds after the last one's files were removed.
    """
    file = directory / "filler"  # all hole: its pages are memory and nothing else
    with file.open("ab") as sparse:
        sparse.truncate(_FILLER_BYTES)
    buffer = bytearray(_WRITE_BYTES)
    with file.open("rb", buffering=0) as sparse:
        sparse.seek(random.randrange(_FILLER_BYTES // 2))  # hardly ever where it is filled already
        for _ in range((psutil.virtual_memory().free - _LEFT_BYTES) // _WRITE_BYTES):
            sparse.readinto(buffer)


def warm(files: Iterable[Path]) -> None:
    """Reads files into the page cache: every contender finds the server's in it, and its own files not there."""
    buffer = bytearray(_WRITE_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Until it is so; ContenderError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ContenderError(f"not within {seconds:g} s: {what}")
        time.sleep(0.002)

"""What the page cache holds of a file, by mincore(2), and making a file cold without touching anybody else's.

Written apart from the daemon's own, so that a test does not ask the accused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_MIB = 1 << 20


def pages(path: Path) -> list[bool]:
    """Page by page, whether it is in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        found = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
        first = ctypes.c_char.from_buffer(mapped)
        try:
            done = _libc.mincore(ctypes.addressof(first), len(mapped), found)
        finally:
            del first  # the mapping cannot be closed while it is exported
        assert done == 0, os.strerror(ctypes.get_errno())
    return [bool(page & 1) for page in found]


def warm_share(*paths: Path) -> float:
    """How much of the files is in memory, 0 to 1."""
    found = [page for path in paths for page in pages(path)]
    return sum(found) / len(found)


def make_cold(*paths: Path) -> None:
    """Out of memory, by advice for these files alone."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert warm_share(path) < 0.05, f"{path} cannot be made cold"


def touch(path: Path, start: int, size: int) -> None:
    """Into memory, and nothing beside it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(file.fileno(), size, start)) == size


def _has_a_disk_below(directory: Path) -> bool:
    """Not so on tmpfs, where the page cache is the file."""
    probe = directory / "probe"
    probe.write_bytes(os.urandom(_MIB))
    try:
        make_cold(probe)
    except AssertionError:
        return False
    finally:
        probe.unlink()
    return True


@contextmanager
def on_a_disk(directory: Path) -> Iterator[Path]:
    """The directory if what is written there can be cold, else one beside this file that ends with the test."""
    if _has_a_disk_below(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".warmth-") as other:
        assert _has_a_disk_below(Path(other)), f"neither {directory} nor {other} lies on a disk"
        yield Path(other)

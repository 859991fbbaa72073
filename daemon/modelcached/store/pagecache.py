"""What of a file the page cache holds, and reading through it without leaving a trace. Nothing on the disk changes.

mincore(2) tells the truth only about files that the caller owns or may write, and says "all is there" of
others: then nothing is read ahead and nothing dropped, which is the harmless side.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Generator

_PAGE = mmap.PAGESIZE
_WINDOW_BYTES = 1 << 30
_READAHEAD_BYTES = 128 << 10
"""The kernel's default read_ahead_kb: of a longer POSIX_FADV_WILLNEED it may read no more than this."""
_LOW_BIT = bytes(value & 1 for value in range(256))  # the others are not defined
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def _resident(descriptor: int, start: int, end: int) -> bytes:
    """A byte for each page of [start, end), 1 where the page cache has it. Raises OSError where it cannot be known."""
    length = end - start
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed")
    try:
        pages = (ctypes.c_ubyte * -(-length // _PAGE))()
        if _libc.mincore(address, length, pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return bytes(pages).translate(_LOW_BIT)
    finally:
        _libc.munmap(address, length)


def cold_stretches(descriptor: int, start: int, end: int) -> list[tuple[int, int]]:
    """What of [start, end) is not in the page cache; ``start`` is a multiple of a page.

    Empty where it cannot be known. Blocking.
    """
    if start >= end:
        return []
    try:
        pages = _resident(descriptor, start, end)
    except OSError:
        return []
    found, at = [], pages.find(0)
    while at >= 0:
        after = pages.find(1, at)
        after = len(pages) if after < 0 else after
        found.append((start + at * _PAGE, min(end, start + after * _PAGE)))
        at = pages.find(0, after)
    return found


def size_and_cold_bytes(path: str) -> tuple[int, int]:
    """How large a file is, and how much of it is not in the page cache. Blocking; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        windows = ((start, min(start + _WINDOW_BYTES, size)) for start in range(0, size, _WINDOW_BYTES))
        return size, sum(after - at for window in windows for at, after in cold_stretches(descriptor, *window))
    finally:
        os.close(descriptor)


def warm(path: str, start: int, end: int, buffer: memoryview) -> int:
    """Reads what of [start, end) is not in the page cache into it; how many bytes. Blocking; raises OSError.

    Returns when the disk has delivered, and nothing beyond ``end`` was asked of it: else no rate would hold.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _no_readahead(descriptor)
        return _read(descriptor, _ask_for(descriptor, start, end), buffer)
    finally:
        os.close(descriptor)


def read_through(descriptor: int, buffer: memoryview) -> Generator[memoryview, None, None]:
    """The file's content in order, one buffer at a time; the page cache is left as it was found.

    What was not there before is dropped again, what was there stays. The kernel's own readahead is
    turned off for this descriptor, because a page that it brought before we looked would pass for one that was
    there; instead each block is looked at, and asked for, while the one before it is being used. Blocking.
    """
    size = os.fstat(descriptor).st_size
    _no_readahead(descriptor)
    brought: list[tuple[int, int]] = []
    following = _ask_for(descriptor, 0, min(len(buffer), size))
    try:
        for start in range(0, size, len(buffer)):
            end = min(start + len(buffer), size)
            brought, following = following, _ask_for(descriptor, end, min(end + len(buffer), size))
            position = start
            while position < end:
                count = os.preadv(descriptor, [buffer[: end - position]], position)
                if count == 0:
                    return  # it was cut meanwhile
                position += count
                yield buffer[:count]
            _drop(descriptor, brought)
            brought = []
    finally:
        if brought or following:  # it was ended early: what is still on its way from the disk cannot be dropped
            _read(descriptor, brought + following, buffer)
            _drop(descriptor, brought + following)


def _no_readahead(descriptor: int) -> None:
    """Of the kernel's own, which may be megabytes."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _read(descriptor: int, stretches: list[tuple[int, int]], buffer: memoryview) -> int:
    done = 0
    for at, after in stretches:
        position = at
        while position < after:
            count = os.preadv(descriptor, [buffer[: min(len(buffer), after - position)]], position)
            if count == 0:
                return done
            position += count
            done += count
    return done


def _ask_for(descriptor: int, start: int, end: int) -> list[tuple[int, int]]:
    cold = cold_stretches(descriptor, start, end)
    for at, after in cold:
        for position in range(at, after, _READAHEAD_BYTES):
            length = min(_READAHEAD_BYTES, after - position)
            os.posix_fadvise(descriptor, position, length, os.POSIX_FADV_WILLNEED)
    return cold


def _drop(descriptor: int, stretches: list[tuple[int, int]]) -> None:
    for at, after in stretches:
        os.posix_fadvise(descriptor, at, after - at, os.POSIX_FADV_DONTNEED)

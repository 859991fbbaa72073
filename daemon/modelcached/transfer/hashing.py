"""Digests of content: SHA-256 for LFS and Xet files, git's SHA-1 for small ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from typing import Protocol

from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Digest
from modelcached.store.pagecache import read_through
from modelcached.store.partials import Partial
from modelcached.store.taking import Taken

BLOCK_BYTES = 4 << 20
_STEP_BYTES = 256 << 10
"""Of what is in the page cache: small enough for the core's own, and not new memory each time (store/memory.py)."""
_PASSING_BYTES = 1 << 20
"""Between two looks at what goes first (precedence.py)."""


class Hasher(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Takes more content."""
        ...

    def hexdigest(self) -> str:
        """The digest so far."""
        ...


def new_hasher(digest: Digest, size_bytes: int) -> Hasher:
    """A hasher whose hexdigest() over the whole content equals ``digest.hex``."""
    if digest.algorithm is Algorithm.SHA256:
        return hashlib.sha256()
    hasher = hashlib.sha1(usedforsecurity=False)
    hasher.update(b"blob %d\0" % size_bytes)  # git hash-object
    return hasher


def matches(digest: Digest, content: bytes | bytearray | memoryview) -> bool:
    """Whether small content is what its digest says."""
    hasher = new_hasher(digest, len(content))
    hasher.update(memoryview(content))
    return hasher.hexdigest() == digest.hex


def hash_partial(
    partial: Partial | Taken, hasher: Hasher, start: int, end: int, let_pass: Callable[[], None] = lambda: None
) -> None:
    """Feeds [start, end) of an unfinished blob to the hasher. Blocking; releases the GIL.

    ``let_pass`` is called now and again, and may take its time.
    """
    passed = start
    buffer = memoryview(bytearray(min(_STEP_BYTES, end - start)))
    while start < end:
        count = partial.read(buffer[: min(len(buffer), end - start)], start)
        if count == 0:
            raise OSError(5, "unfinished blob is shorter than its journal says", str(partial.digest))
        hasher.update(buffer[:count])
        start += count
        if start - passed >= _PASSING_BYTES:
            passed = start
            let_pass()


def hash_file(
    path: str, digest: Digest, stopping: threading.Event, pace: Callable[[int], None] = lambda _bytes: None
) -> bool:
    """Whether a finished blob is what its name says. Blocking; raises OSError.

    Leaves the page cache as it was: a look at old models must not push out the ones in use.
    ``pace`` is called with what was read, and may take its time.
    Raises CacheError(SHUTTING_DOWN) soon after ``stopping`` is set: 140 GB take minutes.
    """
    with open(path, "rb", buffering=0) as file:
        hasher = new_hasher(digest, os.fstat(file.fileno()).st_size)
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with contextlib.closing(read_through(file.fileno(), buffer)) as blocks:
            for block in blocks:
                if stopping.is_set():
                    raise CacheError(Reason.SHUTTING_DOWN, "the daemon is stopping")
                hasher.update(block)
                pace(len(block))
    return hasher.hexdigest() == digest.hex

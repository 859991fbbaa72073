"""Hashing a finished blob: right, wrong, and ended by a daemon that stops."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Digest
from modelcached.sources.body import CHUNK_BYTES
from modelcached.store.memory import LARGE_BYTES
from modelcached.transfer.hashing import BLOCK_BYTES, hash_file


def test_a_blob_is_what_its_name_says_or_not(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"content")
    right = Digest(Algorithm.SHA256, hashlib.sha256(b"content").hexdigest())
    assert hash_file(str(file), right, threading.Event())
    assert not hash_file(str(file), Digest(Algorithm.SHA256, "0" * 64), threading.Event())
    git = hashlib.sha1(b"blob 7\0content").hexdigest()
    assert hash_file(str(file), Digest(Algorithm.GIT_SHA1, git), threading.Event())


def test_a_daemon_that_stops_does_not_hash_to_the_end(tmp_path: Path) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"content")
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(CacheError) as caught:
        hash_file(str(file), Digest(Algorithm.SHA256, "0" * 64), stopping)
    assert caught.value.reason is Reason.SHUTTING_DOWN


def test_whoever_sets_the_pace_is_asked_after_each_piece(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"x" * (2 * BLOCK_BYTES + 5))
    taken: list[int] = []
    hash_file(str(path), Digest(Algorithm.SHA256, "0" * 64), threading.Event(), taken.append)
    assert taken == [BLOCK_BYTES, BLOCK_BYTES, 5]


_FAULTS = """
import resource
from modelcached.model import Algorithm, Digest
from modelcached.store.memory import give_buffers_back
from modelcached.transfer.hashing import hash_partial, new_hasher

class Unfinished:
    content = bytes(4 << 20)

    def read(self, view, offset):
        view[:] = memoryview(self.content)[: len(view)]
        return len(view)

give_buffers_back()
size = 8 << 20
hasher = new_hasher(Digest(Algorithm.SHA256, "0" * 64), 65 * size)
hash_partial(Unfinished(), hasher, 0, size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(1, 65):
    hash_partial(Unfinished(), hasher, step * size, (step + 1) * size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_hashing_and_receiving_take_no_new_memory_for_each_piece() -> None:
    said = subprocess.run([sys.executable, "-c", _FAULTS], check=True, capture_output=True, text=True).stdout
    assert int(said) < 64 * (LARGE_BYTES >> 12)  # pages, over 64 steps: a large buffer's are all new
    assert CHUNK_BYTES < LARGE_BYTES  # a range's buffer

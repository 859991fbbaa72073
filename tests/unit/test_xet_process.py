"""The process that reads from the Xet store: whatever becomes of it, its parent learns of it and leaves nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Commit, Digest, FileEntry, RepoId
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.sources.http import RemoteFile
from modelcached.sources.hub import XetToken
from modelcached.sources.origin import OriginFailedError
from modelcached.sources.xet import MIN_BYTES, XetOrigin, XetSource
from modelcached.sources.xet_child import _received
from modelcached.sources.xet_process import _environment

ENDPOINT = "http://127.0.0.1:9"


class FakeApi:
    """Gives a token for a store that is not there."""

    endpoint = ENDPOINT
    refusal: CacheError | None = None
    asked = 0

    def xet_token(self, _repo: RepoId, _commit: Commit, _token: str | None, _timeout: timedelta) -> XetToken:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        return XetToken(ENDPOINT, "secret-of-the-store", 1 << 33)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def source(api: FakeApi) -> Iterator[XetSource]:
    """It leaves neither a descriptor nor a process."""
    before = psutil.Process().num_fds()
    apis: Any = [api]
    yield XetSource(apis, stall_timeout_seconds=5.0)
    assert psutil.Process().num_fds() == before
    assert psutil.Process().children() == []


def file(size: int = MIN_BYTES, xet_hash: str | None = "ab" * 32, endpoint: str = ENDPOINT) -> RemoteFile:
    entry = FileEntry("model.safetensors", size, Digest(Algorithm.SHA256, "0" * 64), "0" * 40, xet_hash)
    return RemoteFile(endpoint, RepoId("org/model"), Commit("0" * 40), entry, None)


def origin(source: XetSource) -> XetOrigin:
    made = source.origin(file())
    assert made is not None
    return made


def nothing(_view: memoryview, _offset: int) -> None:
    raise AssertionError("nothing can have come")


def test_only_large_files_with_a_hash_at_a_known_endpoint_have_an_origin(source: XetSource) -> None:
    assert source.origin(file()) is not None
    others = file(MIN_BYTES - 1), file(xet_hash=None), file(xet_hash="../" * 20), file(endpoint="http://other")
    assert [source.origin(other) for other in others] == [None] * 4
    source.enabled = False
    assert source.origin(file()) is None


def test_a_store_that_cannot_be_reached_is_tried_three_times_and_then_rests(source: XetSource) -> None:
    for _ in range(2):
        made = origin(source)
        for _ in range(2):
            with pytest.raises(TransientError, match="Xet ended 16777216 bytes early: ") as caught:
                # Its words are not always there: hf_xet may end a stream cleanly when its store cannot be reached.
                made.fetch(0, MIN_BYTES, nothing, Abort())
            assert "secret-of-the-store" not in caught.value.message
        with pytest.raises(OriginFailedError):
            made.fetch(0, MIN_BYTES, nothing, Abort())
    assert source.rests
    with pytest.raises(OriginFailedError, match="not tried"):
        origin(source).fetch(0, MIN_BYTES, nothing, Abort())
    source.worked()
    assert not source.rests


def test_no_token_means_no_try(source: XetSource, api: FakeApi) -> None:
    api.refusal = CacheError(Reason.GATED_REPO, "gated")
    with pytest.raises(OriginFailedError, match="gated"):
        origin(source).fetch(0, MIN_BYTES, nothing, Abort())


def test_a_fetch_that_was_ended_before_it_began_ends(source: XetSource) -> None:
    abort = Abort()
    abort.set()
    with pytest.raises(AbortedError):
        origin(source).fetch(0, MIN_BYTES, nothing, abort)


def test_a_look_at_what_was_received_leaves_no_descriptor() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"12345")
            assert client.recv(5) == b"12345"
            descriptors = psutil.Process().num_fds()
            received = [_received() for _ in range(3)]
            assert psutil.Process().num_fds() == descriptors
            assert all(look[os.fstat(client.fileno()).st_ino] == 5 for look in received)


def test_a_machine_that_gives_no_process_is_no_fault_of_the_disk(
    source: XetSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TransientError, match=f"no process for Xet: {os.strerror(2)}"):
        origin(source).fetch(0, MIN_BYTES, nothing, Abort())


_ADVISED = """
import ctypes
piece = bytearray(64 << 20)
middle = ctypes.addressof(ctypes.c_char.from_buffer(piece, len(piece) // 2))
within = False
for line in open("/proc/self/smaps"):
    words = line.split()
    if not words[0].endswith(":"):
        first, last = (int(word, 16) for word in words[0].split("-"))
        within = first <= middle < last
    elif within and words[0] == "VmFlags:":
        print("hg" in words)
"""


def test_its_pieces_lie_in_huge_pages_where_the_system_gives_them_to_whoever_asks() -> None:
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # no kernel must have it
    given = switch.exists() and "[madvise]" in switch.read_text(encoding="ascii")
    command = [sys.executable, "-c", _ADVISED]
    said = subprocess.run(command, env=_environment(None), check=True, capture_output=True, text=True)
    assert said.stdout.strip() == str(given)

"""A body's bytes, whole and in order, by either way, and what is done where there is no pipe to be had."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from modelcached.sources.abort import Abort
from modelcached.sources.body import PIPE_BYTES, EarlyEndError, receive
from modelcached.sources.connections import Connection
from modelcached.sources.network import Network
from modelcached.sources.sink import FileSink

from tests.hub import KIB, MIB, Synthetic
from tests.unit.sinks import WAYS, sink_over

SIZE = 3 * MIB
CONTENT = b"".join(Synthetic(SIZE).blocks())


def length(size: int) -> bytes:
    return f"Content-Length: {size}\r\n\r\n".encode()


LENGTH = length(SIZE)

both_ways = pytest.mark.parametrize("way", WAYS)


@contextmanager
def answering(send: Callable[[socket.socket], None]) -> Iterator[tuple[Connection, http.client.HTTPResponse]]:
    """A connection whose peer has sent a status line, and goes on with ``send``."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connected, _ = server.accept()
            with connected:
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connected.recv(64 * KIB)
                connected.sendall(b"HTTP/1.1 206 Partial Content\r\n")
                with contextlib.suppress(ConnectionError):  # nobody needs to read all of it
                    send(connected)

        serving = threading.Thread(target=serve)
        serving.start()
        connection = Connection("http", f"127.0.0.1:{server.getsockname()[1]}", Network.of(None, {}), 5.0)
        try:
            connection.get("/", {})
            yield connection, connection.getresponse()
        finally:
            connection.close()
            serving.join()


def received(way: str, send: Callable[[socket.socket], None], size: int = SIZE) -> bytes:
    got = bytearray()

    def take(view: memoryview, offset: int) -> None:
        assert offset == len(got)
        got.extend(view)

    with answering(send) as (connection, response):
        receive(connection, response, 0, size, sink_over(way, take), Abort())
        assert response.read() == b""
    return bytes(got)


def whole(connected: socket.socket) -> None:
    connected.sendall(LENGTH + CONTENT)


def chunked(connected: socket.socket) -> None:
    connected.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
    for at in range(0, SIZE, 100_000):
        piece = CONTENT[at : at + 100_000]
        connected.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    connected.sendall(b"0\r\n\r\n")


def until_it_closes(connected: socket.socket) -> None:
    connected.sendall(b"Connection: close\r\n\r\n" + CONTENT)


def closing(connected: socket.socket) -> None:
    connected.sendall(b"Connection: close\r\n" + LENGTH + CONTENT)


@both_ways
@pytest.mark.parametrize("send", [whole, chunked, until_it_closes, closing], ids=lambda f: f.__name__)
def test_it_comes_as_it_was_sent(way: str, send: Callable[[socket.socket], None]) -> None:
    assert received(way, send) == CONTENT


@both_ways
@pytest.mark.parametrize("size", [1, 100, 8 * KIB, PIPE_BYTES + 1], ids=str)
def test_no_more_is_taken_than_was_asked(way: str, size: int) -> None:
    def send(connected: socket.socket) -> None:
        connected.sendall(length(size) + CONTENT[:size] + b"HTTP/1.1 200 the next answer")

    assert received(way, send, size) == CONTENT[:size]


@both_ways
@pytest.mark.parametrize("sent", [0, 100, 100 * KIB], ids=str)
def test_an_early_end_says_how_much_is_missing(way: str, sent: int) -> None:
    with pytest.raises(EarlyEndError) as caught:
        received(way, lambda connected: connected.sendall(LENGTH + CONTENT[:sent]))
    assert caught.value.missing_bytes == SIZE - sent


@both_ways
@pytest.mark.parametrize("less", [0, 50_000], ids=str)
def test_a_length_that_is_less_than_the_range_is_an_early_end(way: str, less: int) -> None:
    ended = threading.Event()

    def send(connected: socket.socket) -> None:
        connected.sendall(length(less) + CONTENT[:less])
        ended.wait(10)

    try:
        with answering(send) as (connection, response), pytest.raises(EarlyEndError) as caught:
            receive(connection, response, 0, SIZE, sink_over(way, lambda _view, _offset: ended.set()), Abort())
    finally:
        ended.set()
    assert caught.value.missing_bytes == SIZE - less


def test_only_what_came_with_the_headers_takes_the_way_through_memory() -> None:
    by_memory, by_pipe = 0, 0

    def write(view: memoryview, _offset: int) -> None:
        nonlocal by_memory
        by_memory += len(view)

    def splice(pipe: int, size_bytes: int, _offset: int) -> None:
        nonlocal by_pipe
        assert size_bytes <= PIPE_BYTES
        by_pipe += size_bytes
        while size_bytes:
            size_bytes -= len(os.read(pipe, size_bytes))

    with answering(whole) as (connection, response):
        receive(connection, response, 0, SIZE, FileSink(write, splice), Abort())
    assert by_memory + by_pipe == SIZE
    assert by_memory <= 8 * KIB


def test_a_pipe_that_is_full_is_emptied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fragment of the network takes a page's place in it: it may hold much less than its size."""
    splice, setting, calls, pieces = os.splice, fcntl.fcntl, 0, 0
    size = MIB

    def counted(source: int, target: int, count: int, *, flags: int) -> int:
        nonlocal calls
        calls += 1
        return splice(source, target, count, flags=flags)

    def take(view: memoryview, _offset: int) -> None:
        nonlocal pieces
        pieces += 1
        got.extend(view)

    monkeypatch.setattr(os, "splice", counted)
    monkeypatch.setattr(fcntl, "fcntl", lambda pipe, what, _size: setting(pipe, what, 4 * KIB))
    got = bytearray()
    with answering(lambda connected: connected.sendall(length(size) + CONTENT[:size])) as (connection, response):
        receive(connection, response, 0, size, sink_over(WAYS[1], take), Abort())
    assert got == CONTENT[:size]
    assert pieces > size // (64 * KIB), "it was never full"
    assert calls <= 4 * pieces


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM], ids=errno.errorcode.get)
def test_without_splice_it_goes_through_memory(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_args: int, **_options: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "splice", refuse)
    assert received(WAYS[1], whole) == CONTENT


def test_what_fails_under_way_is_no_lack_of_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are in the pipe by then: to go on through memory would lose them."""
    splice, calls = os.splice, 0

    def fail_later(source: int, target: int, count: int, *, flags: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.EINVAL, "invalid")
        return splice(source, target, count, flags=flags)

    monkeypatch.setattr(os, "splice", fail_later)
    with pytest.raises(OSError, match="invalid"):
        received(WAYS[1], whole)


@pytest.mark.parametrize("lacks", ["descriptors", "pipes of such a size"])
def test_without_a_pipe_it_goes_through_memory(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def refuse(*_args: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE if lacks == "descriptors" else errno.EPERM, "no more")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        if lacks == "descriptors":
            patched.setattr(os, "pipe2", refuse)
        else:
            patched.setattr(fcntl, "fcntl", refuse)
        assert received(WAYS[1], whole) == CONTENT
    assert len(os.listdir("/proc/self/fd")) == before

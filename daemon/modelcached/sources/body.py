"""The body of an answer, from its connection into the sink.

Two ways: through a buffer of ours, or through a pipe (splice(2)), where the sink is a file and the connection plain.
Through the pipe each byte is copied once instead of twice and never comes to this process, which takes a fifth to a
quarter less CPU in all (`make bench CASE="cold-file cold-shards"`, "without splice"). TLS is undone in this process, so
there it is the buffer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import select
import socket
import time
from collections.abc import Iterator
from typing import Protocol

from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.connections import Connection
from modelcached.sources.sink import FileSink, Sink

CHUNK_BYTES = 512 << 10
"""Handed on at a time: for each step the thread needs the GIL, which all connections fight for. More would not stay in
the core's own cache until it is written, and be new memory for each range (store/memory.py)."""
PIPE_BYTES = 1 << 20
"""The same for a pipe, which holds pages of the socket's and no memory of ours. More needs CAP_SYS_RESOURCE (pipe(7)).
Each fragment of the network takes a page's place in it, so that it may be full earlier."""
_FEW_BYTES = 64 << 10
"""Of less than this a pipe is not emptied while more is on its way."""
_CHUNK_SECONDS = 0.1
"""What is slow is handed on in smaller pieces."""
_SPLICE_NONBLOCK = 2  # fcntl.h
_NO_SPLICE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""What a kernel, or a sandbox round it, says that has no splice(2) for sockets."""


class EarlyEndError(Exception):
    """The connection ended before the body did; our own shutdown of it reads like that too."""

    def __init__(self, missing_bytes: int) -> None:
        super().__init__()
        self.missing_bytes = missing_bytes


class _NoPipeError(Exception):
    """There is no way through a pipe here; nothing has been received."""


def receive(
    connection: Connection, response: http.client.HTTPResponse, start: int, end: int, sink: Sink, abort: Abort
) -> None:
    """Hands the bytes [start, end) of the file on, in order; what came is handed on, however it ends.

    Raises EarlyEndError, AbortedError, whatever the sink raises, and what sockets and http.client raise.
    """
    if isinstance(sink, FileSink) and (plain := _plain_socket(connection, response)) is not None:
        # What http.client has read ahead is in its buffer; then the rest is the socket's.
        ahead = min(start + len(response.fp.peek()), end)
        start = _hand_on(_Buffer(response, ahead - start, sink), start, ahead, abort)
        with contextlib.suppress(_NoPipeError), _Pipe.opened(response, plain, sink) as pipe:
            start = _hand_on(pipe, start, end, abort)
    _hand_on(_Buffer(response, min(CHUNK_BYTES, end - start), sink), start, end, abort)


def _plain_socket(connection: Connection, response: http.client.HTTPResponse) -> socket.socket | None:
    """What the body's bytes come out of as they are, where that can be said, and there are some."""
    if response.isclosed() or response.chunked or not response.length:
        return None
    return connection.wire if connection.sock is connection.wire else None


class _Way(Protocol):
    """Holds some bytes between the connection and the sink."""

    size_bytes: int

    def receive(self, held_bytes: int, size_bytes: int) -> int | None:
        """What one receive brings on top; 0 at the end, None where what is held is to be handed on first."""
        ...

    def hand_on(self, size_bytes: int, offset: int) -> None:
        """All that is held."""
        ...


def _hand_on(way: _Way, start: int, end: int, abort: Abort) -> int:
    """All bytes from start to end, over this way; the end."""
    position = start
    while position < end:
        if abort.is_set:
            raise AbortedError
        held, brought = 0, None
        due = time.monotonic() + _CHUNK_SECONDS
        try:
            while held < (most := min(way.size_bytes, end - position)) and time.monotonic() < due:
                brought = way.receive(held, most - held)
                if not brought:
                    break
                held += brought
        finally:
            if held:  # whatever ends the connection, what it brought counts
                way.hand_on(held, position)
                position += held
        if brought == 0:
            raise EarlyEndError(end - position)
    return position


class _Buffer:
    """Through our memory."""

    def __init__(self, response: http.client.HTTPResponse, size_bytes: int, sink: Sink) -> None:
        self.size_bytes = size_bytes
        self._response = response
        self._buffer = memoryview(bytearray(size_bytes))
        self._sink = sink

    def receive(self, held_bytes: int, size_bytes: int) -> int:
        """``readinto`` fills the view, and where that fails nobody knows how far it came: readinto1."""
        view, response = self._buffer[held_bytes : held_bytes + size_bytes], self._response
        if response.isclosed() or response.length is None or response.chunked:
            return response.readinto(view)
        count = response.fp.readinto1(view[: response.length])
        _received(response, count)
        return count

    def hand_on(self, size_bytes: int, offset: int) -> None:
        self._sink(self._buffer[:size_bytes], offset)


class _Pipe:
    """Through a pipe: the kernel moves the socket's pages into it, and copies them from there into the file."""

    size_bytes = PIPE_BYTES

    def __init__(
        self, response: http.client.HTTPResponse, plain: socket.socket, sink: FileSink, reads: int, writes: int
    ) -> None:
        self._response = response
        self._socket = plain
        self._sink = sink
        self._reads, self._writes = reads, writes
        self._readable = select.poll()
        self._readable.register(plain, select.POLLIN)
        self._empty = True

    @classmethod
    @contextlib.contextmanager
    def opened(cls, response: http.client.HTTPResponse, plain: socket.socket, sink: FileSink) -> Iterator[_Pipe]:
        """Raises _NoPipeError."""
        with contextlib.ExitStack() as held:
            try:
                reads, writes = os.pipe2(os.O_CLOEXEC)
                held.callback(os.close, reads)
                held.callback(os.close, writes)
                fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            except OSError as error:  # no descriptor left, or no more of such pipes for this user
                raise _NoPipeError from error
            yield cls(response, plain, sink, reads, writes)

    def receive(self, held_bytes: int, size_bytes: int) -> int | None:
        size_bytes = min(size_bytes, self._response.length or 0)
        if not size_bytes:
            return 0
        count = self._splice(size_bytes)
        if count is None and held_bytes < _FEW_BYTES:
            self._wait()
            count = self._splice(size_bytes)  # None when the pipe is full, of many small fragments
        if count:
            self._empty = False
            _received(self._response, count)
        return count

    def _splice(self, size_bytes: int) -> int | None:
        """None where either the socket has nothing or the pipe is full."""
        try:
            return os.splice(self._socket.fileno(), self._writes, size_bytes, flags=_SPLICE_NONBLOCK)
        except BlockingIOError:
            return None
        except OSError as error:
            if self._empty and error.errno in _NO_SPLICE:
                raise _NoPipeError from error
            raise

    def _wait(self) -> None:
        seconds = self._socket.gettimeout()
        if not self._readable.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError("timed out")  # as recv says it

    def hand_on(self, size_bytes: int, offset: int) -> None:
        self._sink.splice(self._reads, size_bytes, offset)


def _received(response: http.client.HTTPResponse, count: int) -> None:
    """Bytes of the body that were taken behind the response's back."""
    assert response.length is not None
    response.length -= count
    if response.length == 0:
        response.readinto(bytearray())  # it ends by itself

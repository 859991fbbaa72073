"""I6: a peer that sends next to nothing is stalled, one that we keep waiting is not, and who ended a fetch is told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from modelcached.sources.abort import FLOOR_BYTES_PER_SECOND, Abort, StallWatch
from modelcached.sources.tcp import bytes_received

TIMEOUT = 10.0


@dataclass
class Line:
    """A connection, its watch, and the time."""

    ours: socket.socket
    theirs: socket.socket
    abort: Abort
    watch: StallWatch
    now: float = 0.0

    def get(self, count: int) -> None:
        """The peer sends, and we read it."""
        self.theirs.sendall(bytes(count))
        left = count
        while left:
            left -= len(self.ours.recv(left))

    def later(self, seconds: float) -> bool:
        """A look after so long; whether the fetch was ended."""
        self.now += seconds
        self.watch.look()
        return self.abort.stalled


@pytest.fixture
def line() -> Iterator[Line]:
    with socket.create_server(("127.0.0.1", 0)) as listening, connected(listening) as (ours, theirs):
        made = Line(ours, theirs, Abort(), StallWatch(TIMEOUT, lambda: made.now))
        with made.watch.over(made.abort):
            made.abort.attach(ours)
            yield made


@contextmanager
def connected(listening: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_connection(listening.getsockname()) as ours:
        theirs, _ = listening.accept()
        with theirs:
            yield ours, theirs


def test_a_byte_now_and_then_is_a_stall(line: Line) -> None:
    assert not line.later(0)
    for _ in range(int(TIMEOUT) - 1):
        line.get(1)
        assert not line.later(1)
    line.get(1)
    assert line.later(1)
    assert not line.abort.is_set
    assert line.ours.recv(1) == b"", "whoever waits for more is woken"


def test_the_floor_is_measured_over_the_whole_timeout(line: Line) -> None:
    assert not line.later(0)
    for _ in range(3):
        assert not line.later(TIMEOUT - 1)
        line.get(int(FLOOR_BYTES_PER_SECOND * TIMEOUT))
        assert not line.later(1)
    line.get(int(FLOOR_BYTES_PER_SECOND * TIMEOUT) - 1)
    assert line.later(TIMEOUT)


def test_a_peer_that_we_keep_waiting_is_not_stalled(line: Line) -> None:
    line.theirs.sendall(b"nobody reads this")
    for _ in range(5):
        assert not line.later(TIMEOUT)
    line.ours.recv(100)
    assert not line.later(TIMEOUT), "the wait begins when we wait"
    assert line.later(TIMEOUT)


def test_each_connection_has_a_time_of_its_own(line: Line) -> None:
    assert not line.later(0)
    assert not line.later(TIMEOUT - 1)
    with socket.create_server(("127.0.0.1", 0)) as listening, connected(listening) as (other, _):
        line.abort.attach(other)  # a redirect was followed
        assert not line.later(2)
        assert not line.later(TIMEOUT - 1)
        assert line.later(1)
        assert other.recv(1) == b""
    line.abort.attach(None)
    assert line.later(TIMEOUT), "what is said of a fetch stays said"


def test_a_fetch_that_has_ended_is_not_looked_at(line: Line) -> None:
    other = Abort()
    with line.watch.over(other):
        other.attach(line.ours)
        assert not line.later(0)
    assert line.later(TIMEOUT)
    assert not other.stalled


def test_a_closed_socket_does_no_harm(line: Line) -> None:
    assert not line.later(0)
    line.ours.close()
    assert not line.later(2 * TIMEOUT)
    line.abort.stall()
    line.abort.set()


def test_a_stall_wakes_a_reader_in_another_thread(line: Line) -> None:
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(line.ours.recv(1)))
    reader.start()
    assert not line.later(0)
    assert line.later(TIMEOUT)
    reader.join(10)
    assert got == [b""]


def test_what_was_received_counts_once_it_is_in_the_kernel(line: Line) -> None:
    line.theirs.sendall(bytes(1000))
    line.ours.recv(1000, socket.MSG_PEEK | socket.MSG_WAITALL)
    assert bytes_received(line.ours) == 1000
    seen = line.abort.received()
    assert seen is not None
    assert seen[1:] == (1000, True)

"""TLS as it is received: many records at a time, and nothing lost of what came before an end, whichever it is."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from modelcached.sources.tls import TlsSocket

from tests.hub.tls import Authority

RECORD = 16 << 10
CONTENT = bytes(range(256)) * (RECORD // 256)


class Peer:
    """The other side, record by record; what it sends lies in the socket when its call returns."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = connected
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=True)

    def shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._receive()
            else:
                self._flush()
                return

    def records(self, data: bytes) -> bytes:
        """As they go over the wire."""
        self._tls.write(data)
        return self._leaving.read()

    def say_goodbye(self) -> None:
        with pytest.raises(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._flush()

    def read(self) -> bytes:
        self._receive()
        return self._tls.read()

    def _receive(self) -> None:
        if data := self.socket.recv(1 << 16):
            self._arrived.write(data)
        else:
            self._arrived.write_eof()

    def _flush(self) -> None:
        self.socket.sendall(self._leaving.read())


@pytest.fixture(params=["1.2", "1.3"])
def contexts(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's, for a version of TLS."""
    authority = Authority()
    server = authority.certificate("localhost")
    client = ssl.create_default_context(cafile=str(authority.write(tmp_path / "ca.pem")))
    version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[request.param]
    server.minimum_version = server.maximum_version = version
    return server, client


@contextmanager
def connected(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[tuple[TlsSocket, Peer]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.5)
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        peer = Peer(theirs, contexts[0])
        thread = threading.Thread(target=peer.shake_hands)
        thread.start()
        try:
            tls = TlsSocket(ours, contexts[1], "localhost")
        finally:
            thread.join()
        yield tls, peer


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


def receive(tls: TlsSocket, size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: tls.recv_into(memoryview(buffer))])


def test_one_receive_brings_all_records_that_are_there(contexts: Contexts) -> None:
    with connected(contexts) as (tls, peer):
        peer.socket.sendall(peer.records(CONTENT * 5))
        assert receive(tls, 8 * RECORD) == CONTENT * 5


def test_a_view_that_is_smaller_than_a_record_gets_the_rest_next(contexts: Contexts) -> None:
    with connected(contexts) as (tls, peer):
        peer.socket.sendall(peer.records(CONTENT))
        assert receive(tls, 1000) + receive(tls, RECORD) == CONTENT


def test_half_a_record_is_waited_for(contexts: Contexts) -> None:
    with connected(contexts) as (tls, peer):
        wire = peer.records(CONTENT)
        peer.socket.sendall(wire[:1000])
        later = threading.Timer(0.2, lambda: peer.socket.sendall(wire[1000:]))
        later.start()
        assert receive(tls, 2 * RECORD) == CONTENT
        later.join()


def test_what_is_sent_arrives(contexts: Contexts) -> None:
    with connected(contexts) as (tls, peer):
        tls.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert peer.read() == b"GET / HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize("is_said", [True, False])
def test_an_end_is_an_end_whether_it_is_said_or_not(contexts: Contexts, is_said: bool) -> None:
    with connected(contexts) as (tls, peer):
        peer.socket.sendall(peer.records(CONTENT))
        if is_said:
            peer.say_goodbye()
        else:
            peer.socket.sendall(peer.records(CONTENT)[:100])  # and the last record is cut off
            peer.socket.shutdown(socket.SHUT_WR)
        assert receive(tls, 4 * RECORD) == CONTENT
        assert receive(tls, RECORD) == b""
        assert receive(tls, RECORD) == b""


def test_of_what_is_forged_nothing_counts_and_all_that_came_before_does(contexts: Contexts) -> None:
    with connected(contexts) as (tls, peer):
        forged = bytearray(peer.records(CONTENT) + peer.records(CONTENT))
        forged[-1] ^= 1
        peer.socket.sendall(forged)
        assert receive(tls, 4 * RECORD) == CONTENT
        with pytest.raises(ssl.SSLError):
            receive(tls, RECORD)


def test_a_peer_that_is_silent_is_waited_for_as_long_as_the_socket_says(contexts: Contexts) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.1)
    with ours, theirs, pytest.raises(TimeoutError):
        TlsSocket(ours, contexts[1], "localhost")
    with connected(contexts) as (tls, peer):
        peer.socket.sendall(peer.records(CONTENT)[:-1])
        with pytest.raises(TimeoutError):
            receive(tls, RECORD)


def test_it_is_closed_when_its_file_is(contexts: Contexts) -> None:
    """http.client closes a connection that will not be used again before it reads the answer."""
    with connected(contexts) as (tls, peer):
        file = tls.makefile("rb")
        peer.socket.sendall(peer.records(CONTENT))
        tls.close()
        assert file.read(len(CONTENT)) == CONTENT
        file.close()
        assert peer.socket.recv(1) == b""


def test_a_wrong_host_is_not_believed_and_is_told(contexts: Contexts) -> None:
    ours, theirs = socket.socketpair()
    told: list[str] = []

    def shake_hands() -> None:
        peer = Peer(theirs, contexts[0])
        try:
            peer.shake_hands()
            peer.read()
        except ssl.SSLError as error:
            told.append(str(error))

    thread = threading.Thread(target=shake_hands)
    thread.start()
    with ours, theirs:
        with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
            TlsSocket(ours, contexts[1], "elsewhere")
        ours.shutdown(socket.SHUT_WR)
        thread.join()
    assert "alert" in told[0].lower()

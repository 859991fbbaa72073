"""Sockets and threads: a listener that can refuse connections, and a connection that can misbehave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer
from typing import cast

_BACKLOG = 512
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
_DRAIN_SECONDS = 5.0


class Listener:
    """Accepts on one port, a daemon thread per connection. `open`/`close` may alternate; `stop` ends it.

    A bound socket that never listens keeps the port while it is closed, so connections are refused by the
    kernel and no other process can take the port meanwhile.
    """

    def __init__(self, host: str, port: int, serve: Callable[[socket.socket], None], name: str) -> None:
        self._serve = serve
        self._name = name
        self._guard = _bound(host, port)
        self.host, self.port = self._guard.getsockname()[:2]
        self.endpoint = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self._lock = threading.Lock()
        self._listening: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._connections: dict[socket.socket, threading.Thread] = {}

    def open(self) -> None:
        """Listen; does nothing if it already does."""
        if self._listening is not None:
            return
        listening = _bound(self.host, self.port)
        listening.listen(_BACKLOG)
        self._listening = listening
        self._acceptor = threading.Thread(
            target=self._accept, args=(listening,), name=f"{self._name}-accept", daemon=True
        )
        self._acceptor.start()

    def close(self, *, drop_connections: bool) -> None:
        """Stop listening: new connections are refused; the living ones end too if asked."""
        listening, acceptor = self._listening, self._acceptor
        if listening is not None and acceptor is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            listening.close()
            self._listening = self._acceptor = None
        if drop_connections:
            self._drop()

    def stop(self) -> None:
        """Close, end every connection, wait for every thread, and free the port."""
        self.close(drop_connections=True)
        self._guard.close()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True)
            with self._lock:
                self._connections[connection] = thread
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError):
                self._serve(connection)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _drop(self) -> None:
        with self._lock:
            connections = dict(self._connections)
        for connection, thread in connections.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()


def _bound(host: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made


class Connection(BaseHTTPRequestHandler):
    """One HTTP/1.1 connection with keep-alive, and the rude endings that faults need."""

    protocol_version = "HTTP/1.1"
    server_version = "test-hub"
    disable_nagle_algorithm = True
    connection: socket.socket

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, connection.getpeername(), cast(BaseServer, None))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
        """Quiet: what was asked for is in the counters."""

    def send_headers(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def client_is_gone(self) -> bool:
        return self._hung_up(0)

    def wait_for_client_to_go(self) -> None:
        """Send nothing until the client closes, or the Hub stops (which shuts this socket down)."""
        self.close_connection = True
        self._hung_up(None)

    def end_cleanly(self) -> None:
        """FIN, whatever was promised."""
        self.close_connection = True

    def reset(self) -> None:
        """RST, after all that was written has arrived, so the number of bytes received is exact."""
        self.close_connection = True
        self._drain()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_SECONDS
        unsent = bytearray(4)
        while time.monotonic() < deadline:
            fcntl.ioctl(self.connection.fileno(), termios.TIOCOUTQ, unsent)
            if struct.unpack("i", unsent)[0] == 0 or self.client_is_gone():
                return
            time.sleep(0.001)

    def _hung_up(self, timeout_milliseconds: int | None) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return any(event & _GONE for _, event in poll.poll(timeout_milliseconds))

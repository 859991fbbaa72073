"""TLS over a connected socket, many records at a time.

``ssl.SSLSocket`` gives one record a call, 16 KiB at most, for which it asks the kernel twice and gives the
interpreter's lock away three times; with eight connections and a hash thread most of that is waiting for each other.
Here a call to the kernel brings up to ``_WIRE_BYTES``, and one read decrypts all that is there, which takes a sixth
less CPU for a whole download (`make bench CASE=cold-tls`, docs/benchmarks.md). Verifying is OpenSSL's, as the context
says.
"""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
from collections.abc import Callable
from typing import Any, Literal, cast

_WIRE_BYTES = 256 << 10
"""Of ciphertext, from the kernel at a time; as much again is kept by OpenSSL."""


class TlsSocket:
    """What http.client needs of a socket. One thread's, but for what is done to the socket beneath."""

    def __init__(self, beneath: socket.socket, context: ssl.SSLContext, host: str) -> None:
        """Shakes hands; the peer is to be ``host``. Raises OSError, of which ssl.SSLError is one."""
        self._beneath = beneath
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_hostname=host)
        # Of one record, 0 after a good-bye. The type that is said of it is that of a call without a view.
        self._read = cast("Callable[[int, memoryview], int]", self._tls.read)
        self._wire = memoryview(bytearray(_WIRE_BYTES))
        self._failed: ssl.SSLError | None = None
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._turn()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._send()  # the peer is told why
                raise
            else:
                self._send()
                return

    def sendall(self, data: bytes) -> None:
        """Raises OSError."""
        self._tls.write(data)
        self._send()

    def recv_into(self, view: memoryview) -> int:
        """What is there by now, at least one byte; 0 at the end, however it ends. Raises OSError."""
        filled, size = 0, len(view)
        while self._failed is None:
            try:
                while filled < size and (count := self._read(size - filled, view[filled:])):
                    filled += count
            except ssl.SSLWantReadError:
                if filled == 0:
                    self._turn()
                    continue
            except ssl.SSLEOFError:
                pass  # without a good-bye: the answer's length tells whether all came
            except ssl.SSLError as error:
                self._failed = error  # OpenSSL says it once, and what came before counts
                if filled == 0:
                    break
            return filled
        raise self._failed

    def makefile(self, mode: Literal["rb"]) -> io.BufferedReader:
        """For reading; the connection lives until it is closed, as a socket's does."""
        return io.BufferedReader(_Decrypted(self, self._beneath.makefile(mode, buffering=0)))

    def close(self) -> None:
        """Without waiting for the peer."""
        self._beneath.close()

    def _turn(self) -> None:
        """It cannot go on without the peer."""
        self._send()
        count = self._beneath.recv_into(self._wire)
        if count:
            self._arrived.write(self._wire[:count])
        else:
            self._arrived.write_eof()

    def _send(self) -> None:
        if self._leaving.pending:
            self._beneath.sendall(self._leaving.read())


class _Decrypted(io.RawIOBase):
    """The reading side as a file."""

    def __init__(self, tls: TlsSocket, holds: socket.SocketIO) -> None:
        self._tls = tls
        self._holds = holds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._tls.recv_into(memoryview(buffer))

    def close(self) -> None:
        self._holds.close()
        super().close()

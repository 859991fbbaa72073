"""What the kernel knows of a connection."""

from __future__ import annotations

import socket
import struct

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""tcpi_bytes_received in struct tcp_info (linux/tcp.h, since 4.1)."""


def bytes_received(connected: socket.socket) -> int:
    """Bytes that a TCP socket has received in its life, read or not. Raises OSError for any other kind."""
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
    received: int = _BYTES_RECEIVED.unpack(info)[0]
    return received

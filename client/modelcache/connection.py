"""Where the daemon listens, and how a channel to it is made.

Addresses: ``unix:///absolute/path``, ``unix:relative/path`` or ``host:port``.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Mapping

import grpc

CACHE_ADDRESS_VARIABLE = "MODELCACHE_ADDRESS"
ADMIN_ADDRESS_VARIABLE = "MODELCACHE_ADMIN_ADDRESS"
DEFAULT_CACHE_ADDRESS = "unix:///run/modelcached/cache/cache.sock"
DEFAULT_ADMIN_ADDRESS = "unix:///run/modelcached/admin/admin.sock"

RECONNECT_FIRST_MS = 100
RECONNECT_MOST_MS = 2000
CONNECT_WITHIN_MS = 5000
"""gRPC calls it min_reconnect_backoff; it is how long one attempt may take. A refusal is answered at once all the
same, but a daemon that greets a thousand clients on two busy cores needs more than 100 ms for the last of them."""

_LONGEST_SOCKET_PATH = 107
"""sockaddr_un.sun_path is 108 bytes with its NUL (unix(7)); gRPC's own message does not say so."""

_HOST_AND_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A proxy from the environment is for the Hub; the daemon is on this node.
    ("grpc.enable_http_proxy", 0),
    # A restarted daemon is found within two seconds instead of gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_FIRST_MS),
    ("grpc.min_reconnect_backoff_ms", CONNECT_WITHIN_MS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MOST_MS),
    # Closing a channel closes its connection, whoever else in this process talks to the same daemon.
    ("grpc.use_local_subchannel_pool", 1),
    # An error that names every holder of a model is longer than gRPC's 8 KiB of metadata.
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.absolute_max_metadata_size", 128 * 1024),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)

_REMOTE_OPTIONS: tuple[tuple[str, int], ...] = (
    # A Unix socket ends with its peer; a TCP peer can vanish. 330 s, because servers refuse pings under 300 s.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class AddressError(ValueError):
    """An address that is neither a Unix socket nor host:port; the message names it and where it came from."""


def cache_address(flag: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """The workloads' socket: the flag, else MODELCACHE_ADDRESS, else the default. Raises AddressError."""
    return _resolve(flag, CACHE_ADDRESS_VARIABLE, DEFAULT_CACHE_ADDRESS, environ)


def admin_address(flag: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """The operators' socket: the flag, else MODELCACHE_ADMIN_ADDRESS, else the default. Raises AddressError."""
    return _resolve(flag, ADMIN_ADDRESS_VARIABLE, DEFAULT_ADMIN_ADDRESS, environ)


def _resolve(flag: str | None, variable: str, default: str, environ: Mapping[str, str]) -> str:
    if flag is not None:
        return _checked(flag, "--address")
    if environ.get(variable):
        return _checked(environ[variable], variable)
    return default


def _checked(address: str, origin: str) -> str:
    path = socket_path(address)
    if path is not None:
        # "unix://relative" is what people write by mistake; gRPC would read a host in it.
        if not path or "\0" in path or (address.startswith("unix://") and not address.startswith("unix:///")):
            raise AddressError(f"{origin}: {address!r} is not an address: write unix:///absolute/path")
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            raise AddressError(
                f"{origin}: {address!r} is longer than the {_LONGEST_SOCKET_PATH} bytes of a socket path"
            )
        return address
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise AddressError(
            f"{origin}: {address!r} is not an address: write unix:///absolute/path, unix:relative/path or host:port"
        )
    return address


def socket_path(address: str) -> str | None:
    """The file system path of a Unix address; None for host:port."""
    if address.startswith("unix://"):
        return address.removeprefix("unix://")
    if address.startswith("unix:"):
        return address.removeprefix("unix:")
    return None


def open_channel(address: str) -> grpc.Channel:
    """A channel to a checked address; it connects with its first call."""
    options = _OPTIONS if socket_path(address) is not None else _OPTIONS + _REMOTE_OPTIONS
    target = address if socket_path(address) is not None else f"dns:{address}"
    return grpc.insecure_channel(target, options=list(options))


def explain_unreachable(address: str, told: str) -> str:
    """Why nobody answers at an address, in words that say what to look at.

    ``told`` is what gRPC said: of a host it is all that is known without asking it again.
    """
    path = socket_path(address)
    if path is None:
        return next((why for words, why in _TOLD_OF_HOSTS.items() if words in told.lower()), "it does not answer")
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(directory):
        return f"its directory {directory} does not exist: is the daemon installed, and mounted where this runs?"
    error = _connect(path)
    if error is None:
        return "somebody listens there, but the connection broke"
    number = error.errno or 0
    return _CONNECT_ERRORS.get(number) or f"{errno.errorcode.get(number, 'error')}: {error.strerror}"


_TOLD_OF_HOSTS = {
    "connection refused": "nobody listens there: is the daemon running?",
    "resol": "its name is not known here",  # "DNS resolution failed", "errors resolving"
    "unreachable": "no network leads there",
    "no route": "no network leads there",
}

_CONNECT_ERRORS = {
    errno.ENOENT: "no socket there yet: is the daemon running?",
    errno.ECONNREFUSED: "the socket is there, but nobody listens: the daemon has stopped",
    errno.EAGAIN: "the daemon does not take new connections",
    errno.EACCES: "this user may not connect to it (operators: root, or the group of server.admin_socket_mode)",
}


def _connect(path: str) -> OSError | None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # A stopped daemon with a full backlog would block a blocking connect.
            probe.setblocking(False)
            probe.connect(path)
    except OSError as error:
        return error
    return None

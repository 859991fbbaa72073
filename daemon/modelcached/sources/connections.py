"""Connections to hosts, directly or through a proxy, kept for the next request while they are idle."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from urllib.parse import urlsplit

from modelcached.sources.network import Network
from modelcached.sources.proxies import DEFAULT_PORTS, host_and_port
from modelcached.sources.tls import TlsSocket

CONNECT_SECONDS = 10.0
"""Most for each address of a host: a connect cannot be interrupted."""
_MAX_IDLE_PER_HOST = 64


class Connection(http.client.HTTPConnection):
    """To one host. Through a proxy, http is asked for by its whole address, https by a tunnel."""

    def __init__(self, scheme: str, netloc: str, network: Network, timeout_seconds: float) -> None:
        """Raises ValueError where ``netloc`` is none."""
        parts = urlsplit(f"//{netloc}")
        self.default_port = DEFAULT_PORTS[scheme]
        host, port = parts.hostname or "", parts.port or self.default_port
        if not host:
            raise ValueError(f"no host in {netloc!r}")
        super().__init__(host, port, timeout=timeout_seconds)
        self.wire: socket.socket | None = None
        """What it was connected by: where it speaks TLS, the socket beneath."""
        self._timeout = timeout_seconds
        self._tls = network.tls if scheme == "https" else None
        self._proxy = network.proxies.to(scheme, host, port)
        self._prefix = f"{scheme}://{netloc}" if self._proxy is not None and self._tls is None else ""

    def connect(self) -> None:
        """Raises OSError; where a proxy stands in between it is named."""
        connected = self._first_hop()
        try:
            connected.settimeout(self._timeout)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                if self._proxy is not None:
                    self._tunnel_through(connected)
                self.sock = TlsSocket(connected, self._tls, self.host)
            else:
                self.sock = connected
        except BaseException:
            connected.close()
            raise
        self.wire = connected

    def get(self, target: str, headers: dict[str, str]) -> None:
        """Sends a request for a path and query."""
        if self._prefix and self._proxy is not None and self._proxy.authorization is not None:
            headers = {**headers, "Proxy-Authorization": self._proxy.authorization}
        self.request("GET", self._prefix + target, headers=headers)

    def _first_hop(self) -> socket.socket:
        host, port = (self.host, self.port) if self._proxy is None else (self._proxy.host, self._proxy.port)
        via = "" if self._proxy is None else f" (the proxy {self._proxy})"
        seconds = min(CONNECT_SECONDS, self._timeout)
        try:
            return socket.create_connection((host, port), seconds)
        except TimeoutError as error:
            raise OSError(f"no connection to {host_and_port(host, port)} within {seconds:g} s{via}") from error
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror or error}{via}") from error

    def _tunnel_through(self, connected: socket.socket) -> None:
        assert self._proxy is not None
        there = host_and_port(self.host, self.port)
        lines = [f"CONNECT {there} HTTP/1.1", f"Host: {there}"]
        if self._proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {self._proxy.authorization}")
        connected.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        answer = http.client.HTTPResponse(connected, method="CONNECT")
        try:
            answer.begin()
            if answer.status != http.client.OK:
                raise OSError(f"the proxy {self._proxy} does not let us to {there} ({answer.status} {answer.reason})")
        finally:
            answer.close()


class Connections:
    """All connections of one kind of work. Thread-safe; a connection that was taken is one thread's."""

    def __init__(self, network: Network, timeout_seconds: float) -> None:
        self._network = network
        self._timeout = timeout_seconds
        self._idle: dict[tuple[str, str], list[tuple[float, Connection]]] = {}
        self._lock = threading.Lock()

    def take(self, scheme: str, netloc: str) -> tuple[Connection, bool]:
        """One that is idle, else a new one; whether it was used before, and may have been closed meanwhile."""
        with self._lock:
            idle = self._idle.get((scheme, netloc))
            if idle:
                return idle.pop()[1], True
        return self.new(scheme, netloc), False

    def new(self, scheme: str, netloc: str) -> Connection:
        """Not yet connected."""
        return Connection(scheme, netloc, self._network, self._timeout)

    def keep(self, connection: Connection, url: str) -> None:
        """For whoever asks that host next."""
        with self._lock:
            idle = self._idle.setdefault(urlsplit(url)[:2], [])
            if len(idle) < _MAX_IDLE_PER_HOST:
                idle.append((time.monotonic(), connection))
                return
        connection.close()

    def close(self, *, idle_seconds: float = 0.0) -> None:
        """Closes the connections that nobody has used for so long; those that servers closed would pile up."""
        before = time.monotonic() - idle_seconds
        with self._lock:
            idle, self._idle = self._idle, {}
            for key, connections in idle.items():
                if kept := [entry for entry in connections if entry[0] > before]:
                    self._idle[key] = kept
        for connections in idle.values():
            for kept_at, connection in connections:
                if kept_at <= before:
                    connection.close()

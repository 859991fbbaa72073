"""The proxy through which a host is reached, from the environment, for API questions and bytes alike.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY``, in either case, with curl's meaning: an entry of
NO_PROXY is a host, a domain with all below it, an address, or a network, each with a port if it is for that alone.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from modelcached.config import ConfigError

DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """Speaks plain HTTP; its credentials go to it alone, and are never shown."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)
    """The value of Proxy-Authorization."""

    @classmethod
    def parse(cls, name: str, text: str) -> Self:
        """The proxy that the variable ``name`` means. Raises ConfigError, which does not quote the credentials."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port
        except ValueError:
            parts, port = SplitResult("", "", "", "", ""), None
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(
                f"{name}: does not name a proxy: write http://host:port or http://user:password@host:port"
            )
        authorization = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = "Basic " + base64.b64encode(pair.encode()).decode()
        return cls(parts.hostname, port or DEFAULT_PORTS["http"], authorization)

    @property
    def url(self) -> str:
        """Without the credentials."""
        return f"http://{host_and_port(self.host, self.port)}"

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxy leads where."""

    by_scheme: Mapping[str, Proxy]
    exceptions: tuple[str, ...] = ()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """What the environment says. Raises ConfigError."""

        def value(name: str) -> tuple[str, str]:
            # The lower case wins, as with curl; HTTP_PROXY in upper case may be a request header of a CGI.
            return next(((n, environment[n]) for n in (name, name.upper()) if environment.get(n)), (name, ""))

        by_scheme = {}
        for scheme in DEFAULT_PORTS:
            for name, text in (value(f"{scheme}_proxy"), value("all_proxy")):
                if text:
                    by_scheme[scheme] = Proxy.parse(name, text)
                    break
        _, exceptions = value("no_proxy")
        return cls(by_scheme, tuple(entry.strip().lower() for entry in exceptions.split(",") if entry.strip()))

    def to(self, scheme: str, host: str, port: int) -> Proxy | None:
        """The proxy for that host; None: it is reached directly."""
        proxy = self.by_scheme.get(scheme)
        if proxy is None or any(_covers(entry, host.lower(), port) for entry in self.exceptions):
            return None
        return proxy


def host_and_port(host: str, port: int) -> str:
    """As it stands in an address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _covers(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass  # one of them is a name, or the entry has a port
    name, colon, only = entry.rpartition(":")
    if colon and only.isdigit() and ":" not in name.strip("[]"):
        return int(only) == port and _covers(name, host, port)
    if colon and only.isdigit() and name.startswith("["):
        return int(only) == port and name.strip("[]") == host
    name = entry.removeprefix("*").removeprefix(".")
    return host == name or host.endswith(f".{name}")

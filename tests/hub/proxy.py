"""A small HTTP proxy: it resolves names of its own, may want credentials, and writes down what it was asked for."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from .relay import Relay


@dataclass(frozen=True)
class Asked:
    """One request to the proxy; header names are lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


class HttpProxy(Relay):
    """Forwards `GET http://host/path`, and tunnels `CONNECT host:port`.

    `names` are hosts that nobody else can resolve, and the ports of 127.0.0.1 that they mean. `credentials` are
    "user:password".
    """

    def __init__(self, names: Mapping[str, int] | None = None, credentials: str | None = None) -> None:
        super().__init__()
        self._names = dict(names or {})
        self._wanted = None if credentials is None else "Basic " + base64.b64encode(credentials.encode()).decode()
        self.asked: list[Asked] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = line.split(" ")
        pairs = [(name.lower(), value.strip()) for name, _, value in (text.partition(":") for text in fields)]
        asked = Asked(method, target, dict(pairs))
        self.asked.append(asked)
        if self._wanted not in (None, asked.headers.get("proxy-authorization")):
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif method == "CONNECT":
            parts = urlsplit(f"//{target}")
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._further(reader, writer, parts.hostname or "", parts.port or 443)
        elif target.startswith("http://"):
            parts = urlsplit(target)
            kept = [f"{name}: {value}" for name, value in pairs if name not in ("proxy-authorization", "connection")]
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            first = "\r\n".join([f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""])
            await self._further(reader, writer, parts.hostname or "", parts.port or 80, first.encode("latin-1"))
        else:
            writer.write(b"HTTP/1.1 400 Not a request to a proxy\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async def _further(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, first: bytes = b""
    ) -> None:
        if host in self._names:
            host, port = "127.0.0.1", self._names[host]
        await self.join(reader, writer, host, port, first)

"""TLS for tests: an authority made up for the run, and a port that ends TLS before another that speaks none."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import trustme

from .relay import Relay


class Authority:
    """Signs certificates. Nobody believes it who has not read what it wrote."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def certificate(self, *names: str) -> ssl.SSLContext:
        """A server's context for these host names or addresses."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._ca.issue_cert(*names).configure_cert(context)
        return context

    def issue(self, name: str, path: Path) -> None:
        """A server's certificate for a host name, with its key, as a PEM file."""
        self._ca.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(path))

    def write(self, path: Path) -> Path:
        """Its own certificate as a PEM file."""
        self._ca.cert_pem.write_to_path(str(path))
        return path


class TlsFront(Relay):
    """Speaks TLS, and hands what it decrypts to another port of 127.0.0.1."""

    def __init__(self, context: ssl.SSLContext, target_port: int) -> None:
        super().__init__(context)
        self._target_port = target_port

    @property
    def endpoint(self) -> str:
        """Its address, by a name that a certificate may hold."""
        return f"https://localhost:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.join(reader, writer, "127.0.0.1", self._target_port)

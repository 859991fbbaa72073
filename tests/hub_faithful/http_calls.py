"""The wire as it is: one raw HTTP request, with whatever arrived before it ended."""

import http.client
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    error: type[BaseException] | None = None


def call(url: str, method: str = "GET", *, timeout: float = 10.0, **headers: str) -> Reply:
    """Ask on a connection of its own; an error in mid-body is kept beside the bytes that came before it."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        received = {name.lower(): value for name, value in response.getheaders()}
        body = bytearray()
        try:
            while chunk := response.read1(65536):
                body += chunk
        except (OSError, http.client.HTTPException) as error:
            return Reply(response.status, received, bytes(body), type(error))
        promised = int(received.get("content-length", len(body)))
        short = method != "HEAD" and len(body) < promised
        return Reply(response.status, received, bytes(body), http.client.IncompleteRead if short else None)
    finally:
        connection.close()


def cdn_url(endpoint: str, repo: str, path: str, **headers: str) -> str:
    """A fresh signed URL of an LFS file."""
    reply = call(f"{endpoint}/{repo}/resolve/main/{path}", "HEAD", timeout=10.0, **headers)
    assert reply.status == 302, reply
    return reply.headers["location"]

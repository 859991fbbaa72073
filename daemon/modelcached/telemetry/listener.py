"""The metrics listener: /metrics, /healthz (the event loop answers), /readyz (requests are served), the status page."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

HEALTH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Page:
    """The status page, and what it shows."""

    html: bytes
    policy: str
    """What a browser lets it do (Content-Security-Policy)."""
    data: Callable[[], bytes]
    """From the event loop; called from the listener's threads. Raises TimeoutError, RuntimeError."""


class Listener:
    """An HTTP server in threads of its own, so that it answers even when the event loop does not."""

    def __init__(  # noqa: C901 - a handler of http.server's is a class
        self,
        address: str,
        registry: CollectorRegistry,
        loop: asyncio.AbstractEventLoop,
        ready: Callable[[], bool],
        page: Callable[[], Page | None] = lambda: None,
    ) -> None:
        """``page``: None while it is turned off. Raises OSError where the address cannot be bound."""
        host, _, port = address.rpartition(":")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, shown = self.path.partition("?")[0], page()
                if path == "/metrics":
                    encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                    self._answer_from_loop(lambda: encode(registry), content_type)
                elif path == "/" and shown is not None:
                    self._answer(200, shown.html, "text/html; charset=utf-8", shown.policy)
                elif path == "/status.json" and shown is not None:
                    self._answer_from_loop(shown.data, "application/json")
                elif path == "/healthz":
                    alive = _answers(loop)
                    self._answer(200 if alive else 503, b"ok\n" if alive else b"the event loop does not answer\n")
                elif path == "/readyz":
                    serving = ready()
                    self._answer(200 if serving else 503, b"ok\n" if serving else b"not serving\n")
                else:
                    self._answer(404, b"/, /status.json, " * (shown is not None) + b"/metrics, /healthz or /readyz\n")

            def _answer_from_loop(self, make: Callable[[], bytes], content_type: str) -> None:
                try:
                    body = make()
                except (TimeoutError, RuntimeError) as error:
                    self._answer(503, f"the event loop does not answer: {error!r}\n".encode())
                except Exception as error:  # noqa: BLE001 - a disk that does not answer, a database that is broken
                    self._answer(503, f"cannot be looked at: {error!r}\n".encode())
                else:
                    self._answer(200, body, content_type)

            def _answer(
                self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8", policy: str = ""
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                if policy:
                    self.send_header("Content-Security-Policy", policy)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
                del format, args  # scrapes are no news

        where = host.strip("[]") or "0.0.0.0"  # noqa: S104 - as asked
        try:
            self._server = ThreadingHTTPServer((where, int(port)), Handler)
        except OSError as error:
            told = f"metrics.address {address} cannot be listened on: {error.strerror}; choose another"
            raise OSError(error.errno, told) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens; of use with port 0."""
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Closes the port."""
        self._server.shutdown()
        self._server.server_close()


def _answers(loop: asyncio.AbstractEventLoop) -> bool:
    done = threading.Event()
    try:
        loop.call_soon_threadsafe(done.set)
    except RuntimeError:
        return False
    return done.wait(HEALTH_SECONDS)

"""The test Hub: three addresses, the repos, and every switch a test turns."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from .cas import Cas, CasExchange
from .cdn import CdnExchange
from .content import BodyStore
from .counters import Counters, FileTotals, RequestRecord
from .exchange import Exchange
from .faults import FaultBoard, RequestKind
from .front import FrontExchange
from .pacing import Gate, Rate
from .repos import Gated, Repo
from .signing import UrlSigner
from .wire import Listener

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


class Hub:
    """A Hub on three ports of `host`, an address, speaking what huggingface_hub 2.4 and hf_xet 1.8 call.

    `xet` puts every LFS file into the Xet store too. `port` and `cdn_port` 0 let the system choose; they are
    known before `start`. `page_size` is the number of tree entries per page, `url_lifetime` how long a signed
    CDN URL is good, `rate` bytes per second over all bodies together (None: as fast as the machine).
    Where something stands before the Hub (tls.py, proxy.py), set the endpoints that it names to those.
    """

    def __init__(
        self,
        *,
        page_size: int = 1000,
        url_lifetime: timedelta = timedelta(minutes=5),
        rate: float | None = None,
        xet: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
        cdn_port: int = 0,
    ) -> None:
        self.page_size = page_size
        self.tokens: set[str] = set()
        self.counters = Counters()
        self.faults = FaultBoard()
        self.gate = Gate()
        self.pacer = Rate(rate)
        self.signer = UrlSigner(url_lifetime)
        self.stopping = threading.Event()
        self._repos: dict[str, Repo] = {}
        self._renamed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._front = Listener(host, port, self._connection(FrontExchange), "test-hub")
        self._cdn = Listener(host, cdn_port, self._connection(CdnExchange), "test-hub-cdn")
        self._store = Listener(host, 0, self._connection(CasExchange), "test-hub-cas")
        self.endpoint = self._front.endpoint
        self.cdn_endpoint = self._cdn.endpoint
        self.cas_endpoint = self._store.endpoint
        self._directory = Path(tempfile.mkdtemp(prefix="test-hub-"))
        self.bodies = BodyStore(self._directory)
        self.cas = Cas(self._directory)
        self._xet = xet

    def start(self) -> None:
        """Listen on all ports. A Hub that was stopped can't start again: make a new one."""
        self._front.open()
        self._cdn.open()
        self._store.open()

    def stop(self) -> None:
        """End every connection and thread, free the ports, remove the temporary files. May be called twice."""
        self.stopping.set()
        self.gate.stop()
        self.pacer.stop()
        self._front.stop()
        self._cdn.stop()
        self._store.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def refuse(self, refused: bool, *, drop_connections: bool = True) -> None:
        """True: the Hub is down, connections are refused and (by default) living ones end. False: it is back
        on the same ports."""
        if refused:
            self._front.close(drop_connections=drop_connections)
            self._cdn.close(drop_connections=drop_connections)
            self._store.close(drop_connections=drop_connections)
        else:
            self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def rate(self) -> float | None:
        """Bytes per second over all bodies; None for no limit. Takes effect at once, also in mid-transfer."""
        return self.pacer.bytes_per_second

    @rate.setter
    def rate(self, bytes_per_second: float | None) -> None:
        self.pacer.set(bytes_per_second)

    @property
    def url_lifetime(self) -> timedelta:
        """How long URLs signed from now on are good."""
        return self.signer.lifetime

    @url_lifetime.setter
    def url_lifetime(self, lifetime: timedelta) -> None:
        self.signer.lifetime = lifetime

    @property
    def gate_bodies(self) -> Gate:
        """`close("*.safetensors")` holds these bodies before their first byte until `open()`."""
        return self.gate

    def create_repo(self, repo_id: str, *, gated: Gated = False, private: bool = False) -> Repo:
        """A new, empty repo; the id is "organisation/name" or "name"."""
        repo = Repo(repo_id, self.bodies, self.cas, gated=gated, private=private, xet=self._xet)
        with self._lock:
            if repo_id in self._repos:
                raise ValueError(f"the repo {repo_id} exists already")
            self._repos[repo_id] = repo
        return repo

    def delete_repo(self, repo_id: str) -> None:
        """From now on it is unknown, as if it had never been."""
        with self._lock:
            del self._repos[repo_id]

    def rename_repo(self, old_id: str, new_id: str) -> None:
        """Give a repo another id; the old one answers 307 to the new one, as after a rename on the real Hub."""
        with self._lock:
            repo = self._repos.pop(old_id)
            repo.repo_id = new_id
            self._repos[new_id] = repo
            self._renamed[old_id] = new_id

    def new_name_of(self, repo_id: str) -> str | None:
        """The id a renamed repo has now."""
        with self._lock:
            return None if repo_id in self._repos else self._renamed.get(repo_id)

    def find_repo(self, repo_id: str) -> Repo | None:
        with self._lock:
            return self._repos.get(repo_id)

    def requests(self) -> list[RequestRecord]:
        """Every request since the last reset, in the order they came, those under way included."""
        return self.counters.requests()

    def body_bytes(self, repo_id: str, path: str) -> int:
        """Content bytes of that file sent by GETs, direct, through the CDN, or in xorbs."""
        return self.counters.body_bytes(repo_id, path)

    def request_count(
        self,
        *,
        kind: RequestKind | None = None,
        method: str | None = None,
        path_glob: str = "*",
        repo: str | None = None,
        status: int | None = None,
    ) -> int:
        return self.counters.count(kind=kind, method=method, path_glob=path_glob, repo=repo, status=status)

    def totals(self) -> list[FileTotals]:
        """Requests and bytes per repo, path and kind."""
        return self.counters.totals()

    def reset_counters(self) -> None:
        self.counters.reset()

    def wait_until(self, condition: Callable[[], bool], timeout: timedelta = timedelta(seconds=30)) -> bool:
        """Wait for a condition on the counters, e.g. `lambda: hub.body_bytes(repo, path) > MIB`."""
        return self.counters.wait_until(condition, timeout)

    def control(self, method: str, route: str) -> object | None:
        """No pages of its own; the command line adds some."""
        return None

    def _connection(self, exchange: type[Exchange]) -> Callable[[socket.socket], None]:
        bound = type(exchange.__name__, (exchange,), {"site": self})

        def serve(connection: socket.socket) -> None:
            bound(connection)

        return serve

"""Bytes of a file over HTTP: one range at a time, straight from the socket into the caller's hands.

The resolve address answers small files itself and sends large ones to a signed
address on another host, which is kept for the file's other ranges and asked for
anew when it has expired. The token goes to the endpoint it belongs to, never
further. http.client, because it reads into our buffer, ends when its socket is shut down from another thread, and
receives as fast as pycurl and urllib3 do and four times as fast as httpx2 (`make bench CASE=engine`).
Blocking: call it from a mover thread.
"""

from __future__ import annotations

import http.client
import threading
from dataclasses import dataclass, field
from urllib.parse import quote, urljoin, urlsplit

from modelcached.errors import CacheError, Reason
from modelcached.model import Commit, FileEntry, RepoId
from modelcached.sources.abort import FLOOR_BYTES_PER_SECOND, Abort, AbortedError, StallWatch
from modelcached.sources.body import EarlyEndError, receive
from modelcached.sources.connections import Connection, Connections
from modelcached.sources.faults import TransientError, retry_after
from modelcached.sources.network import Network
from modelcached.sources.sink import Sink

_MAX_REDIRECTS = 5
_MAX_REDIRECT_BODY_BYTES = 64 << 10
"""A redirect says where to go; one that says more is not read to its end, its connection not used again."""
_REDIRECTS = {301, 302, 303, 307, 308}
_FINAL = {
    "GatedRepo": Reason.GATED_REPO,
    "RepoNotFound": Reason.REPO_NOT_FOUND,
    "RevisionNotFound": Reason.REVISION_NOT_FOUND,
}
"""X-Error-Code of the Hub's answers that no further try will change."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit, and who asks for it."""

    endpoint: str
    repo_id: RepoId
    commit: Commit
    entry: FileEntry
    token: str | None = field(repr=False)

    @property
    def url(self) -> str:
        """The resolve address."""
        return f"{self.endpoint}/{self.repo_id}/resolve/{self.commit}/{quote(self.entry.path)}"

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}/{self.entry.path}"


class HttpSource:
    """Ranges of files from an endpoint and wherever it sends us. Thread-safe."""

    def __init__(self, *, network: Network, stall_timeout_seconds: float, user_agent: str) -> None:
        self._timeout = stall_timeout_seconds
        self.stalls = StallWatch(stall_timeout_seconds)
        self._user_agent = user_agent
        self._connections = Connections(network, stall_timeout_seconds)
        self._locations: dict[RemoteFile, str] = {}
        self._etags: dict[RemoteFile, set[str]] = {}
        self._lock = threading.Lock()

    def fetch(self, file: RemoteFile, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """Hands the bytes [start, end) to the sink in order.

        Raises TransientError where another try may help, CacheError where none does, AbortedError.
        """
        with self.stalls.over(abort):
            try:
                connection, response, url = self._open(file, start, end, abort)
            except (OSError, http.client.HTTPException, ValueError) as error:
                # ValueError: an address in a redirect that is none.
                raise self._transient(error, file, abort) from error
            reusable = False
            try:
                receive(connection, response, start, end, sink, abort)
                if response.read(1):
                    raise TransientError(
                        Reason.DIGEST_MISMATCH, f"{file}: upstream sends more than the {end - start} bytes asked"
                    )
                reusable = response.isclosed() and not response.will_close
            except EarlyEndError as error:
                if abort.is_set or abort.stalled:
                    raise self._transient(error, file, abort) from error
                raise TransientError(
                    Reason.UPSTREAM_UNAVAILABLE, f"{file}: the connection ended {error.missing_bytes} bytes early"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                raise self._transient(error, file, abort) from error
            finally:
                abort.attach(None)
                if reusable:
                    self._connections.keep(connection, url)
                else:
                    connection.close()

    def forget(self, file: RemoteFile) -> None:
        """The file is done, or its content was wrong: what was learnt about it is void."""
        with self._lock:
            self._locations.pop(file, None)
            self._etags.pop(file, None)

    def close(self, *, idle_seconds: float = 0.0) -> None:
        """Closes the connections that nobody has used for so long."""
        self._connections.close(idle_seconds=idle_seconds)

    # One request

    def _open(
        self, file: RemoteFile, start: int, end: int, abort: Abort
    ) -> tuple[Connection, http.client.HTTPResponse, str]:
        with self._lock:
            url = self._locations.get(file, file.url)
        for _ in range(_MAX_REDIRECTS):
            try:
                connection, response = self._request(url, file, start, end, abort)
            except (OSError, http.client.HTTPException, ValueError):
                self._leave(file, url)
                raise
            if response.status in _REDIRECTS:
                location = response.headers.get("Location", "")
                self._finish(connection, response, url, abort)
                url = urljoin(url, location)
                if urlsplit(url).scheme not in ("http", "https"):
                    raise TransientError(Reason.UPSTREAM_UNAVAILABLE, f"{file} is redirected to no http address")
                with self._lock:
                    self._locations[file] = url
                continue
            try:
                self._check(response, file, start, end, url)
            except BaseException:
                connection.close()
                abort.attach(None)
                raise
            return connection, response, url
        raise TransientError(Reason.UPSTREAM_UNAVAILABLE, f"{file} is redirected more than {_MAX_REDIRECTS} times")

    def _leave(self, file: RemoteFile, url: str) -> None:
        """Nobody answers there: the next try asks the endpoint, which may send us elsewhere."""
        with self._lock:
            if self._locations.get(file) == url:
                del self._locations[file]

    def _finish(self, connection: Connection, response: http.client.HTTPResponse, url: str, abort: Abort) -> None:
        """A redirect is read; its connection is no longer this fetch's, so its abort must not reach it."""
        reusable = False
        try:
            if response.length is not None and response.length <= _MAX_REDIRECT_BODY_BYTES:
                response.read()
                reusable = not response.will_close
        finally:
            abort.attach(None)
            if reusable:
                self._connections.keep(connection, url)
            else:
                connection.close()

    def _request(
        self, url: str, file: RemoteFile, start: int, end: int, abort: Abort
    ) -> tuple[Connection, http.client.HTTPResponse]:
        parts = urlsplit(url)
        headers = {"User-Agent": self._user_agent, "Accept-Encoding": "identity"}
        if file.entry.size_bytes:
            headers["Range"] = f"bytes={start}-{end - 1}"
        if file.token and (parts.scheme, parts.netloc) == urlsplit(file.endpoint)[:2]:
            headers["Authorization"] = f"Bearer {file.token}"
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection, reused = self._connections.take(parts.scheme, parts.netloc)
        while True:
            try:
                if connection.sock is None:
                    connection.connect()
                abort.attach(connection.wire)
                if abort.is_set:
                    raise AbortedError
                connection.get(target, headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                abort.attach(None)
                if not reused or abort.is_set or abort.stalled or isinstance(error, TimeoutError):
                    raise
                # The server closed it while it lay idle: that is no failure of this request.
                connection, reused = self._connections.new(parts.scheme, parts.netloc), False
            except BaseException:
                connection.close()
                abort.attach(None)
                raise

    def _check(self, response: http.client.HTTPResponse, file: RemoteFile, start: int, end: int, url: str) -> None:
        size = file.entry.size_bytes
        status = response.status
        if status == http.client.PARTIAL_CONTENT:
            expected = f"bytes {start}-{end - 1}/{size}"
            said = response.headers.get("Content-Range", "")
            if said != expected:
                self.forget(file)
                raise TransientError(
                    Reason.UPSTREAM_UNAVAILABLE, f"{file}: asked for {expected!r}, upstream answered {said!r}"
                )
        elif status == http.client.OK:
            if (start, end) != (0, size):
                self.forget(file)
                raise TransientError(
                    Reason.UPSTREAM_UNAVAILABLE, f"{file}: upstream ignores ranges (200 where a 206 was asked)"
                )
            if response.length is not None and response.length != size:
                self.forget(file)
                raise TransientError(
                    Reason.DIGEST_MISMATCH, f"{file}: upstream sends {response.length} bytes, the manifest says {size}"
                )
        else:
            raise self._refused(response, file, url)
        self._check_version(response.headers.get("ETag"), file)

    def _check_version(self, etag: str | None, file: RemoteFile) -> None:
        """Another ETag than before is asked about once more, by a fresh address, and then taken.

        A mirror's replicas each have ETags of their own, one server of a CDN may be stale: whether the bytes are
        right is the digest's to say. To begin anew for an ETag would cost what is there for nothing.
        """
        if etag is None:
            return
        with self._lock:
            known = self._etags.setdefault(file, {etag})
            if etag in known:
                return
            before = next(iter(known))
            known.add(etag)
            self._locations.pop(file, None)
        raise TransientError(
            Reason.UPSTREAM_UNAVAILABLE, f"{file} changed upstream in mid-transfer (ETag {before} became {etag})"
        )

    def _refused(self, response: http.client.HTTPResponse, file: RemoteFile, url: str) -> CacheError | TransientError:
        status = response.status
        code = response.headers.get("X-Error-Code", "")
        at_endpoint = urlsplit(url)[:2] == urlsplit(file.endpoint)[:2]
        self.forget(file)  # a signed address that has expired answers 403: ask for another
        who = "the token given" if file.token else "no token"
        if at_endpoint and (final := _FINAL.get(code)) is not None:
            return CacheError(final, f"{file.endpoint} does not give {file} to {who} ({status} {code})")
        if at_endpoint and status == http.client.UNAUTHORIZED:
            return CacheError(Reason.TOKEN_REJECTED, f"{file.endpoint} does not give {file} to {who} (401)")
        if at_endpoint and status == http.client.FORBIDDEN:
            return CacheError(Reason.GATED_REPO, f"{file.endpoint} forbids {file} to {who} (403)")
        if status == http.client.TOO_MANY_REQUESTS:
            return TransientError(
                Reason.RATE_LIMITED,
                f"upstream limits our rate (429) for {file}",
                retry_after=retry_after(dict(response.headers)),
            )
        return TransientError(
            Reason.UPSTREAM_UNAVAILABLE,
            f"upstream answered {status} for {file}",
            retry_after=retry_after(dict(response.headers)),
        )

    def _transient(self, error: Exception, file: RemoteFile, abort: Abort) -> Exception:
        if abort.is_set:
            return AbortedError()
        if abort.stalled:
            why = (
                f"{file}: upstream sent less than {FLOOR_BYTES_PER_SECOND} bytes a second "
                f"for {self._timeout:g} s (transfer.stall_timeout)"
            )
            return TransientError(Reason.UPSTREAM_STALLED, why)
        if isinstance(error, TimeoutError):
            why = f"{file}: upstream sent nothing within {self._timeout:g} s (transfer.stall_timeout)"
            return TransientError(Reason.UPSTREAM_STALLED, why)
        return TransientError(Reason.UPSTREAM_UNAVAILABLE, f"{file}: {str(error) or type(error).__name__}")

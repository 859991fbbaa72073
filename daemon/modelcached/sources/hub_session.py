"""huggingface_hub's own session, headers, errors and RepoFile, as the Hub's API is asked through them.

Loaded with the first question (hub.py): it takes a fifth of all the time that the daemon is loaded in.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

# Read at import by huggingface_hub/constants.py: no call may leave that nobody asked for.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # noqa: S105 - a switch, not a token

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status, set_client_factory

from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Digest, FileEntry, RepoId, Revision
from modelcached.sources.faults import TransientError, retry_after
from modelcached.sources.network import Network
from modelcached.sources.proxies import DEFAULT_PORTS, Proxy

_CONNECT_TIMEOUT_SECONDS = 5.0
_MAX_PAGE_BYTES = 64 << 20


class HubSession:
    """The way to one endpoint. Blocking."""

    def __init__(self, endpoint: str, network: Network, version: str) -> None:
        self._endpoint = endpoint
        self._version = version
        set_client_factory(lambda: _client(network))

    def headers(self, token: str | None) -> dict[str, str]:
        """What every request says; anonymous means that no token is sent, not the machine's own."""
        return build_hf_headers(token=token or False, library_name="modelcached", library_version=self._version)

    def ask(self, url: str, token: str | None, timeout: timedelta, *, follow: bool = True) -> httpx2.Response:
        """Whatever it answers. Raises TransientError where it does not."""
        with _told(self._endpoint, timeout.total_seconds()):
            own, limits = self.headers(token), _limits(timeout)
            return get_session().get(url, headers=own, timeout=limits, follow_redirects=follow)

    def get(
        self, url: str, token: str | None, timeout: timedelta, repo_id: RepoId, revision: Revision
    ) -> httpx2.Response:
        """An answer that is none of its refusals. Raises CacheError where those are final, else TransientError."""
        try:
            with _told(self._endpoint, timeout.total_seconds()):
                response = get_session().get(url, headers=self.headers(token), timeout=_limits(timeout))
                hf_raise_for_status(response)
        except HfHubHTTPError as error:
            raise _refusal(error, self._endpoint, repo_id, revision, token) from error
        if len(response.content) > _MAX_PAGE_BYTES:
            raise CacheError(Reason.INVALID_MANIFEST, f"{self._endpoint} sent a page of {len(response.content)} bytes")
        return response

    @staticmethod
    def entry(item: dict[str, Any]) -> FileEntry:
        """A tree entry; RepoFile is the library's own reading of it (hf_api.py)."""
        # Its module is a fifth of all that the daemon imports, and not needed before something is listed.
        from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415

        file = RepoFile(**item)  # type: ignore[no-untyped-call]
        if file.lfs is not None:
            digest = Digest.parse(file.lfs.sha256)
            size = file.lfs.size
        else:
            digest, size = Digest.parse(file.blob_id), file.size
        if digest is None or (digest.algorithm is Algorithm.SHA256) != (file.lfs is not None) or size < 0:
            raise ValueError(file.path)
        return FileEntry(file.path, size, digest, file.blob_id, file.xet_hash)


class _Transport(httpx2.BaseTransport):
    """The library's own connections, by the same certificates and proxies as the bytes take (httpx2 reads others)."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._direct = httpx2.HTTPTransport(verify=network.tls)
        self._through = {
            proxy: httpx2.HTTPTransport(
                verify=network.tls, proxy=httpx2.Proxy(proxy.url, headers=_authorization(proxy))
            )
            for proxy in network.proxies.by_scheme.values()
        }

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends it on its way."""
        url = request.url
        proxy = self._network.proxies.to(url.scheme, url.host, url.port or DEFAULT_PORTS.get(url.scheme, 0))
        if proxy is None:
            return self._direct.handle_request(request)
        try:
            return self._through[proxy].handle_request(request)
        except httpx2.TransportError as error:
            raise type(error)(f"{error} (the proxy {proxy})") from error

    def close(self) -> None:
        """Ends all connections."""
        for transport in (self._direct, *self._through.values()):
            transport.close()


def _authorization(proxy: Proxy) -> dict[str, str]:
    return {} if proxy.authorization is None else {"Proxy-Authorization": proxy.authorization}


def _client(network: Network) -> httpx2.Client:
    # The library's default has no timeout at all (utils/_http.py, default_client_factory).
    timeout = httpx2.Timeout(30.0, connect=_CONNECT_TIMEOUT_SECONDS)
    return httpx2.Client(follow_redirects=True, timeout=timeout, transport=_Transport(network))


def _limits(timeout: timedelta) -> httpx2.Timeout:
    seconds = timeout.total_seconds()
    return httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_TIMEOUT_SECONDS))


@contextlib.contextmanager
def _told(endpoint: str, seconds: float) -> Iterator[None]:
    """Why nothing was answered, as TransientError; an answer that is an error passes."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except httpx2.TimeoutException as error:
        told = f"{endpoint} did not answer within {seconds:.1f} s (hub.timeout)"
        raise TransientError(Reason.UPSTREAM_STALLED, told) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        told = f"{endpoint} cannot be reached: {error or type(error).__name__}"
        raise TransientError(Reason.UPSTREAM_UNAVAILABLE, told) from error


def _refusal(  # noqa: PLR0911 - one line of the Hub's table each
    error: HfHubHTTPError, endpoint: str, repo_id: RepoId, revision: Revision, token: str | None
) -> CacheError | TransientError:
    status = error.response.status_code
    lets = "the token given does not let us" if token else "there is no token to"
    who = "the token given" if token else "no token"
    if isinstance(error, GatedRepoError):
        return CacheError(Reason.GATED_REPO, f"{repo_id} is gated, and {lets} read it", metadata={"repo_id": repo_id})
    if status == httpx2.codes.UNAUTHORIZED and token and not isinstance(error, RepositoryNotFoundError):
        return CacheError(Reason.TOKEN_REJECTED, f"{endpoint} rejects the token for {repo_id} (401)")
    if isinstance(error, RepositoryNotFoundError):
        # The Hub answers 401 or 404 alike for what is private and for what is not there.
        if status == httpx2.codes.UNAUTHORIZED and _says_bad_token(error):
            return CacheError(Reason.TOKEN_REJECTED, f"{endpoint} rejects the token for {repo_id} (401)")
        return CacheError(
            Reason.REPO_NOT_FOUND,
            f"{repo_id} does not exist on {endpoint}, or {lets} see it",
            metadata={"repo_id": repo_id},
        )
    if isinstance(error, RevisionNotFoundError):
        return CacheError(
            Reason.REVISION_NOT_FOUND, f"{repo_id} has no revision {revision}", metadata={"revision": revision}
        )
    if status == httpx2.codes.UNAUTHORIZED:
        return CacheError(Reason.TOKEN_REJECTED, f"{endpoint} wants a token for {repo_id} (401)")
    if status == httpx2.codes.FORBIDDEN:
        return CacheError(Reason.GATED_REPO, f"{endpoint} forbids {repo_id} to {who} (403)")
    if status == httpx2.codes.TOO_MANY_REQUESTS:
        return TransientError(
            Reason.RATE_LIMITED, f"{endpoint} limits our rate (429)", retry_after=retry_after(error.response.headers)
        )
    return TransientError(
        Reason.UPSTREAM_UNAVAILABLE,
        f"{endpoint} answered {status} for {repo_id}",
        retry_after=retry_after(error.response.headers),
    )


def _says_bad_token(error: HfHubHTTPError) -> bool:
    said = error.response.headers.get("X-Error-Message", "") + error.response.headers.get("WWW-Authenticate", "")
    return "invalid" in said.lower() and ("token" in said.lower() or "credential" in said.lower())

"""The Hub's API: which commit a revision means, and what that commit holds.

Built from huggingface_hub's own session, headers, errors and RepoFile, but not
from HfApi.list_repo_tree: that one has no timeout, and retries by itself for
half a minute, out of reach of our deadlines (2.4.0, utils/_pagination.py).
Blocking: call it from a Hub thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

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
from modelcached.model import (
    Algorithm,
    Commit,
    Digest,
    FileEntry,
    Manifest,
    RepoId,
    Revision,
    as_commit,
    shown,
)
from modelcached.sources.faults import TransientError, retry_after
from modelcached.sources.network import Network
from modelcached.sources.proxies import DEFAULT_PORTS, Proxy

_CONNECT_TIMEOUT_SECONDS = 5.0
_MAX_PAGE_BYTES = 64 << 20


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


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a revision means now."""

    commit: Commit
    restricted: bool
    """Gated or private."""


@dataclass(frozen=True, slots=True)
class XetToken:
    """Where a repository's Xet files are, and the right to read them."""

    cas_url: str
    access_token: str = field(repr=False)
    expires: int
    """Seconds since the epoch."""


class HubApi:
    """One endpoint that speaks the Hub's API."""

    def __init__(self, endpoint: str, *, network: Network, version: str, max_files: int) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._version = version
        self._max_files = max_files
        set_client_factory(lambda: _client(network))

    def headers(self, token: str | None) -> dict[str, str]:
        """What every request says; anonymous means that no token is sent, not the machine's own."""
        return build_hf_headers(token=token or False, library_name="modelcached", library_version=self._version)

    def resolve(self, repo_id: RepoId, revision: Revision, token: str | None, timeout: timedelta) -> Resolved:
        """The commit that the revision means now. Raises CacheError where the answer is final, else TransientError."""
        url = f"{self.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
        data = self._get(url, token, timeout, repo_id, revision).json()
        commit = as_commit(str(data.get("sha", ""))) if isinstance(data, dict) else None
        if commit is None:
            raise TransientError(
                Reason.UPSTREAM_UNAVAILABLE, f"{self.endpoint} named no commit for {repo_id}@{revision}"
            )
        return Resolved(commit, bool(data.get("gated")) or bool(data.get("private")))

    def check_access(self, repo_id: RepoId, token: str | None, timeout: timedelta) -> None:
        """Raises CacheError(GATED_REPO or REPO_NOT_FOUND) where the token may not read the repository."""
        self._get(f"{self.endpoint}/api/models/{repo_id}/auth-check", token, timeout, repo_id, Revision("main"))

    def ping(self, timeout: timedelta) -> None:
        """Whether anything answers, whatever it says. Raises TransientError."""
        with _told(self.endpoint, timeout.total_seconds()):
            own, limits = self.headers(None), _limits(timeout)
            get_session().get(self.endpoint, headers=own, timeout=limits, follow_redirects=False)

    def whoami(self, token: str, timeout: timedelta) -> str:
        """Whose the token is. Raises CacheError(TOKEN_REJECTED), or TransientError."""
        with _told(self.endpoint, timeout.total_seconds()):
            url = f"{self.endpoint}/api/whoami-v2"
            response = get_session().get(url, headers=self.headers(token), timeout=_limits(timeout))
        if response.status_code in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
            raise CacheError(Reason.TOKEN_REJECTED, f"{self.endpoint} rejects the token ({response.status_code})")
        try:
            return shown(str(response.json()["name"]))
        except (ValueError, KeyError, TypeError) as error:
            told = f"{self.endpoint} answered {response.status_code} to whoami, and named nobody"
            raise TransientError(Reason.UPSTREAM_UNAVAILABLE, told) from error

    def xet_token(self, repo_id: RepoId, commit: Commit, token: str | None, timeout: timedelta) -> XetToken:
        """What the commit's Xet files are read with; the caller's own token goes no further than here."""
        url = f"{self.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
        response = self._get(url, token, timeout, repo_id, Revision(commit))
        try:
            data = response.json()
            found = XetToken(str(data["casUrl"]), str(data["accessToken"]), int(data["exp"]))
        except (ValueError, KeyError, TypeError) as error:
            raise TransientError(
                Reason.UPSTREAM_UNAVAILABLE, f"{self.endpoint} gave a Xet token in a form that is not the Hub's"
            ) from error
        schemes = ("https",) if urlsplit(self.endpoint).scheme == "https" else ("http", "https")
        if urlsplit(found.cas_url).scheme not in schemes:
            raise TransientError(
                Reason.UPSTREAM_UNAVAILABLE, f"{self.endpoint} names the Xet store {shown(found.cas_url)}"
            )
        return found

    def manifest(
        self, repo_id: RepoId, commit: Commit, token: str | None, timeout: timedelta, *, restricted: bool
    ) -> Manifest:
        """Every file of the commit, in one listing of as many pages as it takes."""
        deadline = time.monotonic() + timeout.total_seconds()
        url: str | None = f"{self.endpoint}/api/models/{repo_id}/tree/{commit}?recursive=true&expand=false"
        files: list[FileEntry] = []
        while url is not None:
            left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
            response = self._get(url, token, left, repo_id, Revision(commit))
            try:
                files += [_entry(item) for item in response.json() if item.get("type") == "file"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TransientError(
                    Reason.UPSTREAM_UNAVAILABLE, f"{self.endpoint} listed {repo_id} in a form that is not the Hub's"
                ) from error
            if len(files) > self._max_files:
                raise CacheError(
                    Reason.INVALID_MANIFEST,
                    f"{repo_id}@{commit[:12]} has more than {self._max_files} files (hub.max_files)",
                    metadata={"limit": self._max_files},
                )
            url = self._next_page(response, url)
        return Manifest.of(repo_id, commit, files, restricted=restricted)

    def _next_page(self, response: httpx2.Response, url: str) -> str | None:
        link = response.links.get("next", {}).get("url")
        if link is None:
            return None
        following = urljoin(url, link)
        # The token goes with it: never to another host.
        if urlsplit(following)[:2] != urlsplit(self.endpoint)[:2]:
            raise TransientError(
                Reason.UPSTREAM_UNAVAILABLE, f"{self.endpoint} sends the next page to another host: {shown(following)}"
            )
        return following

    def _get(
        self, url: str, token: str | None, timeout: timedelta, repo_id: RepoId, revision: Revision
    ) -> httpx2.Response:
        try:
            with _told(self.endpoint, timeout.total_seconds()):
                response = get_session().get(url, headers=self.headers(token), timeout=_limits(timeout))
                hf_raise_for_status(response)
        except HfHubHTTPError as error:
            raise _refusal(error, self.endpoint, repo_id, revision, token) from error
        if len(response.content) > _MAX_PAGE_BYTES:
            raise CacheError(Reason.INVALID_MANIFEST, f"{self.endpoint} sent a page of {len(response.content)} bytes")
        return response


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


def _entry(item: dict[str, Any]) -> FileEntry:
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

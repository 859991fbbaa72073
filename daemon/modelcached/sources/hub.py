"""The Hub's API: which commit a revision means, and what that commit holds.

Built from huggingface_hub's own session, headers, errors and RepoFile, but not
from HfApi.list_repo_tree: that one has no timeout, and retries by itself for
half a minute, out of reach of our deadlines (2.4.0, utils/_pagination.py).
Blocking: call it from a Hub thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from modelcached.errors import CacheError, Reason
from modelcached.model import Commit, FileEntry, Manifest, RepoId, Revision, as_commit, shown
from modelcached.sources.faults import TransientError
from modelcached.sources.network import Network

if TYPE_CHECKING:
    import httpx2

    from modelcached.sources.hub_session import HubSession


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
        self._network = network

    @cached_property
    def _session(self) -> HubSession:
        from modelcached.sources.hub_session import HubSession  # noqa: PLC0415 - see there

        return HubSession(self.endpoint, self._network, self._version)

    def resolve(self, repo_id: RepoId, revision: Revision, token: str | None, timeout: timedelta) -> Resolved:
        """The commit that the revision means now. Raises CacheError where the answer is final, else TransientError."""
        url = f"{self.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
        data = self._session.get(url, token, timeout, repo_id, revision).json()
        commit = as_commit(str(data.get("sha", ""))) if isinstance(data, dict) else None
        if commit is None:
            raise TransientError(
                Reason.UPSTREAM_UNAVAILABLE, f"{self.endpoint} named no commit for {repo_id}@{revision}"
            )
        return Resolved(commit, bool(data.get("gated")) or bool(data.get("private")))

    def check_access(self, repo_id: RepoId, token: str | None, timeout: timedelta) -> None:
        """Raises CacheError(GATED_REPO or REPO_NOT_FOUND) where the token may not read the repository."""
        self._session.get(f"{self.endpoint}/api/models/{repo_id}/auth-check", token, timeout, repo_id, Revision("main"))

    def ping(self, timeout: timedelta) -> None:
        """Whether anything answers, whatever it says. Raises TransientError."""
        self._session.ask(self.endpoint, None, timeout, follow=False)

    def whoami(self, token: str, timeout: timedelta) -> str:
        """Whose the token is. Raises CacheError(TOKEN_REJECTED), or TransientError."""
        response = self._session.ask(f"{self.endpoint}/api/whoami-v2", token, timeout)
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise CacheError(Reason.TOKEN_REJECTED, f"{self.endpoint} rejects the token ({response.status_code})")
        try:
            return shown(str(response.json()["name"]))
        except (ValueError, KeyError, TypeError) as error:
            told = f"{self.endpoint} answered {response.status_code} to whoami, and named nobody"
            raise TransientError(Reason.UPSTREAM_UNAVAILABLE, told) from error

    def xet_token(self, repo_id: RepoId, commit: Commit, token: str | None, timeout: timedelta) -> XetToken:
        """What the commit's Xet files are read with; the caller's own token goes no further than here."""
        url = f"{self.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
        response = self._session.get(url, token, timeout, repo_id, Revision(commit))
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
            response = self._session.get(url, token, left, repo_id, Revision(commit))
            try:
                files += [self._session.entry(item) for item in response.json() if item.get("type") == "file"]
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

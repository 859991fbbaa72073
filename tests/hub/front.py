"""The first address: the API and the resolve URLs, with the real Hub's rules of access and its errors."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs, quote, unquote, urlencode

from . import listing
from .cas import Cas
from .cdn import cdn_path
from .exchange import Exchange, Site, UnsatisfiableRangeError, parse_range
from .faults import FaultTarget
from .repos import Commit, Repo, UnknownRevisionError

_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_MODELS = "/api/models/"
_ROUTES = frozenset({"revision", "tree", "auth-check", "refs", "commits", "paths-info", "xet-read-token"})
_EXPANDED_PAGE_SIZE = 50


class FrontSite(Site, Protocol):
    """What the first address needs on top."""

    tokens: set[str]
    page_size: int
    endpoint: str
    cdn_endpoint: str
    cas: Cas
    cas_endpoint: str

    def find_repo(self, repo_id: str) -> Repo | None: ...

    def new_name_of(self, repo_id: str) -> str | None: ...

    def control(self, method: str, route: str) -> object | None:
        """The Hub's own pages under /_hub/ (command line only); None where there is none."""


@dataclass(eq=False)
class HubError(Exception):
    """An error as the Hub words it; the client decides by `code` (X-Error-Code), not by the status."""

    status: int
    code: str | None
    message: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, status: int, code: str | None, message: str, **headers: str) -> HubError:
        return cls(status, code, message, {name.replace("_", "-"): value for name, value in headers.items()})


class FrontExchange(Exchange):
    """Everything under HF_ENDPOINT."""

    site: FrontSite

    def target(self) -> FaultTarget:
        match = _RESOLVE.fullmatch(self.raw_path)
        if match is not None and not self.raw_path.startswith("/api/"):
            found = FaultTarget("resolve", self.command, unquote(match["repo"]), unquote(match["file"]))
            return self._ranged(found)
        repo_id, route, _ = self._api_route()
        return FaultTarget("token" if route == "xet-read-token" else "api", self.command, repo_id, route)

    def answer(self, target: FaultTarget) -> None:
        try:
            new_name = self.site.new_name_of(target.repo)
            if new_name is not None:
                self.plain(307, {"Location": self.path.replace(f"/{target.repo}", f"/{new_name}", 1)})
            elif self.raw_path.startswith("/_hub/"):
                self._control()
            elif target.kind == "resolve":
                self._resolve()
            else:
                self._api()
        except HubError as error:
            self._refuse(error)

    def _api_route(self) -> tuple[str, str, list[str]]:
        """Repo id, route and what follows it, unquoted; repo ids have an organisation or not."""
        if not self.raw_path.startswith(_MODELS):
            return "", self.raw_path.rpartition("/")[2], []
        parts = [unquote(part) for part in self.raw_path.removeprefix(_MODELS).split("/")]
        if len(parts) == 1 or (parts[1] in _ROUTES and self.site.find_repo("/".join(parts[:2])) is None):
            repo_id, rest = parts[0], parts[1:]
        else:
            repo_id, rest = "/".join(parts[:2]), parts[2:]
        return (repo_id, rest[0], rest[1:]) if rest else (repo_id, "info", [])

    def _api(self) -> None:
        token = self._token()
        repo_id, route, rest = self._api_route()
        if self.raw_path == "/api/whoami-v2":
            self._whoami(token)
            return
        if self.raw_path == "/api/agent-harnesses":  # the command line client asks once a day
            self.json({"standardEnvVars": [], "harnesses": {}})
            return
        if not self.raw_path.startswith(_MODELS):
            raise HubError.of(404, None, "Sorry, we can't find the page you are looking for.")
        repo = self._readable_repo(repo_id, token)
        options = parse_qs(self.query)
        match route:
            case "info" | "revision":
                commit = self._commit(repo, rest[0] if rest else "main")
                info = listing.model_info(repo, commit, blobs=_truth(options, "blobs"))
                wanted = options.get("expand")
                self.json({name: info.get(name) for name in ("_id", "id", *wanted)} if wanted else info)
            case "tree":
                self._tree(repo, rest, options)
            case "auth-check":
                self._check_gate(repo, token)
                if rest == ["write"]:
                    raise HubError.of(403, None, "You don't have the required permissions to write to this repo.")
                self.plain(200, {"Content-Type": "text/plain; charset=utf-8"}, b"OK")
            case "refs":
                self.json(listing.refs(repo, include_pull_requests=_truth(options, "include_prs")))
            case "commits":
                commits = repo.history(self._commit(repo, rest[0]).sha)
                self.json([listing.commit_entry(commit) for commit in commits])
            case "paths-info":
                self._paths_info(repo, rest)
            case "xet-read-token":
                self._check_gate(repo, token)
                self._commit(repo, rest[0] if rest else "main")
                self._xet_token(repo)
            case _:
                raise HubError.of(404, None, "Sorry, we can't find the page you are looking for.")

    def _tree(self, repo: Repo, rest: list[str], options: Mapping[str, list[str]]) -> None:
        commit = self._commit(repo, rest[0] if rest else "main")
        recursive, expand = _truth(options, "recursive"), _truth(options, "expand")
        entries = listing.tree(repo, commit, "/".join(rest[1:]), recursive=recursive, expand=expand)
        if entries is None:
            raise HubError.of(404, "EntryNotFound", f"{'/'.join(rest[1:])} does not exist on {rest[0]!r}")
        page_size = min(self.site.page_size, _EXPANDED_PAGE_SIZE) if expand else self.site.page_size
        page_size = min(page_size, int(options["limit"][0])) if "limit" in options else page_size
        start = _offset(options.get("cursor", [""])[0])
        headers = {}
        if start + page_size < len(entries):
            kept = {name: values[0] for name, values in options.items()} | {"cursor": _cursor(start + page_size)}
            headers["Link"] = f'<{self.site.endpoint}{self.raw_path}?{urlencode(kept)}>; rel="next"'
        self.json(entries[start : start + page_size], headers)

    def _paths_info(self, repo: Repo, rest: list[str]) -> None:
        if "json" in (self.headers.get("Content-Type") or ""):
            form = json.loads(self.request_body)
            paths, expand = list(form["paths"]), bool(form.get("expand"))
        else:
            fields = parse_qs(self.request_body.decode())
            paths, expand = fields.get("paths", []), _truth(fields, "expand")
        self.json(listing.paths_info(self._commit(repo, rest[0]), paths, expand=expand))

    def _xet_token(self, repo: Repo) -> None:
        """huggingface_hub reads the headers, hf_xet the JSON."""
        token, ends = self.site.cas.issue(repo.repo_id)
        headers = {
            "X-Xet-Cas-Url": self.site.cas_endpoint,
            "X-Xet-Access-Token": token,
            "X-Xet-Token-Expiration": str(ends),
        }
        self.json({"casUrl": self.site.cas_endpoint, "accessToken": token, "exp": ends}, headers)

    def _resolve(self) -> None:
        match = _RESOLVE.fullmatch(self.raw_path)
        assert match is not None
        path = unquote(match["file"])
        token = self._token()
        repo = self._readable_repo(unquote(match["repo"]), token)
        self._check_gate(repo, token)
        commit = self._commit(repo, unquote(match["revision"]))
        file = repo.file_at(commit, path)
        if file is None:
            raise HubError.of(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit.sha)
        etag = self.etag(file.etag)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if file.sha256 is not None:
            signed = self.site.signer.sign(cdn_path(repo.repo_id, file.sha256, path))
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(file.size), "Content-Type": "text/plain"}
            if file.xet_hash is not None and self.site.cas.holds(file.xet_hash):
                refresh = f"{self.site.endpoint}{_MODELS}{repo.repo_id}/xet-read-token/{commit.sha}"
                headers |= {"X-Xet-Hash": file.xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'}
            self.plain(302, headers | {"Location": self.site.cdn_endpoint + signed}, b"Found. Redirecting")
            return
        headers |= {"ETag": etag, "Content-Type": "text/plain; charset=utf-8"}
        headers["Content-Disposition"] = f'inline; filename="{quote(path.rpartition("/")[2])}";'
        try:
            span = parse_range(self.headers.get("Range"), file.size) if self.command == "GET" else None
        except UnsatisfiableRangeError:
            raise HubError.of(416, None, "Range not satisfiable", Content_Range=f"bytes */{file.size}") from None
        self.deliver(file.body, headers, span)

    def _whoami(self, token: str | None) -> None:
        if token is None:
            raise HubError.of(401, None, "Invalid username or password.")
        self.json(listing.whoami(token))

    def _control(self) -> None:
        answer = self.site.control(self.command, self.raw_path.removeprefix("/_hub/"))
        if answer is None:
            raise HubError.of(404, None, "no such page of the test Hub")
        self.json(answer)

    def _token(self) -> str | None:
        """The token sent, None without one; a token nobody issued is refused even for public repos."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ").strip()
        if token not in self.site.tokens:
            raise HubError.of(401, None, "Invalid credentials in Authorization header")
        return token

    def _readable_repo(self, repo_id: str, token: str | None) -> Repo:
        """Private and unknown repos look alike: 401 to strangers, 404 to those who are logged in."""
        repo = self.site.find_repo(repo_id)
        if repo is not None and (not repo.private or repo.is_allowed(token)):
            return repo
        if token is None:
            raise HubError.of(401, "RepoNotFound", "Invalid username or password.")
        raise HubError.of(404, "RepoNotFound", "Repository not found")

    def _check_gate(self, repo: Repo, token: str | None) -> None:
        """Files of a gated repo need an accepted token; its listings are public."""
        if not repo.gated or repo.is_allowed(token):
            return
        what = f"Access to model {repo.repo_id} is restricted"
        if token is None:
            need = "You must have access to it and be authenticated to access it. Please log in."
            raise HubError.of(401, "GatedRepo", f"{what}. {need}")
        where = f"Visit {self.site.endpoint}/{repo.repo_id} to ask for access."
        raise HubError.of(403, "GatedRepo", f"{what} and you are not in the authorized list. {where}")

    def _commit(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.resolve(revision)
        except UnknownRevisionError:
            raise HubError.of(404, "RevisionNotFound", f"Invalid rev id: {quote(revision)}") from None

    def _refuse(self, error: HubError) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": error.message}
        if error.code is not None:
            headers["X-Error-Code"] = error.code
        headers["X-Request-Id"] = f"test-hub-{self._number}"
        self.plain(error.status, headers | dict(error.headers), json.dumps({"error": error.message}).encode())


def _truth(options: Mapping[str, list[str]], name: str) -> bool:
    return options.get(name, ["false"])[0].lower() in ("true", "1")


def _cursor(offset: int) -> str:
    return base64.urlsafe_b64encode(f"offset:{offset}".encode()).decode()


def _offset(cursor: str) -> int:
    return int(base64.urlsafe_b64decode(cursor).removeprefix(b"offset:")) if cursor else 0

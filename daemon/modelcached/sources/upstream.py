"""All places upstream that a file may come from, in order of preference."""

from __future__ import annotations

from modelcached.model import FileEntry, SnapshotId
from modelcached.sources.endpoints import Endpoints
from modelcached.sources.http import HttpSource, RemoteFile
from modelcached.sources.origin import HubOrigin, Origin
from modelcached.sources.own_token import OwnToken
from modelcached.sources.xet import XetSource


class Upstream:
    """The Hub and its mirrors."""

    def __init__(self, endpoints: Endpoints, http: HttpSource, xet: XetSource, own_token: OwnToken) -> None:
        self._endpoints = endpoints
        self._http = http
        self._xet = xet
        self._own_token = own_token

    def origins(self, snapshot: SnapshotId, entry: FileEntry, token: str | None) -> list[Origin]:
        """The Xet store where the Hub keeps the file there, then the endpoints over HTTP.

        A token belongs to the first endpoint's host and goes nowhere else.
        """
        first, token = self._endpoints.first, self._own_token.worth_sending(token)
        files = {
            name: RemoteFile(name, snapshot.repo_id, snapshot.commit, entry, token if name == first else None)
            for name in self._endpoints.names
        }
        over_http = HubOrigin(self._http, self._endpoints, files)
        over_xet = self._xet.origin(files[first])
        return [over_xet, over_http] if over_xet is not None else [over_http]

"""All places upstream that a file may come from, in order of preference."""

from __future__ import annotations

from collections.abc import Sequence

from modelcached.model import FileEntry, SnapshotId
from modelcached.sources.http import HttpSource, RemoteFile
from modelcached.sources.origin import HubOrigin, Origin
from modelcached.sources.xet import XetSource


class Upstream:
    """The Hub and its mirrors."""

    def __init__(self, endpoints: Sequence[str], http: HttpSource, xet: XetSource) -> None:
        self._endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._http = http
        self._xet = xet

    def origins(self, snapshot: SnapshotId, entry: FileEntry, token: str | None) -> list[Origin]:
        """The Xet store where the Hub keeps the file there, then each endpoint over HTTP.

        A token belongs to the first endpoint's host and goes nowhere else.
        """
        files = [
            RemoteFile(endpoint, snapshot.repo_id, snapshot.commit, entry, token if number == 0 else None)
            for number, endpoint in enumerate(self._endpoints)
        ]
        over_http: list[Origin] = [HubOrigin(self._http, file) for file in files]
        over_xet = self._xet.origin(files[0])
        return [over_xet, *over_http] if over_xet is not None else over_http

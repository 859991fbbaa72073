"""The second address: LFS bodies behind signed URLs. Knows no tokens; records one if it is sent."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from .content import HubFile
from .exchange import Exchange, UnsatisfiableRangeError, parse_range
from .faults import FaultTarget

_CDN_PATH = re.compile(r"/repos/(?P<repo>.+)/(?P<sha256>[0-9a-f]{64})/(?P<file>.+)")


def cdn_path(repo_id: str, sha256: str, file: str) -> str:
    """The unsigned URL path of a body: it names repo and file only so that requests can be counted."""
    return f"/repos/{repo_id}/{sha256}/{quote(file)}"


class CdnExchange(Exchange):
    """GET and HEAD of LFS bodies: 200, 206, 412, 416, and 403 for any URL that is not signed and fresh."""

    def target(self) -> FaultTarget:
        match = _CDN_PATH.fullmatch(self.raw_path)
        repo, file = (unquote(match["repo"]), unquote(match["file"])) if match else ("", self.raw_path)
        return self._ranged(FaultTarget("cdn", self.command, repo, file))

    def answer(self, target: FaultTarget) -> None:
        refusal = self.site.signer.refusal(self.raw_path, self.query)
        if refusal is not None:
            body = f"<Error><Code>AccessDenied</Code><Message>{refusal}</Message></Error>".encode()
            self.plain(403, {"Content-Type": "application/xml"}, body)
            return
        match = _CDN_PATH.fullmatch(self.raw_path)
        stored = self.site.bodies.by_sha256(match["sha256"]) if match else None
        if stored is None:
            self.plain(404, {"Content-Type": "application/xml"}, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        self._serve(stored, target)

    def _serve(self, stored: HubFile, target: FaultTarget) -> None:
        etag = self.etag(stored.etag)
        name = target.path.rpartition("/")[2]
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";",
            "Accept-Ranges": "bytes",
            "ETag": etag,
            "X-Amz-Cf-Id": f"test-hub-{stored.etag[:16]}",
        }
        if self.headers.get("If-Match") not in (None, "*", etag):
            self.plain(412, {"ETag": etag}, b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        wanted = self.headers.get("Range")
        if self.headers.get("If-Range") not in (None, etag):
            wanted = None
        try:
            span = parse_range(wanted, stored.size)
        except UnsatisfiableRangeError:
            self.plain(416, {"Content-Range": f"bytes */{stored.size}", "ETag": etag})
            return
        self.deliver(stored.body, headers, span)

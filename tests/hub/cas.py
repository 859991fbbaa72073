"""The third address: the content-addressed store that hf_xet 1.8 fetches from. Reconstructions want a Xet token;
xorbs are signed URLs.

A file is cut into xorbs, and a xorb into chunks of 64 KiB, each behind a header of 8 bytes, uncompressed. The
file's hash is the true one; a xorb's is any, for nobody checks it. Nothing is stored twice: a xorb is made from
its file while it is sent.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from .content import Body, HubFile
from .exchange import Exchange, Site, Span, UnsatisfiableRangeError, parse_range
from .faults import FaultTarget, Moment

CHUNK_BYTES = 64 * 1024
"""What real chunks have on average; at most 128 KiB are allowed."""
_HEADER_BYTES = 8
FULL_XORB_BYTES = 1022 * CHUNK_BYTES
"""Payload of a xorb that, headers included, is just under the 64 MiB that the format allows."""
_RECONSTRUCTION = re.compile(r"/(?P<version>v[12])/reconstructions/(?P<hash>[0-9a-f]{64})")
_XORB = re.compile(r"/xorbs/(?P<hash>[0-9a-f]{64})/(?P<number>\d+)/(?P<repo>.+?)/-/(?P<file>.+)")


def _header(length: int) -> bytes:
    """Version 0, stored length, scheme 0 (none), true length; lengths in 24 bits, little-endian."""
    size = struct.pack("<I", length)[:3]
    return b"\0" + size + b"\0" + size


@dataclass(frozen=True)
class XorbBody:
    """The serialised form of one piece of a file; `payload` is its place in the file's body."""

    original: Body
    payload: Span
    path: None = None

    @property
    def size(self) -> int:
        return stored_bytes(self.payload.length)

    def read_at(self, offset: int, length: int) -> bytes:
        step = CHUNK_BYTES + _HEADER_BYTES
        first, last = offset // step, -(-min(offset + length, self.size) // step)
        at, end = first * CHUNK_BYTES, min(last * CHUNK_BYTES, self.payload.length)
        data = memoryview(self.original.read_at(self.payload.start + at, end - at))
        pieces: list[bytes | memoryview] = []
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            pieces += [_header(len(chunk)), chunk]
        return b"".join(pieces)[offset - first * step :][:length]


def stored_bytes(payload_bytes: int) -> int:
    """What a piece of a file takes inside a xorb."""
    return payload_bytes + -(-payload_bytes // CHUNK_BYTES) * _HEADER_BYTES


@dataclass(frozen=True)
class XetFile:
    """A file as the store knows it."""

    file: HubFile
    xorb_bytes: int

    def xorb_hash(self, number: int) -> str:
        return hashlib.sha256(f"{self.file.xet_hash} {number} {self.xorb_bytes}".encode()).hexdigest()

    def xorb(self, number: int) -> Span:
        """Which of the file's bytes are in a xorb; of length 0 beyond the last."""
        start = number * self.xorb_bytes
        return Span(start, max(0, min(self.xorb_bytes, self.file.size - start)))


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb: what a reconstruction is made of."""

    hash: str
    first_chunk: int
    end_chunk: int
    length: int
    url: str

    @property
    def range(self) -> dict[str, int]:
        """Chunk ranges exclude their end."""
        return {"start": self.first_chunk, "end": self.end_chunk}

    @property
    def bytes(self) -> dict[str, int]:
        """Byte ranges include theirs."""
        start = self.first_chunk * (CHUNK_BYTES + _HEADER_BYTES)
        return {"start": start, "end": start + stored_bytes(self.length) - 1}


class Cas:
    """What is in the store, and who may ask. Thread-safe."""

    def __init__(self, directory: Path, now: Callable[[], float] = time.time) -> None:
        self.xorb_bytes = FULL_XORB_BYTES
        """Payload of the xorbs of files committed from now on; a multiple of 64 KiB."""
        self.speaks_v2 = True
        """False: /v2/ answers 404, as an older store does."""
        self.token_lifetime = timedelta(minutes=15)
        self._now = now
        self._directory = directory
        self._lock = threading.Lock()
        self._hashes: dict[str, str] = {}
        self._files: dict[str, XetFile] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._tokens: dict[str, tuple[str, float]] = {}

    def add(self, repo_id: str, path: str, file: HubFile) -> HubFile:
        """Keep an LFS file's content; the file with its hash."""
        assert file.sha256 is not None
        known = self._hashes.get(file.sha256) or self._true_hash(file.body)
        with self._lock:
            self._hashes[file.sha256] = known
            named = replace(file, xet_hash=known)
            self._files[known] = XetFile(named, self.xorb_bytes)
            self._names[repo_id, known] = path
        return named

    def _true_hash(self, body: Body) -> str:
        import hf_xet  # noqa: PLC0415 - a native library with threads of its own: only where Xet is asked for

        if body.path is not None:
            return str(hf_xet.hash_files([str(body.path)])[0].hash)
        with tempfile.NamedTemporaryFile(dir=self._directory) as file:
            file.write(body.read_at(0, body.size))
            file.flush()
            return str(hf_xet.hash_files([file.name])[0].hash)

    def holds(self, xet_hash: str | None) -> bool:
        return xet_hash in self._files

    def find(self, xet_hash: str) -> XetFile | None:
        with self._lock:
            return self._files.get(xet_hash)

    def name_of(self, repo_id: str, xet_hash: str) -> str:
        """The path that a repo committed the content under."""
        with self._lock:
            return self._names.get((repo_id, xet_hash), "")

    def issue(self, repo_id: str) -> tuple[str, int]:
        """A fresh token for a repo, and when it ends (seconds since the epoch)."""
        token, ends = f"xet_{secrets.token_hex(16)}", self._now() + self.token_lifetime.total_seconds()
        with self._lock:
            self._tokens[token] = (repo_id, ends)
        return token, int(ends)

    def repo_of(self, token: str) -> str | None:
        """The repo that a token is for; None where it is unknown or has ended."""
        with self._lock:
            repo_id, ends = self._tokens.get(token, ("", 0.0))
        return repo_id if ends > self._now() else None


class CasSite(Site, Protocol):
    """What the third address needs on top."""

    cas: Cas
    cas_endpoint: str


class CasExchange(Exchange):
    """Reconstructions of both versions, and xorbs."""

    site: CasSite

    def target(self) -> FaultTarget:
        if match := _RECONSTRUCTION.fullmatch(self.raw_path):
            repo_id = self.site.cas.repo_of(self._token()) or ""
            file = self.site.cas.name_of(repo_id, match["hash"])
            return self._ranged(FaultTarget("reconstruction", self.command, repo_id, file))
        match = _XORB.fullmatch(self.raw_path)
        if match is None:
            return self._ranged(FaultTarget("xorb", self.command, "", self.raw_path))
        repo_id, file, number = unquote(match["repo"]), unquote(match["file"]), int(match["number"])
        return self._ranged(FaultTarget("xorb", self.command, repo_id, file, xorb=number))

    def answer(self, target: FaultTarget) -> None:
        if target.kind == "reconstruction":
            self._reconstruct(target)
        else:
            self._xorb()

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()

    def _reconstruct(self, target: FaultTarget) -> None:
        match = _RECONSTRUCTION.fullmatch(self.raw_path)
        assert match is not None
        stored = self.site.cas.find(match["hash"])
        if not target.repo:
            self._refuse(401, "the token is unknown or has ended")
        elif stored is None or (match["version"] == "v2" and not self.site.cas.speaks_v2):
            self._refuse(404, "no such file")
        else:
            try:
                wanted = parse_range(self.headers.get("Range"), stored.file.size) or Span(0, stored.file.size)
            except UnsatisfiableRangeError:
                self._refuse(416, "beyond the end of the file")
                return
            terms = self._terms(stored, wanted, target)
            if self.site.faults.take(target, Moment.PLAN) is not None:
                terms = terms[: len(terms) // 2]
            offset = wanted.start % CHUNK_BYTES if terms else 0
            named = [{"hash": t.hash, "unpacked_length": t.length, "range": t.range} for t in terms]
            fetch = self._fetch_v2(terms) if match["version"] == "v2" else self._fetch_v1(terms)
            self.json({"offset_into_first_range": offset, "terms": named, **fetch})

    def _terms(self, stored: XetFile, wanted: Span, target: FaultTarget) -> list[Term]:
        """Whole chunks that cover the range: one term a xorb."""
        made = []
        for number in range(wanted.start // stored.xorb_bytes, -(-wanted.end // stored.xorb_bytes)):
            xorb = stored.xorb(number)
            first = (max(wanted.start, xorb.start) - xorb.start) // CHUNK_BYTES
            end = -(-(min(wanted.end, xorb.end) - xorb.start) // CHUNK_BYTES)
            path = f"/xorbs/{stored.file.xet_hash}/{number}/{target.repo}/-/{quote(target.path)}"
            url = self.site.cas_endpoint + self.site.signer.sign(path)
            length = min(end * CHUNK_BYTES, xorb.length) - first * CHUNK_BYTES
            made.append(Term(stored.xorb_hash(number), first, end, length, url))
        return made

    def _fetch_v2(self, terms: list[Term]) -> dict[str, object]:
        return {"xorbs": {t.hash: [{"url": t.url, "ranges": [{"chunks": t.range, "bytes": t.bytes}]}] for t in terms}}

    def _fetch_v1(self, terms: list[Term]) -> dict[str, object]:
        return {"fetch_info": {t.hash: [{"range": t.range, "url": t.url, "url_range": t.bytes}] for t in terms}}

    def _xorb(self) -> None:
        refusal = self.site.signer.refusal(self.raw_path, self.query)
        if refusal is not None:
            self._refuse(403, refusal)
            return
        match = _XORB.fullmatch(self.raw_path)
        stored = self.site.cas.find(match["hash"]) if match else None
        if match is None or stored is None:
            self._refuse(404, "no such xorb")
            return
        body = XorbBody(stored.file.body, stored.xorb(int(match["number"])))
        try:
            span = parse_range(self.headers.get("Range"), body.size)
        except UnsatisfiableRangeError:
            self._refuse(416, "beyond the end of the xorb")
            return
        self.deliver(body, {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}, span)

    def _refuse(self, status: int, why: str) -> None:
        self.plain(status, {"Content-Type": "text/plain; charset=utf-8"}, why.encode())

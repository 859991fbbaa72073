"""One request and its answer: counted, paced, gated, and spoilt by whatever fault is due."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from .content import Body, BodyStore, MemoryBody
from .counters import Counters, RequestRecord
from .faults import Fault, FaultBoard, FaultKind, FaultTarget, Moment, RequestKind
from .pacing import Gate, Rate
from .signing import UrlSigner
from .wire import Connection

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_UNPACED: frozenset[RequestKind] = frozenset({"api", "token", "reconstruction"})
"""Answers made on the spot: neither the rate nor the gate holds them."""


class Site(Protocol):
    """What both addresses of the Hub share."""

    counters: Counters
    faults: FaultBoard
    gate: Gate
    pacer: Rate
    signer: UrlSigner
    bodies: BodyStore
    stopping: threading.Event


@dataclass(frozen=True)
class Span:
    """A piece of a body: first byte and length, both in bytes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first byte that is no longer in it."""
        return self.start + self.length

    def content_range(self, size: int) -> str:
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


class UnsatisfiableRangeError(Exception):
    """The Range header asks for bytes the body does not have: 416."""


def parse_range(header: str | None, size: int) -> Span | None:
    """The span a Range header names; None if there is none or it is not one we serve (then 200, as S3)."""
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":
        start, end = max(size - int(last), 0), size
        if int(last) == 0:
            raise UnsatisfiableRangeError(header)
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= size:
        raise UnsatisfiableRangeError(header)
    return Span(start, end - start)


class Exchange(Connection):
    """Base of both handlers: `target` names what is asked for, `answer` answers it."""

    site: Site
    kind_of_port: RequestKind

    def target(self) -> FaultTarget:
        raise NotImplementedError

    def answer(self, target: FaultTarget) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        self._exchange()

    def do_HEAD(self) -> None:  # noqa: N802 - http.server's name
        self._exchange()

    def do_POST(self) -> None:  # noqa: N802 - http.server's name
        self._exchange()

    @property
    def raw_path(self) -> str:
        return self.path.partition("?")[0]

    @property
    def query(self) -> str:
        return self.path.partition("?")[2]

    def json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        """Answer 200 with JSON; API faults may act on its body."""
        body = MemoryBody(json.dumps(value).encode())
        self.deliver(body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def plain(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        """A small answer no body fault acts on: errors and redirects."""
        self._start(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD" and body:
            self._send(memoryview(body))

    def deliver(self, body: Body, headers: Mapping[str, str], span: Span | None = None) -> None:
        """Answer 200 (206 with a span) with a body, as the fault that is due says."""
        head = self.command == "HEAD"
        fault = None if head else self.site.faults.take(self._target, Moment.BODY)
        kind = fault.kind if fault else None
        if kind is FaultKind.FULL_FOR_RANGE:
            span = None
        elif kind is FaultKind.WRONG_CONTENT_RANGE and span is not None:
            span = _beside(span, body.size)
        piece = span or Span(0, body.size)
        length = piece.length
        if fault and kind is FaultKind.SHORT_BODY:
            length = fault.position(length, max(length - 1, 0), piece.start)
        elif fault and kind is FaultKind.LONG_BODY:
            length += fault.extra_bytes
        made = {**headers, "Content-Length": str(length)}
        if span is not None:
            made["Content-Range"] = span.content_range(body.size)
        self._start(206 if span is not None else 200, made)
        if not head:
            if self._target.kind not in _UNPACED:
                self.site.gate.pass_through(self._target.path, self.client_is_gone)
                if self.client_is_gone():  # what its socket still takes would count as sent
                    self.close_connection = True
                    return
            self._body(body, Span(piece.start, min(length, piece.length)), fault)

    def etag(self, true_etag: str) -> str:
        """The quoted ETag to send; another one when ETAG_CHANGE is due."""
        changed = self.site.faults.take(self._target, Moment.ETAG) is not None
        return f'"{true_etag[::-1] if changed else true_etag}"'

    def _exchange(self) -> None:
        self._target = self.target()
        length = int(self.headers.get("Content-Length") or 0)
        self.request_body = self.rfile.read(length) if length else b""
        self._number = self.site.counters.begin(self._record())
        try:
            fault = self.site.faults.take(self._target, Moment.BEFORE)
            if fault is None:
                self.answer(self._target)
            else:
                self._answer_wrongly(fault)
        except OSError:
            self.close_connection = True
        finally:
            self.site.counters.finish(self._number)

    def _record(self) -> RequestRecord:
        headers = {name.lower(): value for name, value in self.headers.items()}
        target = self._target
        port = self.connection.getsockname()[1]
        return RequestRecord(
            0, target.kind, port, self.command, self.raw_path, self.query, headers, target.repo, target.path,
            headers.get("range"),
        )  # fmt: skip

    def _ranged(self, target: FaultTarget) -> FaultTarget:
        match = _RANGE.fullmatch((self.headers.get("Range") or "").replace(" ", ""))
        if match is None:
            return target
        end = int(match.group(2)) + 1 if match.group(2) else None
        return replace(target, ranged=True, range_start=int(match.group(1) or 0), range_end=end)

    def _answer_wrongly(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.RESET:
                self.reset()
            case FaultKind.CLOSE:
                self.end_cleanly()
            case FaultKind.SILENT:
                self.wait_for_client_to_go()
            case FaultKind.EXPIRE_URL:
                self.site.signer.revoke(self.query)
                self.answer(self._target)
            case _:
                self.plain(fault.status, _status_headers(fault), fault.body)

    def _start(self, status: int, headers: Mapping[str, str]) -> None:
        self.site.counters.answered(self._number, status)
        self.send_headers(status, headers)

    def _body(self, body: Body, piece: Span, fault: Fault | None) -> None:
        length = piece.length
        if fault is None:
            self._pour(body, piece)
            return
        match fault.kind:
            case FaultKind.WRONG_BYTES:
                good = fault.position(length, 0, piece.start)
                self._pour(body, Span(piece.start, good))
                self._pour(_Inverted(body), Span(piece.start + good, length - good))
            case FaultKind.FLIPPED_BYTE:
                good = min(fault.position(length, length // 2, piece.start), max(length - 1, 0))
                self._pour(body, Span(piece.start, good))
                self._pour(_Inverted(body), Span(piece.start + good, min(1, length)))
                self._pour(body, Span(piece.start + good + 1, max(length - good - 1, 0)))
            case FaultKind.TRICKLE:
                self._pour(body, Span(piece.start, fault.position(length, 0, piece.start)))
                self._trickle(body, piece, fault)
            case FaultKind.RESET | FaultKind.CLOSE | FaultKind.STALL | FaultKind.EXPIRE_URL:
                self._pour(body, Span(piece.start, fault.position(length, length // 2, piece.start)))
                self._break_off(fault)
            case FaultKind.LONG_BODY:
                self._pour(body, piece)
                self._send(memoryview(bytes(fault.extra_bytes)))
            case _:
                self._pour(body, piece)

    def _break_off(self, fault: Fault) -> None:
        if fault.kind is FaultKind.RESET:
            self.reset()
        elif fault.kind is FaultKind.STALL:
            self.wait_for_client_to_go()
        else:
            if fault.kind is FaultKind.EXPIRE_URL:
                self.site.signer.revoke(self.query)
            self.end_cleanly()

    def _trickle(self, body: Body, piece: Span, fault: Fault) -> None:
        for offset in range(fault.position(piece.length, 0, piece.start), piece.length):
            if self.site.stopping.wait(fault.seconds_per_byte) or self.client_is_gone():
                self.close_connection = True
                return
            self._send(memoryview(body.read_at(piece.start + offset, 1)))

    def _pour(self, body: Body, piece: Span) -> None:
        if body.path is not None:
            with body.path.open("rb") as file:
                self._pour_file(file.fileno(), piece)
            return
        offset, end = piece.start, piece.start + piece.length
        while offset < end:
            step = self._next_step(end - offset)
            self._send(memoryview(body.read_at(offset, step)))
            offset += step

    def _pour_file(self, descriptor: int, piece: Span) -> None:
        offset, end = piece.start, piece.start + piece.length
        while offset < end:
            step = self._next_step(end - offset)
            with self.site.counters.sending(self._number, step) as progress:
                progress.sent = os.sendfile(self.connection.fileno(), descriptor, offset, step)
            if progress.sent == 0:
                raise ConnectionAbortedError("the file behind a body became shorter")
            offset += progress.sent

    def _next_step(self, left: int) -> int:
        """How many bytes to send next, having waited for the rate (API answers are not paced)."""
        step = min(left, self.site.pacer.step_bytes)
        if self._target.kind not in _UNPACED:
            self.site.pacer.take(step)
            if self.site.stopping.is_set():  # the rate holds nothing back any more
                raise ConnectionAbortedError("the Hub stops")
        return step

    def _send(self, view: memoryview) -> None:
        while view:
            with self.site.counters.sending(self._number, len(view)) as progress:
                progress.sent = self.connection.send(view)
            view = view[progress.sent :]


@dataclass(frozen=True)
class _Inverted:
    """A body of which every byte is wrong."""

    original: Body
    path: None = None

    @property
    def size(self) -> int:
        return self.original.size

    def read_at(self, offset: int, length: int) -> bytes:
        return self.original.read_at(offset, length).translate(_INVERT)


_INVERT = bytes(255 - value for value in range(256))


def _beside(span: Span, size: int) -> Span:
    """A span one byte beside: lower where there is room, else higher."""
    if span.start > 0:
        return Span(span.start - 1, span.length)
    return Span(1, min(span.length, size - 1)) if size > 1 else span


def _status_headers(fault: Fault) -> dict[str, str]:
    headers = {"Content-Type": "text/plain; charset=utf-8", **fault.headers}
    if fault.retry_after is not None:
        headers["Retry-After"] = f"{fault.retry_after:g}"
    if fault.rate_limit_reset is not None:
        headers["RateLimit"] = f'"api";r=0;t={fault.rate_limit_reset}'
        headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
    if fault.error_code is not None:
        headers["X-Error-Code"] = fault.error_code
    if fault.error_message is not None:
        headers["X-Error-Message"] = fault.error_message
    return headers

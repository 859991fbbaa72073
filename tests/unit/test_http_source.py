"""Ranges over real HTTP: whose connection is whose, where the token goes, and that every wait ends."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Commit, Digest, FileEntry, RepoId
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.sources.http import HttpSource, RemoteFile
from modelcached.sources.network import Network
from modelcached.sources.sink import Sink

from tests.hub import KIB, MIB, Fault, FaultKind, Hub, Synthetic
from tests.unit.sinks import WAYS, sink_over

REPO = RepoId("org/name")
LARGE, SMALL = "model.safetensors", "config.json"
SIZE = 2 * MIB
CONTENT = {LARGE: b"".join(Synthetic(SIZE).blocks()), SMALL: b"{}" * 500}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.create_repo(REPO).commit(CONTENT)
        yield running


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Source(HttpSource):
    """Whose sinks go one way or the other."""

    def __init__(self, way: str, *, stall_timeout_seconds: float = 1.0) -> None:
        super().__init__(network=Network.of(None, {}), stall_timeout_seconds=stall_timeout_seconds, user_agent="test")
        self._way = way

    def fetch(self, file: RemoteFile, start: int, end: int, sink: Sink, abort: Abort) -> None:
        super().fetch(file, start, end, sink_over(self._way, sink), abort)


@pytest.fixture
def source(way: str) -> Iterator[HttpSource]:
    made = Source(way)
    yield made
    made.close()


def remote(hub: Hub, path: str, token: str | None = None) -> RemoteFile:
    repo = hub.find_repo(REPO)
    file = repo.files()[path]
    algorithm = Algorithm.SHA256 if file.lfs else Algorithm.GIT_SHA1
    entry = FileEntry(path, file.size, Digest(algorithm, file.etag), file.git_sha1)
    return RemoteFile(hub.endpoint, REPO, Commit(repo.resolve("main").sha), entry, token)


def fetch(source: HttpSource, file: RemoteFile, start: int = 0, end: int | None = None) -> bytes:
    got = bytearray()

    def sink(view: memoryview, offset: int) -> None:
        assert offset == start + len(got)
        got.extend(view)

    source.fetch(file, start, file.entry.size_bytes if end is None else end, sink, Abort())
    return bytes(got)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def sockets_to(hub: Hub) -> list[str]:
    """States of this process's own sockets towards the Hub."""
    ports = {int(address.rpartition(":")[2]) for address in (hub.endpoint, hub.cdn_endpoint)}
    connections = psutil.Process().net_connections("tcp")
    return [c.status for c in connections if c.raddr and c.raddr.port in ports]


@pytest.mark.parametrize("path", [LARGE, SMALL])
@pytest.mark.parametrize("span", [(0, None), (10, 700), (999, 1000)], ids=str)
def test_a_range_is_what_was_asked(hub: Hub, source: HttpSource, path: str, span: tuple[int, int | None]) -> None:
    start, end = span
    assert fetch(source, remote(hub, path), start, end) == CONTENT[path][start:end]


def test_the_signed_address_is_asked_for_once_a_file(hub: Hub, source: HttpSource) -> None:
    file = remote(hub, LARGE)
    for start in range(0, SIZE, 256 * KIB):
        fetch(source, file, start, start + 256 * KIB)
    assert (hub.request_count(kind="resolve"), hub.request_count(kind="cdn")) == (1, 8)
    source.forget(file)
    fetch(source, file, 0, 10)
    assert hub.request_count(kind="resolve") == 2


def test_a_connection_is_used_again(hub: Hub, source: HttpSource) -> None:
    for _ in range(5):
        fetch(source, remote(hub, LARGE))
        fetch(source, remote(hub, SMALL))
    assert sockets_to(hub).count("ESTABLISHED") == 2  # one to the endpoint, one to the CDN


def test_an_expired_address_is_told_and_the_next_try_asks_for_another(hub: Hub, source: HttpSource) -> None:
    file = remote(hub, LARGE)
    fetch(source, file, 0, 10)
    hub.faults.add(Fault(FaultKind.EXPIRE_URL, times=1))
    with pytest.raises(TransientError, match="403"):
        fetch(source, file, 10, 20)
    assert fetch(source, file, 10, 20) == CONTENT[LARGE][10:20]
    assert hub.request_count(kind="resolve") == 2


def test_a_connection_that_the_server_closed_while_idle_is_no_failure(hub: Hub, source: HttpSource) -> None:
    fetch(source, remote(hub, SMALL))
    hub.refuse(True)
    hub.refuse(False)
    assert fetch(source, remote(hub, SMALL)) == CONTENT[SMALL]


@pytest.mark.parametrize("after", [0, MIB], ids=["from the first byte", "in mid-body"])
def test_a_trickle_is_a_stall_and_what_it_brought_counts(hub: Hub, source: HttpSource, after: int) -> None:
    hub.faults.add(Fault(FaultKind.TRICKLE, where="cdn", at_byte=after, seconds_per_byte=0.1))
    got, ended = bytearray(), threading.Event()
    looking = threading.Thread(target=lambda: [source.stalls.look() for _ in iter(lambda: ended.wait(0.2), True)])
    looking.start()
    try:
        with pytest.raises(TransientError, match="less than 4096 bytes a second for 1 s") as caught:
            source.fetch(remote(hub, LARGE), 0, SIZE, lambda view, _offset: got.extend(view), Abort())
    finally:
        ended.set()
        looking.join()
    assert caught.value.reason is Reason.UPSTREAM_STALLED
    assert after < len(got) < after + 100
    assert got == CONTENT[LARGE][: len(got)]


def test_of_a_connection_that_dies_nothing_is_lost_that_came(hub: Hub, source: HttpSource) -> None:
    sent, piece, ended = 960 * KIB, 64 * KIB, threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connected, _ = server.accept()
            with connected:
                connected.recv(64 * KIB)
                connected.sendall(
                    f"HTTP/1.1 206 Partial Content\r\nContent-Length: {SIZE}\r\n"
                    f"Content-Range: bytes 0-{SIZE - 1}/{SIZE}\r\n\r\n".encode()
                )
                for start in range(0, sent, piece):
                    connected.sendall(CONTENT[LARGE][start : start + piece])
                    time.sleep(0.02)
                ended.wait(10)

        serving = threading.Thread(target=serve)
        serving.start()
        got = bytearray()
        file = replace(remote(hub, LARGE), endpoint=f"http://127.0.0.1:{server.getsockname()[1]}")
        try:
            with pytest.raises(TransientError, match="sent nothing"):
                source.fetch(file, 0, SIZE, lambda view, _offset: got.extend(view), Abort())
        finally:
            ended.set()
            serving.join()
    assert got == CONTENT[LARGE][:sent]


def test_a_redirect_to_a_host_that_is_dead_is_asked_for_anew(hub: Hub, source: HttpSource) -> None:
    file = remote(hub, LARGE)
    dead = {"Location": "http://cdn.invalid/model"}
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=302, headers=dead, times=1))
    with pytest.raises(TransientError, match="not known"):
        fetch(source, file)
    assert fetch(source, file) == CONTENT[LARGE]


def test_another_etag_is_told_once_and_then_taken(hub: Hub, source: HttpSource) -> None:
    file = remote(hub, LARGE)
    fetch(source, file, 0, 10)
    hub.faults.add(Fault(FaultKind.ETAG_CHANGE, where="cdn"))
    with pytest.raises(TransientError, match="changed upstream in mid-transfer") as caught:
        fetch(source, file, 10, 20)
    assert caught.value.reason is Reason.UPSTREAM_UNAVAILABLE
    assert hub.request_count(kind="resolve") == 1
    assert fetch(source, file, 10, 20) == CONTENT[LARGE][10:20]
    assert hub.request_count(kind="resolve") == 2, "by a fresh address"
    hub.faults.clear()
    assert fetch(source, file, 20, 30) == CONTENT[LARGE][20:30]


def test_a_stall_on_a_kept_connection_is_waited_for_once(hub: Hub, source: HttpSource) -> None:
    fetch(source, remote(hub, SMALL))
    hub.faults.add(Fault(FaultKind.SILENT))
    began = time.monotonic()
    with pytest.raises(TransientError) as caught:
        fetch(source, remote(hub, SMALL))
    assert time.monotonic() - began < 1.8
    assert caught.value.reason is Reason.UPSTREAM_STALLED
    assert "transfer.stall_timeout" in caught.value.message


def test_idle_connections_are_given_back(hub: Hub, source: HttpSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelcached.sources.connections.time.monotonic", lambda: 100.0)
    fetch(source, remote(hub, LARGE))
    monkeypatch.setattr("modelcached.sources.connections.time.monotonic", lambda: 115.0)
    fetch(source, remote(hub, SMALL))
    assert {port for _, port in map(address_of, idle(source))} == {hub_port(hub.endpoint), hub_port(hub.cdn_endpoint)}
    source.close(idle_seconds=10.0)
    assert {port for _, port in map(address_of, idle(source))} == {hub_port(hub.endpoint)}
    source.close()
    assert idle(source) == []
    hub.stop()
    assert sockets_to(hub) == []


def idle(source: HttpSource) -> list[socket.socket]:
    return [c.sock for entries in source._connections._idle.values() for _, c in entries if c.sock is not None]


def address_of(connected: socket.socket) -> tuple[str, int]:
    host, port = connected.getpeername()
    return str(host), int(port)


def hub_port(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize(
    ("fault", "after"), [(FaultKind.SILENT, None), (FaultKind.STALL, 0), (FaultKind.STALL, MIB)], ids=str
)
def test_an_abort_ends_a_wait_at_once_and_leaves_no_socket(
    hub: Hub, way: str, fault: FaultKind, after: int | None
) -> None:
    source = Source(way, stall_timeout_seconds=60)
    switched = hub.faults.add(Fault(fault, where="cdn", at_byte=after))
    abort, got = Abort(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(source.fetch, remote(hub, LARGE), 0, SIZE, lambda _view, _offset: got.set(), abort)
        assert hub.wait_until(lambda: switched.fired == 1)
        assert got.wait(5) or not after
        abort.set()
        with pytest.raises(AbortedError):
            running.result(5)
    source.close()
    hub.stop()
    assert sockets_to(hub) == []


def test_an_abort_that_came_before_ends_the_fetch_too(hub: Hub, source: HttpSource) -> None:
    abort = Abort()
    abort.set()
    with pytest.raises(AbortedError):
        source.fetch(remote(hub, SMALL), 0, 10, lambda _view, _offset: None, abort)
    assert hub.requests() == []


def test_an_abort_does_not_reach_a_connection_that_was_handed_on(hub: Hub, source: HttpSource) -> None:
    """The redirect's connection is kept for anybody while the fetch connects to where it was sent."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # the queue is full: the next connect waits
            host, port = full.getsockname()
            location = {"Location": f"http://{host}:{port}/elsewhere"}
            hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=302, headers=location, times=1))
            abort = Abort()
            with ThreadPoolExecutor(1) as threads:
                running = threads.submit(source.fetch, remote(hub, LARGE), 0, 10, lambda _view, _offset: None, abort)
                deadline = time.monotonic() + 5
                while not idle(source):
                    assert time.monotonic() < deadline
                    threading.Event().wait(0.001)
                abort.set()
                (kept,) = idle(source)
                assert address_of(kept)[1] == hub_port(hub.endpoint)
                assert kept.send(b"") == 0  # EPIPE if it were shut down
                with pytest.raises((AbortedError, TransientError)):
                    running.result(5)
    assert fetch(source, remote(hub, SMALL)) == CONTENT[SMALL]


@pytest.mark.parametrize(
    "location", ["http://[", "ftp://127.0.0.1/x", "http://127.0.0.1:port/", "http://127.0.0.1/a b", ""], ids=repr
)
def test_a_redirect_to_nowhere_is_upstreams_fault(hub: Hub, source: HttpSource, location: str) -> None:
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=302, headers={"Location": location}))
    with pytest.raises(TransientError) as caught:
        fetch(source, remote(hub, LARGE))
    assert caught.value.reason is Reason.UPSTREAM_UNAVAILABLE
    assert len(hub.requests()) <= 6


def test_a_redirect_with_a_long_body_is_followed_and_not_read(hub: Hub, source: HttpSource) -> None:
    target = {"Location": f"{hub.endpoint}/{REPO}/resolve/main/{SMALL}"}
    body = bytes(32 * MIB)
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=302, headers=target, body=body, times=1))
    assert fetch(source, remote(hub, SMALL)) == CONTENT[SMALL]
    assert hub.wait_until(lambda: hub.requests()[0].finished)
    assert hub.requests()[0].bytes_sent < len(body)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, None, Reason.TOKEN_REJECTED),
        (401, "GatedRepo", Reason.GATED_REPO),
        (403, "GatedRepo", Reason.GATED_REPO),
        (403, None, Reason.GATED_REPO),
        (401, "RepoNotFound", Reason.REPO_NOT_FOUND),
        (404, "RepoNotFound", Reason.REPO_NOT_FOUND),
        (404, "RevisionNotFound", Reason.REVISION_NOT_FOUND),
    ],
)
def test_what_the_endpoint_says_for_good_is_final(
    hub: Hub, source: HttpSource, status: int, code: str | None, reason: Reason
) -> None:
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=status, error_code=code))
    with pytest.raises(CacheError) as caught:
        fetch(source, remote(hub, SMALL, token="hf_secret"))
    assert caught.value.reason is reason
    assert "hf_secret" not in caught.value.text


@pytest.mark.parametrize(("status", "reason"), [(429, Reason.RATE_LIMITED), (503, Reason.UPSTREAM_UNAVAILABLE)])
@pytest.mark.parametrize("where", ["resolve", "cdn"])
def test_what_may_pass_carries_the_servers_wish(
    hub: Hub, source: HttpSource, where: str, status: int, reason: Reason
) -> None:
    hub.faults.add(Fault(FaultKind.STATUS, where=where, status=status, retry_after=7))  # type: ignore[arg-type]
    with pytest.raises(TransientError) as caught:
        fetch(source, remote(hub, LARGE))
    assert caught.value.reason is reason
    assert caught.value.retry_after is not None
    assert caught.value.retry_after.total_seconds() == 7


def test_the_token_goes_to_the_endpoint_and_not_to_the_cdn(hub: Hub, source: HttpSource) -> None:
    hub.tokens.add("hf_secret")
    file = remote(hub, LARGE, token="hf_secret")
    fetch(source, file)
    assert [(r.kind, r.authorization) for r in hub.requests()] == [("resolve", "Bearer hf_secret"), ("cdn", None)]
    assert "hf_secret" not in repr(file)


def test_an_error_of_the_sink_is_the_callers_own_and_leaves_no_socket(hub: Hub, source: HttpSource) -> None:
    def full(_view: memoryview, _offset: int) -> None:
        raise CacheError(Reason.NO_SPACE_NOW, "full")

    before = descriptors()
    with pytest.raises(CacheError, match="full"):
        source.fetch(remote(hub, LARGE), 0, SIZE, full, Abort())
    source.close()
    hub.stop()
    assert sockets_to(hub) == []
    assert descriptors() <= before, "of its pipe"

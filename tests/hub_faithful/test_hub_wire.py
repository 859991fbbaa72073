"""The wire itself: headers, ranges, signatures, counters, rate, gate, and what is left after the end."""

import hashlib
import http.client
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from urllib.parse import urlsplit

import pytest

from tests.hub import KIB, MIB, Hub, Synthetic, git_blob_sha1
from tests.hub_faithful.http_calls import call, cdn_url

SMALL = bytes(range(256)) * 4
WEIGHTS = Synthetic(300 * KIB + 7, seed=5)
CONTENT = b"".join(WEIGHTS.blocks())


@pytest.fixture
def model(hub: Hub) -> str:
    repo = hub.create_repo("org/model")
    sha = repo.commit({"config.json": SMALL, "model.safetensors": WEIGHTS})
    hub.reset_counters()
    return sha


def small_url(hub: Hub) -> str:
    return f"{hub.endpoint}/org/model/resolve/main/config.json"


def test_a_small_file_is_served_directly(hub: Hub, model: str) -> None:
    for method, body in (("HEAD", b""), ("GET", SMALL)):
        reply = call(small_url(hub), method)
        assert (reply.status, reply.body) == (200, body)
        assert reply.headers["etag"] == f'"{git_blob_sha1(SMALL)}"'
        assert reply.headers["x-repo-commit"] == model
        assert reply.headers["content-length"] == "1024"
        assert "x-linked-etag" not in reply.headers


def test_an_lfs_file_redirects_to_another_port_with_its_metadata(hub: Hub, model: str) -> None:
    reply = call(f"{hub.endpoint}/org/model/resolve/main/model.safetensors", "HEAD")
    assert reply.status == 302
    assert reply.headers["x-linked-etag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert reply.headers["x-linked-size"] == str(len(CONTENT))
    assert reply.headers["x-repo-commit"] == model
    assert reply.headers["location"].startswith(hub.cdn_endpoint)
    body = call(reply.headers["location"])
    assert (body.status, body.body) == (200, CONTENT)
    assert body.headers["etag"] == reply.headers["x-linked-etag"]


@pytest.mark.parametrize(
    ("wanted", "start", "end"),
    [
        ("bytes=0-0", 0, 1), ("bytes=100-199", 100, 200), ("bytes=5000-", 5000, None), ("bytes=-10", -10, None),
        ("bytes=100-99999999", 100, None),
    ],
)  # fmt: skip
def test_a_range_is_a_piece_of_the_file(hub: Hub, model: str, wanted: str, start: int, end: int | None) -> None:
    reply = call(cdn_url(hub.endpoint, "org/model", "model.safetensors"), Range=wanted)
    piece = CONTENT[start:end]
    first = CONTENT.index(piece)
    assert (reply.status, reply.body) == (206, piece)
    assert reply.headers["content-range"] == f"bytes {first}-{first + len(piece) - 1}/{len(CONTENT)}"


def test_ranges_of_small_files_too(hub: Hub, model: str) -> None:
    reply = call(small_url(hub), Range="bytes=10-19")
    assert (reply.status, reply.body, reply.headers["content-range"]) == (206, SMALL[10:20], "bytes 10-19/1024")
    assert call(small_url(hub), Range="bytes=1024-").status == 416


def test_an_unsatisfiable_range_is_416(hub: Hub, model: str) -> None:
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    reply = call(url, Range=f"bytes={len(CONTENT)}-")
    assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
    assert call(url, Range="bytes=1-2,4-5").status == 200
    assert call(url, Range="lines=1-2").status == 200


def test_if_range_and_if_match_guard_against_a_change(hub: Hub, model: str) -> None:
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    etag = call(url, "HEAD").headers["etag"]
    assert call(url, Range="bytes=0-9", If_Range=etag).status == 206
    assert call(url, Range="bytes=0-9", If_Range='"other"').status == 200
    assert call(url, Range="bytes=0-9", If_Match=etag).status == 206
    assert call(url, Range="bytes=0-9", If_Match='"other"').status == 412


def test_only_a_signed_and_fresh_url_is_served(hub: Hub, model: str) -> None:
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    assert call(url.partition("?")[0]).status == 403
    assert call(url[:-1] + ("0" if url[-1] != "0" else "1")).status == 403
    assert call(url.replace("expires=", "expires=9")).status == 403
    assert call(url.replace("/org/model/", "/org/other/")).status == 403
    hub.url_lifetime = timedelta(seconds=-10)
    expired = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    assert call(expired).status == 403
    assert call(url).status == 200


def test_a_token_sent_to_the_cdn_is_recorded(hub: Hub, model: str) -> None:
    call(cdn_url(hub.endpoint, "org/model", "model.safetensors"), Authorization="Bearer leaked")
    assert [record.authorization for record in hub.requests() if record.kind == "cdn"] == ["Bearer leaked"]


def test_the_counters_are_exact(hub: Hub, model: str) -> None:
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    call(url, Range="bytes=0-99")
    call(url, Range="bytes=100-149")
    call(url, "HEAD")
    call(url.partition("?")[0])
    call(small_url(hub))
    assert hub.body_bytes("org/model", "model.safetensors") == 150
    assert hub.body_bytes("org/model", "config.json") == len(SMALL)
    assert hub.request_count(kind="cdn") == 4
    assert hub.request_count(kind="cdn", method="GET", status=206) == 2
    assert hub.request_count(kind="resolve", path_glob="*.safetensors") == 1
    assert [r.range for r in hub.requests() if r.kind == "cdn"] == ["bytes=0-99", "bytes=100-149", None, None]
    assert hub.wait_until(lambda: all(record.finished for record in hub.requests()))
    hub.reset_counters()
    assert hub.requests() == []


def test_one_connection_carries_many_requests(hub: Hub, model: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    for path, status in (("/org/model/resolve/main/config.json", 200), ("/api/models/no", 401), ("/nowhere", 404)) * 3:
        connection.request("GET", path)
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
    connection.close()


def test_a_hundred_clients_at_once(hub: Hub, model: str) -> None:
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    together = threading.Barrier(100)

    def fetch(_: int) -> bool:
        together.wait(30)
        return call(url, timeout=60).body == CONTENT

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(fetch, range(100)))
    assert hub.body_bytes("org/model", "model.safetensors") == 100 * len(CONTENT)


def test_the_rate_holds_over_all_connections_together(hub: Hub, model: str) -> None:
    hub.rate = MIB
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for reply in pool.map(call, [cdn_url(hub.endpoint, "org/model", "model.safetensors")] * 4):
            assert reply.body == CONTENT
    assert 0.9 < (time.monotonic() - started) / (4 * len(CONTENT) / MIB) < 2


def test_the_rate_can_change_in_mid_transfer(hub: Hub, model: str) -> None:
    hub.rate = 64 * KIB
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(call, url)
        assert hub.wait_until(lambda: hub.body_bytes("org/model", "model.safetensors") > 8 * KIB)
        assert hub.body_bytes("org/model", "model.safetensors") < len(CONTENT)
        hub.rate = None
        assert transfer.result(10).body == CONTENT


def test_a_closed_gate_holds_bodies_before_their_first_byte(hub: Hub, model: str) -> None:
    hub.gate_bodies.close("*.safetensors")
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    with ThreadPoolExecutor(8) as pool:
        transfers = [pool.submit(call, url, timeout=60) for _ in range(8)]
        assert hub.gate_bodies.wait_for_waiting(8)
        assert hub.body_bytes("org/model", "model.safetensors") == 0
        assert call(small_url(hub)).body == SMALL
        hub.gate_bodies.open()
        assert all(transfer.result(30).body == CONTENT for transfer in transfers)
    assert hub.gate_bodies.waiting == 0


def test_a_gate_lets_go_of_clients_that_left(hub: Hub, model: str) -> None:
    hub.gate_bodies.close()
    url = urlsplit(cdn_url(hub.endpoint, "org/model", "model.safetensors"))
    connection = http.client.HTTPConnection(url.netloc)
    connection.request("GET", f"{url.path}?{url.query}")
    assert hub.gate_bodies.wait_for_waiting(1)
    connection.close()
    assert hub.wait_until(lambda: all(record.finished for record in hub.requests()))
    assert hub.gate_bodies.waiting == 0


def test_refused_connections_come_back_on_the_same_ports(hub: Hub, model: str) -> None:
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    hub.refuse(True)
    for address in (url, small_url(hub)):
        with pytest.raises(ConnectionRefusedError):
            call(address)
    hub.refuse(False)
    assert call(url).body == CONTENT
    assert call(small_url(hub)).body == SMALL


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_after_the_end() -> None:
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    hub = Hub(rate=KIB)
    hub.start()
    hub.create_repo("org/model").commit({"config.json": SMALL, "model.safetensors": WEIGHTS})
    url = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    directory = hub._directory
    idle = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
    idle.connect()
    with ThreadPoolExecutor(2) as pool:
        paced = pool.submit(call, url, timeout=60)
        hub.wait_until(lambda: hub.body_bytes("org/model", "model.safetensors") > 0)
        hub.gate_bodies.close()
        held = pool.submit(call, url, timeout=60)
        assert hub.gate_bodies.wait_for_waiting(1)
        hub.stop()
        for transfer in (paced, held):
            error = transfer.exception(30)
            assert error is not None or transfer.result().error is not None
    idle.close()
    hub.stop()
    assert set(threading.enumerate()) <= threads  # one of an earlier test may have ended meanwhile
    assert open_descriptors() == descriptors
    assert not directory.exists()
    with pytest.raises(ConnectionRefusedError):
        call(url)

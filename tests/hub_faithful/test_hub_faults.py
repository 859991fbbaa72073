"""Each fault does on the wire what its name says, as often as it was told, and nothing else."""

import http.client
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from tests.hub import Fault, FaultKind, Hub, Synthetic, git_blob_sha1
from tests.hub_faithful.http_calls import call, cdn_url

SMALL = b"0123456789" * 10
WEIGHTS = Synthetic(100_000, seed=9)
CONTENT = b"".join(WEIGHTS.blocks())


@pytest.fixture
def model(hub: Hub) -> str:
    hub.create_repo("org/model").commit({"config.json": SMALL, "model.safetensors": WEIGHTS})
    return cdn_url(hub.endpoint, "org/model", "model.safetensors")


@pytest.fixture
def small(hub: Hub, model: str) -> str:
    return f"{hub.endpoint}/org/model/resolve/main/config.json"


def info(hub: Hub) -> str:
    return f"{hub.endpoint}/api/models/org/model"


def test_a_status_with_everything_a_real_429_has(hub: Hub, small: str) -> None:
    fault = hub.faults.add(
        Fault(FaultKind.STATUS, where="resolve", times=1, status=429, retry_after=2, rate_limit_reset=55, body=b"slow")
    )
    reply = call(small)
    assert (reply.status, reply.body, reply.headers["retry-after"]) == (429, b"slow", "2")
    assert reply.headers["ratelimit"] == '"api";r=0;t=55'
    assert call(small).status == 200
    assert fault.fired == 1
    assert hub.faults.remaining() == []


def test_a_status_with_an_error_code_becomes_the_clients_exception(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.STATUS, where="api", path="info", status=500, error_message="out of cheese"))
    with pytest.raises(HfHubHTTPError, match="out of cheese"):
        HfApi(hub.endpoint).model_info("org/model")


def test_where_repo_path_and_method_narrow_a_fault(hub: Hub, model: str, small: str) -> None:
    hub.faults.add(Fault(FaultKind.STATUS, where="cdn", status=500))
    hub.faults.add(Fault(FaultKind.STATUS, repo="other/*", status=501))
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", path="*.safetensors", status=502))
    hub.faults.add(Fault(FaultKind.STATUS, where="resolve", method="HEAD", status=503))
    assert call(model).status == 500
    assert call(small).status == 200
    assert call(small, "HEAD").status == 503
    assert call(small.replace("config.json", "model.safetensors")).status == 502
    assert call(info(hub)).status == 200
    hub.faults.clear()
    assert call(model).status == 200


def test_after_requests_times_and_probability_count(hub: Hub, small: str) -> None:
    fault = hub.faults.add(Fault(FaultKind.STATUS, where="resolve", after_requests=2, times=3, status=500))
    assert [call(small).status for _ in range(7)] == [200, 200, 500, 500, 500, 200, 200]
    assert fault.fired == 3
    hub.faults.clear()
    sometimes = hub.faults.add(Fault(FaultKind.STATUS, where="resolve", probability=0.5, seed=1, status=500))
    failures = sum(call(small).status == 500 for _ in range(30))
    assert 0 < failures == sometimes.fired < 30


def test_a_fault_may_wait_for_another(hub: Hub, model: str, small: str) -> None:
    first = hub.faults.add(Fault(FaultKind.STATUS, where="cdn", status=501))
    second = hub.faults.add(Fault(FaultKind.STATUS, where="resolve", status=502, after=first, times=1))
    assert call(small).status == 200
    assert second.seen == 0
    assert [call(model).status, call(small).status, call(small).status] == [501, 502, 200]


@pytest.mark.parametrize("kind", [FaultKind.RESET, FaultKind.CLOSE])
def test_an_end_before_the_headers(hub: Hub, model: str, small: str, kind: FaultKind) -> None:
    hub.faults.add(Fault(kind))
    expected = ConnectionResetError if kind is FaultKind.RESET else http.client.RemoteDisconnected
    for url in (model, small, info(hub)):
        with pytest.raises(ConnectionError) as raised:
            call(url)
        assert raised.type is expected


def test_a_reset_in_mid_body_comes_at_the_byte_given(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.RESET, where="cdn", at_fraction=0.5, times=1))
    reply = call(model)
    assert (reply.error, reply.body) == (ConnectionResetError, CONTENT[:50_000])
    assert hub.body_bytes("org/model", "model.safetensors") == 50_000
    assert call(model).body == CONTENT


def test_a_close_in_mid_body_comes_at_the_byte_given(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.CLOSE, where="cdn", at_byte=1234, times=1))
    reply = call(model)
    assert (reply.status, reply.body, reply.error) == (200, CONTENT[:1234], http.client.IncompleteRead)


def test_a_byte_of_the_file_is_met_by_the_range_that_holds_it(hub: Hub, model: str) -> None:
    fault = hub.faults.add(Fault(FaultKind.CLOSE, where="cdn", at_file_byte=1500))
    for span, got in (((0, 1499), 1500), ((1000, 1999), 500), ((1500, 1999), 0), ((1501, 1999), 499)):
        reply = call(model, Range=f"bytes={span[0]}-{span[1]}")
        assert reply.body == CONTENT[span[0] : span[0] + got]
    assert fault.fired == 2


@pytest.mark.parametrize(("kind", "sent"), [(FaultKind.SILENT, None), (FaultKind.STALL, 50_000)])
def test_silence_lasts_until_the_client_goes(hub: Hub, model: str, kind: FaultKind, sent: int | None) -> None:
    fault = hub.faults.add(Fault(kind, where="cdn"))
    if sent is None:
        with pytest.raises(TimeoutError):
            call(model, timeout=0.3)
    else:
        reply = call(model, timeout=0.3)
        assert (len(reply.body), reply.error) == (sent, TimeoutError)
    assert hub.wait_until(lambda: all(record.finished for record in hub.requests()))
    assert fault.fired == 1


def test_silence_ends_with_the_hub(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.SILENT))
    with ThreadPoolExecutor(1) as pool:
        silent = pool.submit(call, model, timeout=60)
        assert hub.wait_until(lambda: hub.request_count(kind="cdn") == 1)
        hub.stop()
        assert isinstance(silent.exception(10), ConnectionError)


def test_a_trickle_is_one_byte_at_a_time(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.TRICKLE, where="cdn", at_byte=99_995, seconds_per_byte=0.01))
    assert call(model).body == CONTENT
    hub.faults.clear()
    hub.faults.add(Fault(FaultKind.TRICKLE, where="cdn"))
    assert len(call(model, timeout=0.3).body) <= 1


def test_wrong_bytes_have_the_right_size_and_etag(hub: Hub, model: str, small: str) -> None:
    hub.faults.add(Fault(FaultKind.WRONG_BYTES, where="any", at_byte=50))
    for url, truth in ((model, CONTENT), (small, SMALL)):
        reply = call(url)
        assert reply.body[:50] == truth[:50]
        assert len(reply.body) == len(truth)
        assert all(got != right for got, right in zip(reply.body[50:], truth[50:], strict=True))
    assert reply.headers["etag"] == f'"{git_blob_sha1(SMALL)}"'


def test_the_real_client_believes_wrong_bytes(hub: Hub, model: str, tmp_path: Path) -> None:
    """The reason this fault exists: huggingface_hub checks sizes only."""
    hub.faults.add(Fault(FaultKind.WRONG_BYTES, where="cdn"))
    snapshot = snapshot_download("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    with open(f"{snapshot}/model.safetensors", "rb") as file:
        assert file.read() != CONTENT


def test_a_short_body_is_complete_but_short(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.SHORT_BODY, where="cdn", times=1))
    hub.faults.add(Fault(FaultKind.SHORT_BODY, where="cdn", at_byte=7, times=1))
    for length in (len(CONTENT) - 1, 7):
        reply = call(model)
        assert (reply.body, reply.headers["content-length"]) == (CONTENT[:length], str(length))
        assert reply.error is None


def test_a_long_body_is_longer_than_the_entry(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.LONG_BODY, where="cdn", extra_bytes=5))
    reply = call(model)
    assert (reply.body, reply.headers["content-length"]) == (CONTENT + bytes(5), "100005")


def test_the_whole_body_where_a_range_was_asked(hub: Hub, model: str) -> None:
    fault = hub.faults.add(Fault(FaultKind.FULL_FOR_RANGE, where="cdn"))
    assert call(model).status == 200
    assert fault.fired == 0
    reply = call(model, Range="bytes=10-19")
    assert (reply.status, reply.body) == (200, CONTENT)
    assert "content-range" not in reply.headers


def test_a_range_beside_the_one_asked_for(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.WRONG_CONTENT_RANGE, where="cdn"))
    for wanted, first, last in (("bytes=10-19", 9, 18), ("bytes=0-9", 1, 10)):
        reply = call(model, Range=wanted)
        assert (reply.status, reply.body) == (206, CONTENT[first : last + 1])
        assert reply.headers["content-range"] == f"bytes {first}-{last}/100000"


def test_an_etag_that_changes(hub: Hub, model: str, small: str) -> None:
    true_etag = call(model, "HEAD").headers["etag"]
    late = hub.faults.add(Fault(FaultKind.ETAG_CHANGE, where="cdn", at_byte=1000))
    assert call(model, Range="bytes=0-9").headers["etag"] == true_etag
    assert call(model, Range="bytes=1000-1009").headers["etag"] != true_etag
    assert late.fired == 1
    hub.faults.clear()
    hub.faults.add(Fault(FaultKind.ETAG_CHANGE, where="cdn", after_requests=1))
    assert call(model).headers["etag"] == true_etag
    assert call(model).headers["etag"] != true_etag
    hub.faults.add(Fault(FaultKind.ETAG_CHANGE, where="resolve"))
    assert call(small, "HEAD").headers["etag"] != f'"{git_blob_sha1(SMALL)}"'


def test_a_url_that_expires_in_mid_file(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.EXPIRE_URL, times=1, at_byte=40_000))
    assert call(model).body == CONTENT[:40_000]
    assert call(model, Range="bytes=40000-").status == 403
    fresh = cdn_url(hub.endpoint, "org/model", "model.safetensors")
    assert call(fresh, Range="bytes=40000-").body == CONTENT[40_000:]


def test_a_url_that_expires_between_two_ranges(hub: Hub, model: str) -> None:
    fault = hub.faults.add(Fault(FaultKind.EXPIRE_URL, times=1, after_requests=1))
    assert [call(model, Range="bytes=0-9").status for _ in range(3)] == [206, 403, 403]
    assert fault.fired == 1
    assert call(cdn_url(hub.endpoint, "org/model", "model.safetensors")).status == 200


def test_faults_of_the_body_act_on_listings_too(hub: Hub, model: str) -> None:
    hub.faults.add(Fault(FaultKind.CLOSE, where="api", path="tree", at_byte=10))
    reply = call(f"{info(hub)}/tree/main")
    assert (len(reply.body), reply.error) == (10, http.client.IncompleteRead)


def test_a_redirect_uses_up_no_fault_of_a_body(hub: Hub, model: str) -> None:
    fault = hub.faults.add(Fault(FaultKind.CLOSE, at_byte=0, times=1, path="*.safetensors"))
    assert call(f"{hub.endpoint}/org/model/resolve/main/model.safetensors").status == 302
    assert fault.fired == 0
    assert call(model).error is http.client.IncompleteRead

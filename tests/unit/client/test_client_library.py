"""The Python client: pages, errors and addresses."""

from __future__ import annotations

from datetime import timedelta

import grpc
import pytest
from modelcache.client import Client, parse_reference, reference
from modelcache.connection import AddressError, admin_address, cache_address
from modelcache.errors import ModelCacheError
from modelcache.reasons import TABLE, Reason
from modelcache.v1 import cache_pb2, common_pb2

from tests.unit.client.fake_daemon import LEASE, details, progress, refuse


@pytest.fixture
def client(daemon):
    with Client(daemon.address) as client:
        yield client


def test_ensure_yields_progress_and_then_ready(daemon, client):
    def on_ensure(request, _context):
        yield progress(done=1, total=2)
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    with client.ensure(reference("org/name"), request_id="r1") as stream:
        first, last = list(stream)
    assert isinstance(first, cache_pb2.Progress)
    assert isinstance(last, cache_pb2.Ready)
    assert last.models[0].repo_id == "org/name"


def test_all_pages_are_listed_in_order(daemon, client):
    daemon.cached = [common_pb2.Model(repo_id=f"org/{number}") for number in range(5)]
    assert [model.repo_id for model in client.list_models()] == [f"org/{number}" for number in range(5)]


def test_get_renew_release_and_hold(daemon, client):
    daemon.cached = [common_pb2.Model(repo_id="org/name")]
    assert client.get(reference("org/name")).repo_id == "org/name"
    assert client.renew(LEASE).id == LEASE
    client.release(LEASE)
    assert daemon.released.get_nowait() == LEASE
    with client.hold(LEASE) as stream:
        assert next(iter(stream)).id == LEASE
    with pytest.raises(ModelCacheError) as caught:
        client.get(reference("org/absent"))
    assert caught.value.reason == Reason.MODEL_NOT_CACHED


def test_an_error_carries_reason_message_metadata_and_delay(daemon, client):
    def on_any(context):
        refuse(
            context,
            Reason.RATE_LIMITED,
            "the Hub limits us",
            metadata={"limit": "5"},
            delay=timedelta(seconds=1.5),
        )

    daemon.on_any = on_any
    with pytest.raises(ModelCacheError) as caught:
        client.renew(LEASE)
    error = caught.value
    assert (error.code, error.reason, error.message) == (
        grpc.StatusCode.UNAVAILABLE,
        "RATE_LIMITED",
        "the Hub limits us",
    )
    assert (error.metadata, error.retry_delay) == ({"limit": "5"}, timedelta(seconds=1.5))
    assert error.exit_status == TABLE[Reason.RATE_LIMITED].exit_status
    assert not error.connection_lost


def test_an_error_longer_than_grpcs_own_limit_arrives_whole(daemon, client):
    holders = {f"lease-{number}": "a pod that holds it" for number in range(1200)}
    daemon.on_any = lambda context: refuse(context, Reason.IN_USE, metadata=holders)
    with pytest.raises(ModelCacheError) as caught:
        client.renew(LEASE)
    assert caught.value.metadata == holders


@pytest.mark.parametrize(
    "trailing",
    [
        (),
        (("grpc-status-details-bin", b"\xff\xff garbage"),),
        (("grpc-status-details-bin", b""),),
        details("", ""),
    ],
)
def test_details_that_are_garbage_leave_the_code(daemon, client, trailing):
    def on_any(context):
        context.set_trailing_metadata(trailing)
        context.abort(grpc.StatusCode.UNAVAILABLE, "down")

    daemon.on_any = on_any
    with pytest.raises(ModelCacheError) as caught:
        client.renew(LEASE)
    assert (caught.value.reason, caught.value.exit_status) == ("", 69)
    assert caught.value.connection_lost


def test_addresses_come_from_the_flag_the_environment_or_the_default():
    environ = {"MODELCACHE_ADDRESS": "unix:rel.sock", "MODELCACHE_ADMIN_ADDRESS": "node-1:7000"}
    assert cache_address("[::1]:7000", environ) == "[::1]:7000"
    assert cache_address(None, environ) == "unix:rel.sock"
    assert cache_address(None, {"MODELCACHE_ADDRESS": ""}) == "unix:///run/modelcached/cache/cache.sock"
    assert admin_address(None, environ) == "node-1:7000"
    assert admin_address(None, {}) == "unix:///run/modelcached/admin/admin.sock"


@pytest.mark.parametrize(
    "address", ["", "unix:", "unix://", "unix://host/x", "x", "x:", "x:0", "x:65536", "dns:///x:1"]
)
def test_other_addresses_are_errors_that_name_them(address):
    with pytest.raises(AddressError, match="--address") as caught:
        cache_address(address, {})
    assert repr(address) in str(caught.value)


def test_references():
    assert parse_reference("org/name") == ("org/name", "")
    assert parse_reference("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    for text in ("", "@x", "org/name@"):
        with pytest.raises(ValueError, match="is not a model"):
            parse_reference(text)

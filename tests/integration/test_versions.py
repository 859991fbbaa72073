"""Clients and daemons of different versions: with the contract as it was before (proto/older.binpb)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import BIN, Node

ROOT = Path(__file__).parents[2]
ADMIN, CACHE = "modelcache.v1.AdminService", "modelcache.v1.CacheService"


class Older:
    """Message classes and services of the stored contract, in a pool of their own."""

    def __init__(self) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "proto" / "older.binpb").read_bytes())
        self.pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self.pool.Add(file)  # type: ignore[no-untyped-call]

    def message(self, name: str) -> Any:
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"modelcache.v1.{name}"))

    def methods(self, service: str) -> list[Any]:
        return list(self.pool.FindServiceByName(service).methods)


@pytest.fixture(scope="module")
def older() -> Older:
    return Older()


def test_an_older_client_is_served_by_this_daemon(hub: Hub, node: Node, older: Older) -> None:
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(MIB, 1)})
    with grpc.insecure_channel(f"unix://{node.admin_socket}") as channel:

        def call(service: str, method: str, request: Any, answer: str, *, stream: bool = False) -> Any:
            make = channel.unary_stream if stream else channel.unary_unary
            parse = older.message(answer).FromString
            asking = make(
                f"/{service}/{method}", request_serializer=type(request).SerializeToString, response_deserializer=parse
            )
            return asking(request, timeout=30)

        reference = older.message("ModelReference")(repo_id="org/model")
        wanted = older.message("EnsureModelRequest")(model=reference)
        *_, last = call(CACHE, "EnsureModel", wanted, "EnsureModelResponse", stream=True)
        assert last.ready.models[0].bytes_fetched == MIB + 2
        status = call(ADMIN, "GetStatus", older.message("GetStatusRequest")(), "GetStatusResponse").status
        assert (status.models, status.leases) == (1, 1)
        leases = call(ADMIN, "ListLeases", older.message("ListLeasesRequest")(), "ListLeasesResponse").leases
        ids = older.message("ReleaseLeasesRequest")(lease_ids=[leases[0].id])
        assert len(call(ADMIN, "ReleaseLeases", ids, "ReleaseLeasesResponse").lease_ids) == 1
        gone = call(
            ADMIN, "EvictModels", older.message("EvictModelsRequest")(models=[reference]), "EvictModelsResponse"
        )
        assert gone.bytes_freed > MIB


@pytest.fixture
def older_daemon(tmp_path: Path, older: Older) -> Iterator[str]:
    """One that knows the older calls alone, and answers each with nothing."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    for service in (ADMIN, CACHE):
        handlers = {}
        for method in older.methods(service):
            answer = message_factory.GetMessageClass(method.output_type)
            nothing = answer().SerializeToString()
            unary = grpc.unary_unary_rpc_method_handler(lambda _request, _context, nothing=nothing: nothing)
            streamed = grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter(()))
            handlers[method.name] = streamed if method.server_streaming else unary
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    address = f"unix://{tmp_path / 'older.sock'}"
    server.add_insecure_port(address)
    server.start()
    yield address
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["status"], 0),
        (["ls"], 0),
        (["leases"], 0),
        (["show", "org/model"], 69),
        (["events"], 69),
        (["verify", "--all"], 69),
        (["gc", "--dry-run"], 69),
        (["config"], 69),
        (["doctor"], 69),
        (["ls", "--tree"], 0),
    ],
)
def test_this_client_says_when_a_daemon_is_older(older_daemon: str, arguments: list[str], status: int) -> None:
    argv = [str(BIN / "cachectl"), "--address", older_daemon, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    if status:
        assert "the daemon is older than this client: upgrade it" in done.stderr
        assert done.stderr.count("\n") == 1


def test_nothing_of_the_older_contract_is_broken() -> None:
    buf = Path(sys.executable).parent / "buf"
    done = subprocess.run(
        [str(buf), "breaking", "--against", "older.binpb"],
        cwd=ROOT / "proto",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout

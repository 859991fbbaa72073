"""The contract and its two sockets, as others build on them: generated code, errors, health, reflection, ownership."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from modelcache.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, cache_pb2_grpc, common_pb2
from modelcached.telemetry import listener

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import tiny_llama
from tests.node.daemon import BIN, Node, reference

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
GENERATED = ROOT / "client" / "modelcache" / "v1"
CACHE_SERVICE, ADMIN_SERVICE = "modelcache.v1.CacheService", "modelcache.v1.AdminService"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


# Generated code


def test_the_contract_is_lint_clean() -> None:
    done = run(BIN / "buf", "lint", cwd=PROTO)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    sources = sorted(str(path.relative_to(ROOT)) for path in PROTO.rglob("*.proto"))
    plugins = [f"--plugin={name}={BIN / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    done = run(sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *plugins, *outputs, *sources)
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_bytes() for path in (tmp_path / "modelcache" / "v1").iterdir()}
    kept = {path.name: path.read_bytes() for path in GENERATED.iterdir() if "_pb2" in path.name}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == [], "run `make proto`"


ONE_CALL = """
import sys
import google.protobuf, grpc
from modelcache.client import Client, reference
from modelcache.v1 import cache_pb2
request = cache_pb2.EnsureModelRequest(model=reference("org/name", "main", profile="vllm"), request_id="7")
assert cache_pb2.EnsureModelRequest.FromString(request.SerializeToString()) == request
with Client(sys.argv[1]) as client:
    print(google.protobuf.__version__, google.protobuf.__file__, [model.repo_id for model in client.list_models()])
"""


def test_generated_code_works_under_protobuf_6_and_7(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    address = f"unix://{node.cache_socket}"
    for major, environment in (("6", {}), ("7", {"PYTHONPATH": str(ROOT / ".venv" / "protobuf7")})):
        done = run(sys.executable, "-W", "error", "-c", ONE_CALL, address, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{major}."), done.stdout
        assert done.stdout.endswith("['org/tiny']\n")


def test_the_base_install_is_grpcio_and_protobuf_and_their_own_needs(tmp_path: Path) -> None:
    wheels, home = tmp_path / "wheels", tmp_path / "venv"
    done = run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, ".")
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    venv.create(home, with_pip=False, symlinks=True)
    done = run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", wheel)
    assert done.returncode == 0, done.stderr
    listed = run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "list", "--format=freeze").stdout
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.split()}
    assert names - {"typing-extensions"} == {"modelcached", "grpcio", "protobuf"}
    helped = run(home / "bin" / "ensure-model", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert "ensure-model REPO [ADAPTER...]" in helped.stdout
    refused = run(home / "bin" / "ensure-model", "org/name", "--timeout", "1s", "--address", f"unix://{tmp_path}/none")
    assert refused.returncode in (69, 75), refused.stderr
    assert "Traceback" not in refused.stderr
    for program in ("cachectl", "modelcached"):
        missing = run(home / "bin" / program, "--help", cwd=tmp_path)
        assert missing.returncode != 0


# Both faces


def channel(path: Path) -> grpc.Channel:
    return grpc.insecure_channel(f"unix://{path}")


def services(path: Path) -> set[str]:
    with channel(path) as opened:
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    return {service.name for service in answer.list_services_response.service}


def test_reflection_names_what_each_socket_serves(node: Node) -> None:
    both = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection", CACHE_SERVICE}
    assert services(node.cache_socket) == both
    assert services(node.admin_socket) == both | {ADMIN_SERVICE}


def test_reflection_describes_the_contract(node: Node) -> None:
    with channel(node.cache_socket) as opened:
        stub = reflection_pb2_grpc.ServerReflectionStub(opened)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=CACHE_SERVICE)
        (answer,) = stub.ServerReflectionInfo(iter([request]))
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in answer.file_descriptor_response.file_descriptor_proto
    ]
    (service,) = [service for file in files for service in file.service if service.name == "CacheService"]
    assert {method.name for method in service.method} == {
        "EnsureModel", "GetModel", "ListModels", "RenewLease", "ReleaseLease", "HoldModel"
    }  # fmt: skip


def test_health_answers_on_both_sockets(node: Node) -> None:
    for path in (node.cache_socket, node.admin_socket):
        with channel(path) as opened:
            stub = health_pb2_grpc.HealthStub(opened)
            for name in ("", CACHE_SERVICE):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_operators_calls_are_not_on_the_workloads_socket(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    node.release_all()
    with channel(node.cache_socket) as opened:
        stub = admin_pb2_grpc.AdminServiceStub(opened)
        calls = (
            lambda: stub.EvictModels(admin_pb2.EvictModelsRequest(models=[reference("org/tiny")])),
            lambda: stub.GetStatus(admin_pb2.GetStatusRequest()),
            lambda: stub.ReleaseLeases(admin_pb2.ReleaseLeasesRequest(recovered=True)),
        )
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(node.visible("org/tiny")) == 1


def test_errors_are_google_rpc_status_with_error_info(node: Node) -> None:
    with channel(node.cache_socket) as opened:
        stub = cache_pb2_grpc.CacheServiceStub(opened)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetModel(cache_pb2.GetModelRequest(model=reference("../../etc")))
    error = caught.value
    (raw,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status = common_pb2.Status.FromString(raw)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    (detail,) = status.details
    assert detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo"
    info = common_pb2.ErrorInfo.FromString(detail.value)
    assert (info.reason, info.domain) == ("INVALID_REPO_ID", "modelcached")
    assert info.metadata["repo_id"] == "../../etc"


def test_our_messages_are_googles_on_the_wire() -> None:
    """Field numbers and types of google/rpc/status.proto and error_details.proto, which grpcurl and others know."""
    fields = {
        common_pb2.Status: {"code": 1, "message": 2, "details": 3},
        common_pb2.ErrorInfo: {"reason": 1, "domain": 2, "metadata": 3},
        common_pb2.RetryInfo: {"retry_delay": 1},
    }
    for message, numbers in fields.items():
        assert {field.name: field.number for field in message.DESCRIPTOR.fields} == numbers


# Sockets


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_any_uid_reaches_the_cache_socket_and_only_the_owner_the_other(node: Node) -> None:
    assert stat.S_ISSOCK(node.cache_socket.stat().st_mode)
    assert (mode(node.cache_socket.parent), mode(node.cache_socket)) == (0o755, 0o666)
    assert (mode(node.admin_socket.parent), mode(node.admin_socket)) == (0o700, 0o600)
    assert mode(node.private) == 0o700
    assert mode(node.hub_dir) == 0o755


def test_modes_are_as_configured_whatever_the_umask(make_node: Callable[..., Node]) -> None:
    before = os.umask(0o077)
    try:
        node = make_node(server={"cache_socket_mode": "0660", "admin_socket_mode": "0640"}).start()
    finally:
        os.umask(before)
    assert (mode(node.cache_socket), mode(node.admin_socket)) == (0o660, 0o640)
    assert (mode(node.cache_socket.parent), mode(node.hub_dir)) == (0o755, 0o755)


def answers(path: Path) -> bool:
    with channel(path) as opened:
        try:
            health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
        return True


def test_a_socket_that_somebody_removed_is_bound_again_and_its_streams_go_on(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    keeper = node.popen("ensure-model", "--hold", "org/tiny")
    node.wait_until(lambda: node.metric("modelcached_leases") == 1, 20, "a stream is open")
    for path in (node.cache_socket, node.admin_socket):
        path.unlink()
    node.wait_until(lambda: answers(node.cache_socket) and answers(node.admin_socket), 5, "both are bound again")
    assert (mode(node.cache_socket), mode(node.admin_socket)) == (0o666, 0o600)
    assert keeper.poll() is None
    keeper.terminate()
    _, said = keeper.communicate(timeout=20)
    assert keeper.returncode == 0, said
    assert node.terminate() == 0
    assert not node.cache_socket.exists()


def test_a_directory_that_somebody_removed_is_made_again_as_it_was(make_node: Callable[..., Node]) -> None:
    node = make_node().start()
    for path in (node.cache_socket, node.admin_socket):
        for name in path.parent.iterdir():
            name.unlink()
        path.parent.rmdir()
    node.wait_until(lambda: answers(node.cache_socket) and answers(node.admin_socket), 5, "both are bound again")
    assert (mode(node.cache_socket.parent), mode(node.admin_socket.parent)) == (0o755, 0o700)
    other = make_node()
    other.settings["server"] = node.settings["server"]
    assert refuses_to_start(other).count("is served by another modelcached") == 1, "and its lock with it"


def refuses_to_start(node: Node) -> str:
    """What it says as it ends."""
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 74
    return node.log_text()


def test_a_second_daemon_on_a_cache_refuses_and_names_the_first(make_node: Callable[..., Node]) -> None:
    first, second = make_node().start(), make_node()
    second.settings["cache"]["dir"] = str(first.cache_dir)
    said = refuses_to_start(second)
    owner = f"{first.cache_dir} is owned by another modelcached: pid {first.ps.pid} on {os.uname().nodename}"
    assert f'"{owner}; stop it, or choose another cache.dir"' in said, "the disk is not what to look at"
    assert answers(first.cache_socket)
    first.kill()
    assert second.start().status().budget_bytes > 0, "what a kill left behind keeps nobody out"


def test_a_second_daemon_on_a_socket_refuses_and_the_first_stays_reachable(make_node: Callable[..., Node]) -> None:
    first, second = make_node().start(), make_node()
    second.settings["server"]["cache_socket"] = str(first.cache_socket)
    told = f"{first.cache_socket} is served by another modelcached; stop it, or choose another path"
    assert f'"{told}"' in refuses_to_start(second)
    assert answers(first.cache_socket)
    assert answers(first.admin_socket)


def test_what_is_no_socket_is_not_removed_for_one(make_node: Callable[..., Node]) -> None:
    node = make_node()
    node.cache_socket.parent.mkdir(parents=True)
    node.cache_socket.write_text("somebody's file")
    told = f"{node.cache_socket} is there and is no socket; remove it, or choose another path"
    assert f'"{told}"' in refuses_to_start(node)
    assert node.cache_socket.read_text() == "somebody's file"


# What is not there


def test_who_wants_to_evict_what_is_not_there_is_not_told_to_bring_it(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    for model in ("org/none", "org/none@main", "org/tiny@dev"):
        done = node.run("cachectl", "evict", model, "--yes")
        assert done.returncode == 66
        assert done.stderr == f"cachectl: {model} is not in the cache; cachectl ls shows what is\n"
    done = node.run("cachectl", "pin", "org/none")
    assert (done.returncode, done.stderr) == (
        66,
        "cachectl: org/none@main is not in the cache; ensure it first\n",
    )


# Reload


def change_budget(node: Node, text: str) -> None:
    node.settings["cache"]["budget"] = text
    node.write_config()


def test_a_changed_file_is_reloaded_by_itself(node: Node) -> None:
    change_budget(node, "3GB")
    node.wait_until(lambda: node.status().budget_bytes == 3_000_000_000, 10, "the new budget")
    (line,) = node.log_lines("configuration reloaded")
    assert line["settings"] == ["cache.budget"]


def test_a_swapped_symlink_is_a_changed_file(make_node: Callable[..., Node]) -> None:
    """As the kubelet replaces a ConfigMap: ..data is a link to a directory, and is swapped for another."""
    node = make_node()
    directory = node.root / "config"
    (directory / "..1").mkdir(parents=True)
    (directory / "..2").mkdir()
    (directory / "..data").symlink_to("..1")
    (directory / "config.toml").symlink_to("..data/config.toml")
    for name, budget in (("..2", "3GB"), ("..1", "2GB")):
        node.config_file = directory / name / "config.toml"
        change_budget(node, budget)
    node.config_file = directory / "config.toml"
    node.start()
    (directory / "..data_tmp").symlink_to("..2")
    (directory / "..data_tmp").rename(directory / "..data")
    node.wait_until(lambda: node.status().budget_bytes == 3_000_000_000, 10, "the new budget")


def test_sighup_reloads(make_node: Callable[..., Node]) -> None:
    node = make_node()
    elsewhere = node.root / "config-of-the-node"
    elsewhere.mkdir()
    node.config_file.symlink_to(elsewhere / "config.toml")  # changes there are not seen in our directory
    node.start()
    change_budget(node, "4GB")
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    node.wait_until(lambda: node.status().budget_bytes == 4_000_000_000, 10, "the new budget")


def test_other_files_beside_it_are_no_news(node: Node) -> None:
    """The test's own log lies there: each line about it would be followed by another look."""
    change_budget(node, "a lot")
    node.wait_until(lambda: node.status().degraded, 10, "the bad file is seen")
    (node.root / "other").write_text("x")
    turns = node.metric("modelcached_upkeep_runs_total", loop="leases")
    node.wait_until(lambda: node.metric("modelcached_upkeep_runs_total", loop="leases") > turns + 1, 10, "a while")
    change_budget(node, "3GB")
    node.wait_until(lambda: not node.status().degraded, 10, "the good one too")
    assert len(node.log_lines("new configuration refused, the old settings stay")) == 1


def test_a_bad_file_changes_nothing_and_is_reported(node: Node) -> None:
    change_budget(node, "a lot")
    node.wait_until(lambda: any("cache.budget" in text for text in node.status().degraded), 10, "status says so")
    assert node.status().budget_bytes == 2_000_000_000
    assert node.metric("modelcached_degraded") == 1
    (line, *_) = node.log_lines("new configuration refused, the old settings stay")
    assert "cache.budget: 'a lot' is not a size" in line["why"]
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    node.settings["cache"]["budget"] = "2GB"
    node.write_config(in_one_step=True)  # the signal may be taken meanwhile
    node.wait_until(lambda: not node.status().degraded, 10, "as it was")
    assert len(node.log_lines("new configuration refused, the old settings stay")) == 1
    node.wait_until(
        lambda: node.log_lines("configuration accepted again, it says what is in force"), 10, "it is logged"
    )
    change_budget(node, "3GB")
    node.wait_until(lambda: node.status().budget_bytes == 3_000_000_000, 10, "a good one is taken")


def test_what_cannot_change_while_running_says_so(node: Node) -> None:
    node.settings["transfer"]["connections"] = 3
    change_budget(node, "3GB")
    node.wait_until(lambda: node.status().budget_bytes == 3_000_000_000, 10, "the new budget")
    (line,) = node.log_lines("these settings take effect at the next start")
    assert line["settings"] == ["transfer.connections"]
    shown = node.ctl("config", "--changed")["settings"]
    assert shown["transfer.connections"]["value"] != shown["transfer.connections"]["next_value"] == 3
    assert "next_value" not in shown["cache.budget"]
    told = " ".join(node.run("cachectl", "config").stdout.split())
    assert "from the next start 3" in told
    change_budget(node, "4GB")
    node.wait_until(lambda: node.status().budget_bytes == 4_000_000_000, 10, "another budget")
    assert len(node.log_lines("these settings take effect at the next start")) == 1, "it is no news"
    node.terminate()
    node.start()
    assert node.ctl("config")["settings"]["transfer.connections"]["value"] == 3


def test_what_cannot_change_while_running_does_not(hub: Hub, make_node: Callable[..., Node]) -> None:
    """Its new value is nowhere used before the next start, also not by what looks at the settings each time."""
    node = make_node(hub={"endpoints": [hub.endpoint]}).start()
    node.settings["hub"]["endpoints"] = ["http://127.0.0.1:9"]
    change_budget(node, "3GB")
    node.wait_until(lambda: node.status().budget_bytes == 3_000_000_000, 10, "the new budget")
    assert node.ctl("config")["settings"]["hub.endpoints"]["value"] == [hub.endpoint]
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")


def test_a_smaller_budget_evicts_what_may_go(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    for number in range(5):
        hub.create_repo(f"org/other{number}").commit(
            {"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, number)}
        )
        node.ensure(f"org/other{number}")
    node.release_all()
    change_budget(node, "10MB")
    node.wait_until(lambda: node.visible("org/tiny") == [], 15, "the watermark's turn")
    (warned,) = node.log_lines("the new cache.budget is less than is used: models are evicted for it")
    assert (warned["level"], warned["over_bytes"] > 0) == ("warning", True)


async def test_a_stopped_event_loop_is_not_healthy() -> None:
    """/healthz answers from a thread, about the loop."""
    loop = asyncio.get_running_loop()
    assert await asyncio.to_thread(listener._answers, loop)
    ended = asyncio.new_event_loop()
    ended.close()
    assert not listener._answers(ended)

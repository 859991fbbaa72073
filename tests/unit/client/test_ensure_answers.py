"""What ensure-model prints, writes and links when a model is ready."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from modelcache.v1 import common_pb2

from tests.unit.client.fake_daemon import COMMIT, snapshot_path

JSON_KEYS = [
    "repo_id",
    "revision",
    "commit",
    "path",
    "outcome",
    "profile",
    "bytes_total",
    "bytes_fetched",
    "stale",
    "lease_id",
    "lease_kind",
    "lease_expires",
]


def test_the_path_is_all_that_stands_on_stdout(daemon, ensure_model):
    status, out, _ = ensure_model("org/name")
    assert (status, out) == (0, f"{daemon.hub / snapshot_path('org/name')}\n")


def test_adapters_follow_the_base_in_the_order_asked_and_with_its_profile(daemon, ensure_model):
    status, out, _ = ensure_model("org/base@v1", "--profile", "transformers", "org/b", "org/a@v2")
    assert status == 0
    assert out.splitlines() == [str(daemon.hub / snapshot_path(name)) for name in ("org/base", "org/b", "org/a")]
    request = daemon.ensured.get_nowait()
    assert (request.model.repo_id, request.model.revision) == ("org/base", "v1")
    assert [(adapter.repo_id, adapter.revision) for adapter in request.adapters] == [("org/b", ""), ("org/a", "v2")]
    assert {model.profile.name for model in (request.model, *request.adapters)} == {"transformers"}


def test_an_adapter_profile_is_for_the_adapters_alone(daemon, ensure_model):
    ensure_model("org/base", "org/lora", "--include", "*.json", "*.safetensors", "--adapter-profile", "full")
    request = daemon.ensured.get_nowait()
    assert list(request.model.profile.include) == ["*.json", "*.safetensors"]
    assert (request.adapters[0].profile.name, list(request.adapters[0].profile.include)) == ("full", [])


def test_json_has_exactly_the_keys_of_the_contract(daemon, ensure_model):
    daemon.lease = common_pb2.Lease(id="lease-9", kind=common_pb2.LEASE_KIND_TTL)
    daemon.lease.expires_at.FromDatetime(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    status, out, _ = ensure_model("org/name", "org/lora", "--revision", "v1", "--json")
    assert status == 0
    first, second = (json.loads(line) for line in out.splitlines())
    assert list(first) == list(second) == JSON_KEYS
    assert first == {
        "repo_id": "org/name",
        "revision": "v1",
        "commit": COMMIT,
        "path": str(daemon.hub / snapshot_path("org/name")),
        "outcome": "downloaded",
        "profile": "vllm",
        "bytes_total": 1000,
        "bytes_fetched": 900,
        "stale": False,
        "lease_id": "lease-9",
        "lease_kind": "ttl",
        "lease_expires": "2026-01-02T03:04:05Z",
    }


@pytest.mark.parametrize(
    ("kind", "word"),
    [(1, "pod"), (2, "stream"), (3, "ttl"), (4, "recovered")],
)
def test_lease_kinds_are_words(daemon, ensure_model, kind, word):
    daemon.lease = common_pb2.Lease(id="x", kind=kind)
    _, out, _ = ensure_model("org/name", "--json")
    told = json.loads(out)
    assert (told["lease_kind"], told["lease_expires"]) == (word, None)


def test_the_hub_directory_is_the_flag_else_the_environment_else_the_daemons(daemon, ensure_model, tmp_path):
    def path_with(*flags, **environ):
        status, out, err = ensure_model("org/name", *flags, **environ)
        assert status == 0
        return out.removesuffix(f"/{snapshot_path('org/name')}\n"), err

    flag, variable = str(tmp_path / "flag"), str(tmp_path / "variable")
    assert path_with("--hub-dir", flag, HF_HUB_CACHE=variable)[0] == flag
    path, err = path_with(HF_HUB_CACHE=variable)
    assert path == variable
    # The path is printed all the same, because its reader may see it; the warning says which of the three it was.
    assert "warning" in err
    assert "HF_HUB_CACHE" in err
    assert str(daemon.hub) in err
    path, err = path_with()
    assert path == str(daemon.hub)
    assert "warning" not in err


def test_a_hub_directory_that_is_another_one_is_refused_where_something_is_made_of_it(
    daemon, ensure_model, tmp_path, termination_log
):
    status, out, err = ensure_model("org/name", "--hub-dir", str(tmp_path), "--link", str(tmp_path / "model"))
    assert (status, out) == (66, "")
    assert str(daemon.hub) in err
    assert not os.path.lexists(tmp_path / "model")
    assert termination_log.read_text().startswith("HUB_DIR: ")


def test_output_is_written_whole_and_readable_by_other_users(daemon, ensure_model, tmp_path):
    target = tmp_path / "path"
    target.write_text("old")
    status, out, _ = ensure_model("org/name", "--output", str(target))
    assert status == 0
    assert target.read_text() == out
    assert stat.S_IMODE(target.stat().st_mode) & 0o444 == 0o444 & ~_umask()
    assert [entry.name for entry in tmp_path.iterdir()] == ["path"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_link_is_made_and_replaced(daemon, ensure_model, tmp_path):
    link = tmp_path / "model"
    for name in ("org/one", "org/two"):
        assert ensure_model(name, "--link", str(link))[0] == 0
        assert os.readlink(link) == str(daemon.hub / snapshot_path(name))


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_link_replaces_nothing_but_a_symlink_and_says_so_before_it_asks(daemon, ensure_model, tmp_path, make):
    getattr(tmp_path / "model", make)()
    status, _, err = ensure_model("org/name", "--link", str(tmp_path / "model"))
    assert status == 64
    assert "not a symlink" in err
    assert daemon.ensured.empty()


def test_an_output_that_cannot_be_written_is_found_out_before_the_download(daemon, ensure_model, tmp_path):
    status, _, err = ensure_model("org/name", "--output", str(tmp_path / "absent" / "file"))
    assert status == 64
    assert "--output" in err
    assert daemon.ensured.empty()


@pytest.mark.parametrize("path", ["/etc", "../../etc", "models--a\n/snapshots/x", ""])
def test_a_path_outside_of_the_hub_is_not_believed(daemon, ensure_model, path):
    def on_ensure(request, _context):
        response = daemon.ready(request)
        response.ready.models[0].path = path
        yield response

    daemon.on_ensure = on_ensure
    status, out, _ = ensure_model("org/name")
    assert (status, out) == (70, "")


def test_the_lease_is_asked_for_with_the_pods_uid_and_a_holder(daemon, ensure_model):
    ensure_model("org/name", "--holder", "team a", POD_UID="uid-1\n")
    lease = daemon.ensured.get_nowait().lease
    assert (lease.pod_uid, lease.holder, lease.stream) == ("uid-1", "team a", False)


@pytest.mark.parametrize(
    ("environ", "flags", "warned"),
    [
        ({"POD_UID": "uid-1"}, [], "the daemon sees no pod uid-1 (leases.kubelet_pods_dir): the lease ends at 2026-"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, [], "POD_UID is not set: the lease ends at 2026-"),
        ({}, [], ""),
        ({"POD_UID": "uid-1"}, ["--hold", "--", "true"], ""),
    ],
)
def test_a_pod_that_its_lease_does_not_last_as_long_as_is_warned(daemon, ensure_model, environ, flags, warned):
    if not flags:
        daemon.lease = common_pb2.Lease(id="lease-1", kind=common_pb2.LEASE_KIND_TTL)
        daemon.lease.expires_at.FromJsonString("2026-01-02T00:00:00Z")
    status, _, err = ensure_model("org/name", *flags, **environ)
    assert status == 0
    assert warned in err
    assert ("the lease ends at" in err) is bool(warned)


def test_a_stale_answer_is_a_warning(daemon, ensure_model):
    def on_ensure(request, _context):
        yield daemon.ready(request, stale=True)

    daemon.on_ensure = on_ensure
    status, out, err = ensure_model("org/name", "--quiet", "--json")
    assert status == 0
    assert json.loads(out)["stale"] is True
    assert err.count("\n") == 1
    assert "newest known commit" in err


def test_quiet_says_nothing_when_all_is_well(daemon, ensure_model):
    assert ensure_model("org/name", "--quiet")[2] == ""


def test_a_stdout_that_is_full_is_a_failure_in_words(daemon, programs):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "modelcache.ensure", "org/name"],
            env=programs.environ,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 74
    assert "cannot write to stdout" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_reading_ahead_is_asked_for_or_left_to_the_daemon(daemon, ensure_model):
    ensure_model("org/name")
    ensure_model("org/name", "--prewarm")
    left, asked = daemon.ensured.get_nowait(), daemon.ensured.get_nowait()
    assert not left.HasField("prewarm"), "as the daemon's configuration says"
    assert asked.prewarm

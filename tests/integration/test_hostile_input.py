"""What strangers send is refused by name, and nothing outside the cache is touched.

Beside each cache lies a canary: files and directories whose names, contents, modes, link counts and times (ctime
too, so that a chmod or a hard link shows) must be the same afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import pytest
from modelcache.client import Client, ModelCacheError, reference
from modelcache.v1 import cache_pb2, common_pb2

from tests.hub import HostileEntry, Hub
from tests.hub.models import tiny_llama
from tests.node import Node
from tests.node.canary import CONTROL

MIB = 1 << 20


def as_sent(error: object) -> list[str]:
    """Message and metadata as they crossed the wire: our own client cleans them once more, others do not."""
    assert isinstance(error, grpc.Call)
    (details,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    status = common_pb2.Status.FromString(details)
    info = common_pb2.ErrorInfo.FromString(status.details[0].value)
    return [error.details(), status.message, *info.metadata.values()]


def refusal(client: Client, request: cache_pb2.EnsureModelRequest) -> ModelCacheError:
    with pytest.raises(ModelCacheError) as caught:
        list(client.ensure_request(request, timeout_seconds=30))
    error = caught.value
    for text in as_sent(error.__cause__):
        assert CONTROL.search(text) is None
        assert "\n" not in text
        assert len(text) < 1000
    return error


# What a request says

REPO_IDS = [
    "../../etc",
    "..",
    "org/..",
    "../org",
    "/etc/passwd",
    "/",
    "org/name/../../etc",
    "org/name/more",
    "org//name",
    "org\\name",
    "..\\..\\etc",
    "org/na\0me",
    "org/na\nme",
    "org/\x1b[31mname",
    "org/name\u202e",
    "org/na me",
    "org/a--b",
    "org/a..b",
    "a--b",
    ".hidden/name",
    "-rf/name",
    "org/name.git",
    "~/name",
    "org/%2e%2e",
    "",
    "x" * MIB,
    "org/" + "../" * (MIB // 3),
    "\0" * MIB,
]


@pytest.mark.parametrize("moment", ["base", "adapter"])
def test_a_repository_id_that_is_none_is_refused_before_anyone_is_asked(hub: Hub, guarded: Node, moment: str) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    with guarded.client() as client:
        for repo_id in REPO_IDS:
            good, bad = reference("org/tiny"), reference(repo_id)
            models = {"model": bad} if moment == "base" else {"model": good, "adapters": [bad]}
            error = refusal(client, cache_pb2.EnsureModelRequest(**models))
            assert (error.reason, error.exit_status) == ("INVALID_REPO_ID", 64), repo_id[:50]
    assert hub.requests() == []
    assert list(guarded.hub_dir.iterdir()) == []


@pytest.mark.parametrize("repo_id", ["../../etc", "/etc/passwd", "org\\name", "org/na\nme", "org/\x1b[31mname"])
def test_the_command_says_so_and_exits_64(guarded: Node, repo_id: str) -> None:
    done = guarded.run("ensure-model", repo_id)
    assert done.returncode == 64
    assert "is not a repository id" in done.stderr
    assert CONTROL.search(done.stderr) is None
    (line,) = guarded.log_lines("refused")
    assert (line["call"], line["reason"]) == ("EnsureModel", "INVALID_REPO_ID")
    assert line["why"] in done.stderr
    assert line["request_id"]


def test_a_refusal_stands_in_the_log_once(hub: Hub, guarded: Node) -> None:
    assert guarded.run("ensure-model", "org/nowhere").returncode == 66
    assert guarded.run("cachectl", "pin", "org/nowhere").returncode == 66
    (line,) = guarded.log_lines("refused")
    assert (line["call"], line["reason"]) == ("PinModel", "MODEL_NOT_CACHED")
    (line,) = guarded.log_lines("ensured")
    assert (line["level"], line["reason"]) == ("info", "REPO_NOT_FOUND")
    hub.create_repo("org/there").commit({"config.json": b"{}", "model.safetensors": b"x" * 1000})
    hub.stop()
    assert guarded.run("ensure-model", "org/there").returncode == 69
    (line,) = [line for line in guarded.log_lines("ensured") if line["models"] == ["org/there@main"]]
    assert (line["level"], line["reason"]) == ("warning", "UPSTREAM_UNAVAILABLE")


def test_a_download_says_when_it_begins(hub: Hub, guarded: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    guarded.ensure("org/tiny")
    (line,) = guarded.log_lines("fetching")
    assert line["model"].startswith("org/tiny@")
    assert (line["kept_bytes"], line["waiters"], line["bytes"] > 0) == (0, 1, True)
    guarded.ensure("org/tiny")
    assert len(guarded.log_lines("fetching")) == 1


def test_operators_are_held_to_the_same_rules(guarded: Node) -> None:
    with guarded.admin() as admin:
        for repo_id in REPO_IDS:
            calls: list[Callable[[], object]] = [
                lambda r=repo_id: admin.evict([reference(r)], dry_run=False),
                lambda r=repo_id: admin.pin(reference(r)),
                lambda r=repo_id: admin.unpin(reference(r)),
                lambda r=repo_id: admin.cancel_transfer(r),
                lambda r=repo_id: admin.cache.get(reference(r)),
            ]
            for call in calls:
                with pytest.raises(ModelCacheError) as caught:
                    call()
                assert (caught.value.reason, caught.value.exit_status) == ("INVALID_REPO_ID", 64), repo_id[:50]


REVISIONS = [
    "../../main",
    "..",
    ".",
    "/etc/passwd",
    "refs/../../../main",
    "a..b",
    "a//b",
    "a/",
    "main\0",
    "main\n",
    "\x1b[2J",
    "main\\x",
    ".hidden",
    "-f",
    "main.lock",
    "x" * 256,
    "x" * MIB,
]


def test_a_revision_that_could_leave_refs_is_refused(hub: Hub, guarded: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    with guarded.client() as client, guarded.admin() as admin:
        for revision in REVISIONS:
            error = refusal(client, cache_pb2.EnsureModelRequest(model=reference("org/tiny", revision)))
            assert (error.reason, error.exit_status) == ("INVALID_REVISION", 64), revision[:50]
            with pytest.raises(ModelCacheError) as caught:
                admin.evict([reference("org/tiny", revision)], dry_run=False)
            assert caught.value.reason == "INVALID_REVISION", revision[:50]
    assert hub.requests() == []


PROFILES: list[common_pb2.Profile] = [
    common_pb2.Profile(name="../../etc"),
    common_pb2.Profile(name="vllm\n"),
    common_pb2.Profile(name="gguf:../.."),
    common_pb2.Profile(name="gguf:Q4\0"),
    common_pb2.Profile(name="gguf:"),
    common_pb2.Profile(name="adopted"),
    common_pb2.Profile(name="x" * MIB),
    common_pb2.Profile(name="vllm", include=["*"]),
    common_pb2.Profile(include=["../*"]),
    common_pb2.Profile(include=["a/../../*"]),
    common_pb2.Profile(include=["/etc/*"]),
    common_pb2.Profile(include=["a\\b"]),
    common_pb2.Profile(include=["a\0b"]),
    common_pb2.Profile(exclude=["\x1b[31m*"]),
    common_pb2.Profile(include=[""]),
    common_pb2.Profile(include=["*" * 257]),
    common_pb2.Profile(include=["*"] * 65),
    common_pb2.Profile(exclude=["x" * MIB]),
]


def test_a_profile_or_pattern_that_is_none_is_refused(hub: Hub, guarded: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    with guarded.client() as client:
        for profile in PROFILES:
            model = common_pb2.ModelReference(repo_id="org/tiny", profile=profile)
            error = refusal(client, cache_pb2.EnsureModelRequest(model=model))
            assert (error.reason, error.exit_status) == ("INVALID_PATTERN", 64), str(profile)[:80]
    assert hub.requests() == []


def test_a_pattern_made_to_be_slow_is_answered_in_time(hub: Hub, guarded: Node) -> None:
    hub.create_repo("org/slow").commit({"a" * 250 + ".json": b"{}", "config.json": b"{}"})
    model = reference("org/slow", include=["*a" * 128, "[" * 200, "config.json"])
    began = time.monotonic()
    with guarded.client() as client:
        list(client.ensure(model, timeout_seconds=30))
    assert time.monotonic() - began < 10


HOLDERS = ["line\nbreak", "\x1b[31mred", "nul\0", "\u202egnp", "x" * 257, "x" * MIB]
POD_UIDS = ["../..", "..", ".", "../canary", "/etc", "a/b", "a\0", "uid\n", "x" * 65, "x" * MIB]


def test_who_asks_is_checked_too(hub: Hub, guarded: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    model = reference("org/tiny")
    requests = [
        *(cache_pb2.EnsureModelRequest(model=model, lease=cache_pb2.LeaseRequest(holder=h)) for h in HOLDERS),
        *(cache_pb2.EnsureModelRequest(model=model, lease=cache_pb2.LeaseRequest(pod_uid=uid)) for uid in POD_UIDS),
        *(cache_pb2.EnsureModelRequest(model=model, request_id=text) for text in HOLDERS),
        *(cache_pb2.EnsureModelRequest(model=model, token=text) for text in ("a\r\nX-Evil: 1", "\0", "x" * MIB)),
    ]
    with guarded.client() as client:
        for request in requests:
            error = refusal(client, request)
            assert (error.reason, error.exit_status) == ("INVALID_REQUEST", 64), str(request)[:80]
    assert hub.requests() == []
    assert guarded.status().leases == 0


# What an upstream lists

LISTED = [
    "../../etc/passwd",
    "..",
    "a/../../../etc/passwd",
    "/etc/passwd",
    "a\\b.json",
    "..\\..\\etc",
    "a\0b.json",
    "a\nb.json",
    "\x1b[31m.json",
    "\u2028.json",
    "\ud800.json",
    "./a.json",
    "a//b.json",
    "a/",
    "",
    "x" * 256,
    "/".join(["d" * 200] * 6),
    "config.json/below",
    "config.json",
]


@pytest.mark.parametrize("profile", ["vllm", "full"])
def test_a_listing_with_a_path_that_cannot_be_stored_is_refused_whole(hub: Hub, guarded: Node, profile: str) -> None:
    repo = hub.create_repo("org/hostile")
    repo.commit(tiny_llama())
    with guarded.client() as client:
        for path in LISTED:
            repo.hostile_entries([HostileEntry(path)])
            error = refusal(client, cache_pb2.EnsureModelRequest(model=reference("org/hostile", profile=profile)))
            assert (error.reason, error.exit_status) == ("INVALID_MANIFEST", 65), ascii(path)
        assert guarded.visible("org/hostile") == []
        repo.hostile_entries([HostileEntry("../../etc", entry_type="directory")])
        list(client.ensure(reference("org/hostile", profile=profile), timeout_seconds=30))
    assert len(guarded.visible("org/hostile")) == 1


def test_the_command_exits_65_for_a_hostile_listing(hub: Hub, guarded: Node) -> None:
    repo = hub.create_repo("org/hostile")
    repo.commit(tiny_llama())
    repo.hostile_entries(["../../etc/pass\x1b[31mwd"])
    done = guarded.run("ensure-model", "org/hostile")
    assert done.returncode == 65
    assert "../../etc/pass" in done.stderr
    assert CONTROL.search(done.stderr) is None


@pytest.mark.parametrize("shard", ["../../../etc/passwd", "/etc/passwd", "a\0b", "missing.safetensors"])
def test_an_index_that_names_what_the_listing_lacks_is_refused(hub: Hub, guarded: Node, shard: str) -> None:
    index = f'{{"weight_map": {{"a": "model-1.safetensors", "b": {ascii(shard)!s}}}}}'.replace("'", '"')
    index = index.replace("\\x00", "\\u0000")
    hub.create_repo("org/index").commit(
        {"config.json": b"{}", "model.safetensors.index.json": index.encode(), "model-1.safetensors": b"weights"}
    )
    with guarded.client() as client:
        error = refusal(client, cache_pb2.EnsureModelRequest(model=reference("org/index")))
    assert (error.reason, error.exit_status) == ("INVALID_MANIFEST", 65)
    assert guarded.visible("org/index") == []


# How much

FILES = 10_000


def many_files(count: int) -> dict[str, bytes]:
    return {f"part-{number // 100:03d}/{number:05d}.json": b'{"number": %d}' % number for number in range(count)}


@pytest.mark.deep
def test_ten_thousand_files_are_served(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"timeout": "30s"}).start()
    files = many_files(FILES)
    commit = hub.create_repo("org/many").commit(files)
    began = time.monotonic()
    node.ensure("org/many", "--profile", "full", timeout=120)
    seconds = time.monotonic() - began
    assert seconds < 100, "the time grows with the square of the number again: 138 s then, 24 s now, on a quiet machine"
    root = node.snapshot("org/many", commit)
    assert sum(1 for path in root.rglob("*") if path.is_file()) == FILES
    for path in list(files)[:: FILES // 50]:
        assert (root / path).read_bytes() == files[path]
    assert hub.request_count(kind="resolve", method="GET") == FILES
    began = time.monotonic()
    (again,) = node.ensure("org/many", "--profile", "full")
    assert again["outcome"] == "hit"
    assert time.monotonic() - began < 5
    node.assert_disk_truth()


def test_more_files_than_configured_are_refused(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"max_files": 100}).start()
    hub.create_repo("org/fits").commit(many_files(100))
    hub.create_repo("org/many").commit(many_files(101))
    node.ensure("org/fits", "--profile", "full")
    done = node.run("ensure-model", "org/many", "--profile", "full")
    assert done.returncode == 65
    assert "more than 100 files (hub.max_files)" in done.stderr
    assert node.visible("org/many") == []
    assert hub.request_count(repo="org/many", kind="resolve") == 0


def test_a_hundred_thousand_files_are_the_most_unless_configured(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(hub={"timeout": "120s"}).start()
    hub.page_size = 60_000
    repo = hub.create_repo("org/vast")
    repo.commit({"config.json": b"{}"})
    repo.hostile_entries(f"{number}.json" for number in range(100_000))
    done = node.run("ensure-model", "org/vast", "--include", "config.json", timeout=150)
    assert done.returncode == 65
    assert "more than 100000 files (hub.max_files)" in done.stderr
    repo.hostile_entries(f"{number}.json" for number in range(99_999))
    node.ensure("org/vast", "--include", "config.json", timeout=150)

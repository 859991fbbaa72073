"""The real huggingface_hub, unchanged, downloads from the test Hub and gets every byte right."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import RepoFile, RepoFolder

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import kitchen_sink, paced_model, sharded_llama, tiny_llama


def assert_same(snapshot: str, files: dict[str, bytes]) -> None:
    root = Path(snapshot)
    found = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert found == files


def listed_files(hub: Hub, repo_id: str, *, expand: bool = False) -> dict[str, RepoFile]:
    entries = HfApi(hub.endpoint).list_repo_tree(repo_id, recursive=True, expand=expand)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@pytest.mark.parametrize("build", [tiny_llama, sharded_llama, kitchen_sink])
def test_a_snapshot_is_byte_identical(hub: Hub, tmp_path: Path, build: Callable[[], dict[str, bytes]]) -> None:
    files = build()
    sha = hub.create_repo("org/model").commit(files)
    snapshot = snapshot_download("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert Path(snapshot).name == sha
    assert_same(snapshot, files)


def test_blobs_are_named_as_the_real_hub_names_them(hub: Hub, tmp_path: Path) -> None:
    repo = hub.create_repo("org/model")
    sha = repo.commit(tiny_llama())
    snapshot_download("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    blobs = {blob.name for blob in (tmp_path / "models--org--model" / "blobs").iterdir()}
    assert blobs == {file.etag for file in repo.files(sha).values()}


def test_a_repo_without_an_organisation(hub: Hub, tmp_path: Path) -> None:
    hub.create_repo("gpt2").commit({"config.json": b"{}", "sub/model.safetensors": b"weights"})
    snapshot = snapshot_download("gpt2", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert_same(snapshot, {"config.json": b"{}", "sub/model.safetensors": b"weights"})


def test_synthetic_shards_arrive_as_they_were_made(hub: Hub, tmp_path: Path) -> None:
    model = paced_model(total=8 * MIB, files=2)
    hub.create_repo("org/paced").commit(model)
    snapshot = snapshot_download("org/paced", cache_dir=tmp_path, endpoint=hub.endpoint)
    shards = {name: source for name, source in model.items() if isinstance(source, Synthetic)}
    assert len(shards) == 2
    for name, source in shards.items():
        assert (Path(snapshot) / name).read_bytes() == b"".join(source.blocks())


def test_odd_names_survive_quoting(hub: Hub, tmp_path: Path) -> None:
    files = {"a b/ü%20#?.txt": b"1", "weights +&=.safetensors": b"2", "deep/er/and/deeper.bin": b"3"}
    hub.create_repo("org/odd").commit(files)
    assert_same(snapshot_download("org/odd", cache_dir=tmp_path, endpoint=hub.endpoint), files)


@pytest.mark.parametrize("revision", ["main", "v1", "feature/x", "refs/pr/1", "refs/heads/main"])
def test_every_kind_of_revision_resolves(hub: Hub, tmp_path: Path, revision: str) -> None:
    repo = hub.create_repo("org/model")
    sha = repo.commit({"config.json": b"{}"})
    repo.tag("v1", sha)
    repo.move("feature/x", sha)
    repo.move("refs/pr/1", sha)
    path = hf_hub_download("org/model", "config.json", revision=revision, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert Path(path).parent.name == sha
    assert HfApi(hub.endpoint).model_info("org/model", revision=revision).sha == sha


def test_a_branch_that_moves_is_followed_and_a_commit_is_not(hub: Hub, tmp_path: Path) -> None:
    repo = hub.create_repo("org/model")
    old = repo.commit({"config.json": b"1", "gone.txt": b"x"})
    new = repo.commit({"config.json": b"2", "gone.txt": None}, base="main")
    assert_same(snapshot_download("org/model", cache_dir=tmp_path, endpoint=hub.endpoint), {"config.json": b"2"})
    pinned = snapshot_download("org/model", revision=old, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert_same(pinned, {"config.json": b"1", "gone.txt": b"x"})
    repo.move("main", old)
    assert HfApi(hub.endpoint).model_info("org/model").sha == old != new


def test_commit_ids_depend_on_content_alone(hub: Hub) -> None:
    with Hub() as other:
        first = [place.create_repo("org/same").commit(tiny_llama()) for place in (hub, other)]
    assert first[0] == first[1]
    assert len(first[0]) == 40
    assert hub.create_repo("org/different").commit(tiny_llama()) != first[0]


def test_a_listing_of_many_pages_is_whole_and_in_order(hub: Hub) -> None:
    files = {f"part/{number:03d}.txt": str(number).encode() for number in range(20)}
    hub.create_repo("org/many").commit(files)
    entries = list(HfApi(hub.endpoint).list_repo_tree("org/many", recursive=True))
    assert [entry.path for entry in entries if isinstance(entry, RepoFile)] == sorted(files)
    assert [entry.path for entry in entries if isinstance(entry, RepoFolder)] == ["part"]
    assert hub.request_count(kind="api", path_glob="tree") == 7


def test_a_listing_tells_size_blob_id_and_lfs(hub: Hub) -> None:
    repo = hub.create_repo("org/model")
    sha = repo.commit({"config.json": b"{}", "model.safetensors": b"weights"})
    listed = listed_files(hub, "org/model", expand=True)
    truth = repo.files(sha)
    small, large = listed["config.json"], listed["model.safetensors"]
    assert (small.size, small.blob_id, small.lfs) == (2, truth["config.json"].git_sha1, None)
    assert large.lfs is not None
    assert (large.lfs.size, large.lfs.sha256) == (7, truth["model.safetensors"].sha256)
    assert large.lfs.pointer_size == truth["model.safetensors"].pointer_size
    assert large.blob_id == truth["model.safetensors"].git_sha1
    assert large.xet_hash is None
    assert large.last_commit is not None
    assert large.last_commit.oid == sha
    assert large.security is not None
    assert large.security.safe


def test_a_folder_can_be_listed_alone(hub: Hub) -> None:
    hub.create_repo("org/model").commit({"a/b/1.txt": b"1", "a/2.txt": b"2", "3.txt": b"3"})
    api = HfApi(hub.endpoint)
    assert [entry.path for entry in api.list_repo_tree("org/model")] == ["3.txt", "a"]
    assert [entry.path for entry in api.list_repo_tree("org/model", "a")] == ["a/2.txt", "a/b"]
    assert [entry.path for entry in api.list_repo_tree("org/model", "a/b", recursive=True)] == ["a/b/1.txt"]


def test_a_xet_hash_is_listed_only_when_asked_for(hub: Hub) -> None:
    repo = hub.create_repo("org/model")
    repo.commit({"a.safetensors": b"a", "b.safetensors": b"b"}, xet_hashes={"a.safetensors": "ab" * 32})
    listed = {path: entry.xet_hash for path, entry in listed_files(hub, "org/model").items()}
    assert listed == {"a.safetensors": "ab" * 32, "b.safetensors": None}


def test_model_info_refs_commits_and_paths(hub: Hub) -> None:
    repo = hub.create_repo("org/model")
    first = repo.commit({"config.json": b"{}"})
    second = repo.commit({"model.safetensors": b"weights"}, base="main")
    repo.tag("v1", first)
    repo.move("refs/pr/1", first)
    api = HfApi(hub.endpoint)
    info = api.model_info("org/model", files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated, info.author) == ("org/model", second, False, False, "org")
    assert [(sibling.rfilename, sibling.size) for sibling in info.siblings or []] == [
        ("config.json", 2), ("model.safetensors", 7)
    ]  # fmt: skip
    refs = api.list_repo_refs("org/model", include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", second)]
    assert [(ref.ref, ref.target_commit) for ref in [*refs.tags, *(refs.pull_requests or [])]] == [
        ("refs/tags/v1", first), ("refs/pr/1", first)
    ]  # fmt: skip
    assert [commit.commit_id for commit in api.list_repo_commits("org/model")] == [second, first]
    assert [entry.path for entry in api.get_paths_info("org/model", ["config.json", "no"])] == ["config.json"]
    assert api.model_info("org/model", expand=["sha"]).siblings is None
    assert api.file_exists("org/model", "config.json")
    assert not api.file_exists("org/model", "no")


def test_a_renamed_repo_is_found_under_its_old_name(hub: Hub, tmp_path: Path) -> None:
    hub.create_repo("org/old").commit(tiny_llama())
    hub.rename_repo("org/old", "neworg/new")
    assert_same(snapshot_download("org/old", cache_dir=tmp_path, endpoint=hub.endpoint), tiny_llama())
    assert HfApi(hub.endpoint).model_info("org/old").id == "neworg/new"


def test_the_command_line_client_downloads(hub: Hub, tmp_path: Path) -> None:
    files = tiny_llama()
    hub.create_repo("org/tiny").commit(files)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [str(Path(sys.executable).with_name("hf")), "download", "org/tiny", "--local-dir", str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    found = {name: (tmp_path / "out" / name).read_bytes() for name in files}
    assert found == files
    unserved = {record.path for record in hub.requests() if record.status not in (200, 302)}
    assert unserved == set()


def test_hostile_entries_reach_the_client_untouched(hub: Hub) -> None:
    paths = ["../../etc/passwd", "/abs", "a\\b", "a\x00b", "a\nb", "config.json", "config.json/child"]
    repo = hub.create_repo("org/evil")
    repo.commit({"config.json": b"{}"})
    repo.hostile_entries(paths)
    listed = [entry.path for entry in HfApi(hub.endpoint).list_repo_tree("org/evil", recursive=True)]
    assert listed == ["config.json", *paths]

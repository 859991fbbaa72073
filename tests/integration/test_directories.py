"""sources.directories: what lies in an image or on another volume is verified and served, and not a byte is fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import tiny_llama
from tests.integration.test_doctor import examined
from tests.node.daemon import Node
from tests.node.library import download

WEIGHTS = Synthetic(5 * MIB, 1)


def content(files: dict[str, bytes | Synthetic], path: str) -> bytes:
    found = files[path]
    return found if isinstance(found, bytes) else b"".join(found.blocks())


@pytest.fixture
def model(hub: Hub) -> dict[str, bytes | Synthetic]:
    files: dict[str, bytes | Synthetic] = {**tiny_llama(), "model.safetensors": WEIGHTS, "deep/er/notes.json": b"{}"}
    hub.create_repo("org/model").commit(files)
    return files


@pytest.fixture
def baked(hub: Hub, model: dict[str, bytes | Synthetic], tmp_path: Path) -> Path:
    """What an image would hold: a cache that the real library has filled."""
    home = tmp_path / "image"
    download(hub, home, "org/model")
    hub.reset_counters()
    return home


def tree(root: Path, files: dict[str, bytes | Synthetic]) -> Path:
    """A plain folder of each repository, which says nothing of itself."""
    for path in files:
        (root / "org/model" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "org/model" / path).write_bytes(content(files, path))
    return root


def sources(*directories: Path, offline: bool = False) -> dict[str, dict[str, object]]:
    return {"sources": {"directories": [str(path) for path in directories]}, "hub": {"offline": offline}}


def assert_served(node: Node, files: dict[str, bytes | Synthetic], path: str) -> None:
    for name in ("config.json", "model.safetensors"):
        assert Path(path, name).read_bytes() == content(files, name)
    node.assert_disk_truth()


@pytest.mark.parametrize("kind", ["a cache", "a tree"])
def test_nothing_is_fetched_of_what_lies_there(
    hub: Hub,
    make_node: Callable[..., Node],
    model: dict[str, bytes | Synthetic],
    baked: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    directory = baked if kind == "a cache" else tree(tmp_path / "tree", model)
    node = make_node(**sources(tmp_path / "none", directory)).start()
    (ready,) = node.ensure("org/model")
    assert (ready["outcome"], ready["bytes_fetched"]) == ("downloaded", 0)
    assert hub.request_count(kind="cdn") == 0
    assert node.metric("modelcached_received_bytes_total", origin="local") >= WEIGHTS.size
    assert_served(node, model, ready["path"])
    assert node.ctl("verify", "--all")["bad"] == []


def test_what_a_directory_lacks_or_has_wrong_comes_from_the_hub(
    hub: Hub, make_node: Callable[..., Node], model: dict[str, bytes | Synthetic], baked: Path
) -> None:
    blobs = {path.stat().st_size: path for path in baked.rglob("blobs/*")}
    blobs[WEIGHTS.size].write_bytes(bytes(WEIGHTS.size))  # of the right size
    blobs[len(content(model, "config.json"))].unlink()
    node = make_node(**sources(baked)).start()
    (ready,) = node.ensure("org/model")
    assert hub.body_bytes("org/model", "model.safetensors") == WEIGHTS.size
    assert hub.body_bytes("org/model", "config.json") > 0
    assert hub.body_bytes("org/model", "tokenizer.json") == 0
    assert_served(node, model, ready["path"])


def test_what_is_wrong_there_is_not_fetched_where_the_hub_is_not_to_be_asked(
    hub: Hub, make_node: Callable[..., Node], baked: Path
) -> None:
    (weights,) = (path for path in baked.rglob("blobs/*") if path.stat().st_size == WEIGHTS.size)
    weights.write_bytes(bytes(WEIGHTS.size))
    node = make_node(**sources(baked, offline=True)).start()
    done = node.run("ensure-model", "org/model")
    assert done.returncode == 65
    assert str(weights) in done.stderr
    assert node.models() == {}
    assert hub.request_count() == 0


def test_what_was_lost_and_lies_nowhere_else_is_named_where_the_hub_is_not_to_be_asked(
    hub: Hub, make_node: Callable[..., Node], baked: Path
) -> None:
    node = make_node(**sources(baked, offline=True)).start()
    (ready,) = node.ensure("org/model")
    node.stop()
    Path(ready["path"], "model.safetensors").resolve().unlink()
    shutil.rmtree(baked)
    node.start()
    done = node.run("ensure-model", "org/model")
    assert done.returncode == 69
    assert "sources.directories have no model.safetensors" in done.stderr
    assert hub.request_count() == 0


@pytest.mark.parametrize("silence", ["offline", "down"])
def test_without_a_hub_a_directory_says_what_the_model_is(
    hub: Hub,
    make_node: Callable[..., Node],
    model: dict[str, bytes | Synthetic],
    baked: Path,
    silence: str,
) -> None:
    offline = silence == "offline"
    node = make_node(**sources(baked, offline=offline)).start()
    if not offline:
        hub.stop()
    (ready,) = node.ensure("org/model")
    assert_served(node, model, ready["path"])
    assert Path(node.hub_dir, "models--org--model/refs/main").read_text() == ready["commit"], "found by its name"
    if offline:
        assert hub.request_count() == 0
        done = node.run("ensure-model", "org/other")
        assert done.returncode == 69
        assert "hub.offline is set" in done.stderr
        assert "add a directory" in done.stderr
        assert node.log_lines("the Hub failed") == [], "it is not even tried"
    node.kill()
    node.start()
    (again,) = node.ensure("org/model")
    assert again["outcome"] == "hit"


def test_what_a_directory_said_is_the_hubs_to_say_when_it_is_back(
    hub: Hub, make_node: Callable[..., Node], model: dict[str, bytes | Synthetic], baked: Path
) -> None:
    (snapshot,) = (baked / "hub/models--org--model/snapshots").iterdir()
    (snapshot / "deep/er/notes.json").unlink()
    node = make_node(**sources(baked, offline=True)).start()
    (ready,) = node.ensure("org/model", "--profile", "full")
    assert not Path(ready["path"], "deep").exists(), "the directory does not know of it"
    assert not list(node.hub_dir.rglob("trees/*.json")), "nor is it said that this is all"
    node.settings["hub"] = {**node.settings["hub"], "offline": False}
    node.write_config()
    node.wait_until(
        lambda: "offline" not in str(node.ctl("config", "--changed")),
        20,
        "the Hub is asked",
    )
    (hit,) = node.ensure("org/model", "--profile", "full")
    assert hit["outcome"] == "hit"
    (more,) = node.ensure("org/model", "--include", "*.json")
    assert Path(more["path"], "deep/er/notes.json").read_bytes() == b"{}"
    assert Path(more["path"], "model.safetensors").exists(), "a snapshot only grows"
    node.assert_disk_truth()


def test_a_gated_model_of_a_directory_is_the_hubs_to_refuse(
    hub: Hub, make_node: Callable[..., Node], baked: Path
) -> None:
    repo = hub.find_repo("org/model")
    assert repo is not None
    repo.gated = "auto"
    node = make_node(**sources(baked)).start()
    done = node.run("ensure-model", "org/model")
    assert done.returncode == 77
    assert node.models() == {}


def test_the_doctor_says_what_the_directories_are(
    make_node: Callable[..., Node], baked: Path, tmp_path: Path, model: dict[str, bytes | Synthetic]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    directories = [baked, tree(tmp_path / "tree", model), empty, tmp_path / "none"]
    node = make_node(**sources(*directories, offline=True)).start()
    status, found = examined(node)
    assert status == 1
    assert [finding["level"] for finding in found["directories"]] == ["ok", "ok", "warning", "failure"]
    texts = [finding["text"] for finding in found["directories"]]
    assert texts[:3] == [f"{baked} has 1 models", f"{directories[1]} has 1 models", f"{empty} has no models"]
    assert "No such file" in texts[3]
    assert [finding["text"] for finding in found["upstream"]] == ["hub.offline is set: the Hub is never asked"]
    assert "token" not in found


# import --move, and without a Hub


def test_an_import_without_a_hub_takes_the_folders_word(
    hub: Hub, make_node: Callable[..., Node], model: dict[str, bytes | Synthetic], baked: Path, tmp_path: Path
) -> None:
    node = make_node(hub={"offline": True}).start()
    (told,) = node.ctl("import", str(baked), "org/model")
    assert hub.request_count() == 0
    assert_served(node, model, told["path"])
    silent = tree(tmp_path / "tree", model) / "org/model"
    done = node.run("cachectl", "import", str(silent), "org/model@dev")
    assert done.returncode == 69
    assert "hub.offline is set, and neither the cache nor sources.directories know org/model@dev" in done.stderr


@pytest.mark.parametrize("kind", ["a cache", "a tree"])
def test_what_is_moved_is_not_copied_and_goes_from_its_folder(
    hub: Hub,
    make_node: Callable[..., Node],
    model: dict[str, bytes | Synthetic],
    baked: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    folder = baked if kind == "a cache" else tree(tmp_path / "tree", model) / "org/model"
    (weights,) = {path.resolve() for path in folder.rglob("*") if path.stat().st_size == WEIGHTS.size}
    inode = weights.stat().st_ino
    os.chown(weights, 65534, 65534)
    if kind == "a tree":
        (folder / "mine.txt").write_text("not of the repository")
    node = make_node().start()
    refused = node.run("cachectl", "import", str(folder), "org/model", "--profile", "full", "--move")
    assert refused.returncode == 64
    assert "--yes" in refused.stderr
    (told,) = node.ctl("import", str(folder), "org/model", "--profile", "full", "--move", "--yes")
    assert told["kept_paths"] == []
    assert told["removed_bytes"] < WEIGHTS.size, "its blocks are in the cache by now"
    blob = Path(told["path"], "model.safetensors").stat()
    assert (blob.st_ino, blob.st_uid, blob.st_nlink) == (inode, os.geteuid(), 1)
    assert_served(node, model, told["path"])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    assert left == (["mine.txt"] if kind == "a tree" else [name for name in left if "models--org--model" not in name])
    assert kind == "a tree" or not (folder / "hub/models--org--model").exists()


def test_what_other_snapshots_need_and_what_has_another_content_stays(
    hub: Hub, make_node: Callable[..., Node], model: dict[str, bytes | Synthetic], baked: Path
) -> None:
    repo = baked / "hub/models--org--model"
    (snapshot,) = (repo / "snapshots").iterdir()
    shutil.copytree(snapshot, repo / "snapshots" / ("2" * 40), symlinks=True)
    node = make_node().start()
    node.ensure("org/model")
    another = content(model, "config.json")[::-1]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_bytes(another)
    (told,) = node.ctl("import", str(baked), "org/model", "--move", "--yes")
    assert told["kept_paths"] == ["config.json"]
    assert told["outcome"] == "hit"
    assert (snapshot / "config.json").read_bytes() == another
    assert not (snapshot / "model.safetensors").exists()
    other = repo / "snapshots" / ("2" * 40)
    assert (other / "model.safetensors").read_bytes() == content(model, "model.safetensors")
    assert (repo / "refs" / "main").exists()


def test_what_a_link_leads_to_outside_the_folder_is_not_taken_over(
    make_node: Callable[..., Node], model: dict[str, bytes | Synthetic], tmp_path: Path
) -> None:
    folder = tree(tmp_path / "tree", model) / "org/model"
    others = tmp_path / "others.safetensors"
    (folder / "model.safetensors").rename(others)
    (folder / "model.safetensors").symlink_to(others)
    os.chown(others, 65534, 65534)
    before = others.stat()
    node = make_node().start()
    (told,) = node.ctl("import", str(folder), "org/model", "--move", "--yes")
    assert_served(node, model, told["path"])
    after = others.stat()
    assert (after.st_ino, after.st_uid, after.st_mode, after.st_nlink) == (before.st_ino, 65534, before.st_mode, 1)
    assert Path(told["path"], "model.safetensors").stat().st_ino != before.st_ino
    assert not (folder / "model.safetensors").is_symlink(), "the link was the folder's"


def test_the_cache_is_not_imported_into_itself(
    hub: Hub, node: Node, model: dict[str, bytes | Synthetic], tmp_path: Path
) -> None:
    (ready,) = node.ensure("org/model")
    link = tmp_path / "link"
    link.symlink_to(ready["path"])
    for path in (node.cache_dir, node.hub_dir, ready["path"], link):
        done = node.run("cachectl", "import", str(path), "org/model", "--move", "--yes")
        assert done.returncode == 64, path
        assert "lies in the cache itself" in done.stderr
    assert_served(node, model, ready["path"])


def test_a_lying_folder_leaves_what_was_downloaded_before(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    big = Synthetic(64 * MIB, 1)
    hub.create_repo("org/big").commit({"config.json": b"{}", "model.safetensors": big})
    node = make_node(transfer={"rate_limit": "32MB"}).start()
    caller = node.popen("ensure-model", "org/big")
    node.wait_until(lambda: node.metric("modelcached_received_bytes_total", origin="hub") > 16 * MIB, 30, "a part")
    node.kill()
    caller.kill()
    lying = tmp_path / "lying"
    lying.mkdir()
    (lying / "config.json").write_bytes(b"{}")
    (lying / "model.safetensors").write_bytes(bytes(big.size))
    node.settings["transfer"] = {}
    node.start()
    done = node.run("cachectl", "import", str(lying), "org/big", "--move", "--yes")
    assert done.returncode == 65
    assert (lying / "model.safetensors").read_bytes() == bytes(big.size), "it stays what it was"
    node.ensure("org/big")
    assert node.metric("modelcached_received_bytes_total", origin="hub") < 56 * MIB, "what was there is kept"
    node.assert_disk_truth()


def test_who_joins_the_flight_of_a_lying_folder_is_served_all_the_same(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    big = Synthetic(64 * MIB, 1)
    for name in ("org/big", "org/same"):
        hub.create_repo(name).commit({"config.json": b"{}", "model.safetensors": big})
    lying = tmp_path / "lying"
    lying.mkdir()
    (lying / "config.json").write_bytes(b"{}")
    (lying / "model.safetensors").write_bytes(bytes(big.size))
    node = make_node(transfer={"rate_limit": "32MB"}).start()
    importing = node.popen("cachectl", "import", str(lying), "org/big")
    node.wait_until(lambda: node.metric("modelcached_received_bytes_total", origin="local") > 8 * MIB, 30, "a part")
    (ready,) = node.ensure("org/same")
    assert Path(ready["path"], "model.safetensors").read_bytes() == b"".join(big.blocks())
    importing.wait(30)

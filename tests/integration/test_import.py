"""cachectl import: what lies on the node already is taken from there, verified, and nothing is fetched."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import tiny_llama
from tests.node.daemon import Node
from tests.node.library import download


def plain(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def model(hub: Hub) -> dict[str, bytes]:
    files = {**tiny_llama(), "deep/er/notes.json": b"{}"}
    hub.create_repo("org/model").commit(files)
    return files


def weights_fetched(hub: Hub) -> int:
    return hub.body_bytes("org/model", "model.safetensors")


def test_a_plain_folder_is_copied_verified_and_served(
    hub: Hub, node: Node, model: dict[str, bytes], tmp_path: Path
) -> None:
    folder = plain(tmp_path / "mine", model)
    (told,) = node.ctl("import", str(folder), "org/model", "--profile", "full")
    assert (told["outcome"], told["bytes_fetched"]) == ("downloaded", 0)
    assert hub.request_count(kind="cdn") == 0
    assert node.metric("modelcached_received_bytes_total", origin="local") >= len(model["model.safetensors"])
    for path, content in model.items():
        assert Path(told["path"], path).read_bytes() == content
    (ready,) = node.ensure("org/model", "--profile", "full")
    assert ready["outcome"] == "hit"
    assert node.models()[f"org/model@{told['commit']}"]["revisions"] == ["main"]
    before = {path.stat().st_ino for path in folder.rglob("*")}
    blobs = {path.stat().st_ino for path in node.hub_dir.rglob("blobs/*")}
    assert not before & blobs, "nothing that others may write is linked"
    assert {path: (folder / path).read_bytes() for path in model} == model
    assert [lease["holder"] for lease in node.ctl("leases") if lease["holder"] == "cachectl import"] == []
    node.assert_disk_truth()


def test_the_librarys_own_cache_is_imported_by_the_commit_that_it_has(
    hub: Hub, node: Node, model: dict[str, bytes], tmp_path: Path
) -> None:
    download(hub, tmp_path / "home", "org/model")
    repo = hub.find_repo("org/model")
    assert repo is not None
    repo.commit({"config.json": b'{"newer": true}'})
    hub.reset_counters()
    (told,) = node.ctl("import", str(tmp_path / "home"), "org/model")
    assert told["commit"] == os.listdir(tmp_path / "home" / "hub" / "models--org--model" / "snapshots")[0]
    assert hub.request_count(kind="cdn") == 0
    assert Path(told["path"], "config.json").read_bytes() == model["config.json"]


def test_a_folder_that_lies_is_refused_by_file_and_leaves_nothing(
    hub: Hub, node: Node, model: dict[str, bytes], tmp_path: Path
) -> None:
    folder = plain(tmp_path / "mine", model)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = node.run("cachectl", "import", str(folder), "org/model")
    assert done.returncode == 65
    assert str(weights) in done.stderr
    assert node.models() == {}
    assert weights_fetched(hub) == 0
    weights.write_bytes(model["model.safetensors"])
    assert "org/model: imported, " in node.run("cachectl", "import", str(folder), "org/model").stderr
    assert "org/model: was cached already" in node.run("cachectl", "import", str(folder), "org/model").stderr
    assert node.ctl("verify", "--all")["bad"] == []


def test_what_is_not_there_or_has_another_size_is_refused_at_once(
    hub: Hub, node: Node, model: dict[str, bytes], tmp_path: Path
) -> None:
    folder = plain(tmp_path / "mine", model)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")  # nobody waits for who never writes
    done = node.run("cachectl", "import", str(folder), "org/model")
    assert done.returncode == 64
    assert "config.json has 2 bytes, not" in done.stderr
    assert "tokenizer.json: No such file" in done.stderr
    assert "model.safetensors is no file" in done.stderr
    for wrong in ("/nowhere", str(folder / "config.json")):
        done = node.run("cachectl", "import", wrong, "org/model")
        assert done.returncode == 64
        assert "no directory that the daemon sees" in done.stderr
    assert hub.request_count(kind="cdn") == 0


def test_no_room_is_told_before_a_byte_is_copied(hub: Hub, make_node: Callable[..., Node], tmp_path: Path) -> None:
    big = Synthetic(32 * MIB, 1)
    hub.create_repo("org/big").commit({"config.json": b"{}", "model.safetensors": big})
    folder = plain(tmp_path / "mine", {"config.json": b"{}", "model.safetensors": b"".join(big.blocks())})
    node = make_node(cache={"budget": f"{24 * MIB}B"}).start()
    done = node.run("cachectl", "import", str(folder), "org/big")
    assert done.returncode == 73
    assert os.listdir(node.cache_dir / "modelcached" / "partial") == []


@pytest.mark.deep
@pytest.mark.parametrize("who", ["client", "daemon"])
def test_killed_in_the_middle_both_sides_are_usable_and_it_goes_on(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path, who: str
) -> None:
    big = Synthetic(256 * MIB, 1)
    hub.create_repo("org/big").commit({"config.json": b"{}", "model.safetensors": big})
    folder = plain(tmp_path / "mine", {"config.json": b"{}", "model.safetensors": b"".join(big.blocks())})
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    node = make_node(transfer={"rate_limit": "64MB"}).start()
    running = node.popen("cachectl", "import", str(folder), "org/big")
    node.wait_until(lambda: node.metric("modelcached_received_bytes_total", origin="local") > 32 * MIB, 30, "a part")
    if who == "daemon":
        node.kill()
        assert running.wait(30) == 69
        node.settings["transfer"] = {}
        node.start()
    else:
        running.send_signal(signal.SIGINT)
        assert running.wait(10) == 130
    (told,) = node.ctl("import", str(folder), "org/big")
    assert Path(told["path"], "model.safetensors").read_bytes() == b"".join(big.blocks())
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    if who == "daemon":
        assert node.metric("modelcached_received_bytes_total", origin="local") < 240 * MIB, "what was there is kept"
    node.assert_disk_truth()


@pytest.mark.deep
def test_ten_thousand_files(hub: Hub, node: Node, tmp_path: Path) -> None:
    files = {f"part/{number:05}.json": json.dumps(number).encode() for number in range(10_000)}
    hub.create_repo("org/many").commit({**files, "config.json": b"{}"})
    folder = plain(tmp_path / "mine", {**files, "config.json": b"{}"})
    done = node.run("cachectl", "--json", "import", str(folder), "org/many", "--profile", "full", timeout=170)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert len(list(Path(told["path"], "part").iterdir())) == 10_000
    assert hub.request_count(kind="cdn") == 0
    shutil.rmtree(folder)

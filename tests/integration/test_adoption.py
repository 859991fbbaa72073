"""A hub/ that somebody else filled: what is right is served, what is wrong is healed, and nothing unproven answers.

The real huggingface_hub fills it, as a process of its own: over HTTP in the classic layout, over Xet in that of 2.x,
whose payloads lie in hub/blobs/ and whose repositories hold links to them (utils/_shared_blobs.py).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.hub.models import sharded_llama, tiny_llama
from tests.node import Node
from tests.node.library import fill

LAYOUTS = pytest.mark.parametrize("shared", [False, True], ids=["classic", "shared blobs"])


def folder(node: Node, repo_id: str) -> Path:
    return node.hub_dir / f"models--{repo_id.replace('/', '--')}"


def blob_of(node: Node, hub: Hub, repo_id: str, path: str) -> Path:
    repo = hub.find_repo(repo_id)
    assert repo is not None
    return folder(node, repo_id) / "blobs" / repo.files()[path].etag


def content(snapshot: Path) -> dict[str, bytes]:
    return {p.relative_to(snapshot).as_posix(): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()}


def flip_unseen(path: Path) -> None:
    """Another byte, the same size and the same mtime."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@LAYOUTS
def test_exactly_what_is_there_is_served_healed_removed_and_reported(
    hub: Hub, make_node: Callable[..., Node], shared: bool
) -> None:
    node = make_node(cache={"partial_ttl": "24h"})
    models = {
        "org/whole": tiny_llama(seed=1),
        "org/truncated": tiny_llama(seed=2),
        "org/missing": sharded_llama(seed=3),
        "org/dangling": sharded_llama(seed=4),
    }
    commits = {repo_id: hub.create_repo(repo_id).commit(files, xet=shared) for repo_id, files in models.items()}
    fill(hub, node, *models, shared=shared)
    trees = {repo_id: folder(node, repo_id) / "trees" / f"{commits[repo_id]}.json" for repo_id in models}
    assert all(tree.is_file() for tree in trees.values())
    shard = "model-00002-of-00003.safetensors"
    with blob_of(node, hub, "org/truncated", "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    orphans = [blob_of(node, hub, repo_id, shard).resolve() for repo_id in ("org/missing", "org/dangling")]
    blob_of(node, hub, "org/missing", shard).unlink()
    (node.snapshot("org/missing", commits["org/missing"]) / shard).unlink()
    dangling = blob_of(node, hub, "org/dangling", shard)
    dangling.resolve().unlink()
    old = folder(node, "org/whole") / "blobs" / f"{'a' * 64}.0123abcd.incomplete"
    young = folder(node, "org/whole") / "blobs" / f"{'b' * 64}.0123abcd.incomplete"
    old.write_bytes(b"x" * 5000)
    young.write_bytes(b"x" * 5000)
    two_days_ago = time.time() - 48 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    hub.reset_counters()

    node.start()
    (recovered,) = node.log_lines("recovered")
    assert recovered["ready"] == 0
    assert recovered["unverified"] == sorted(f"{repo_id}@{commits[repo_id][:12]}" for repo_id in models)
    untrue = ("org/truncated", "org/missing", "org/dangling")
    assert recovered["removed"] == sorted([str(old), *(str(trees[repo_id]) for repo_id in untrue)])
    library = [node.hub_dir / "CACHEDIR.TAG", node.hub_dir / ".locks"]  # its own, and no part of the layout
    # The store stays where a repository lost its link to a payload, and so does a link that lost its payload.
    store = [node.hub_dir / "blobs", dangling] if shared else []
    assert recovered["reported"] == sorted(map(str, [young, *library, *store]))
    assert not old.exists()
    assert young.exists()
    if shared:
        stems = [payload.name for payload in orphans]
        assert {path.name for path in (node.hub_dir / "blobs").rglob("*") if path.is_file()} == {
            ".huggingface-shared-blobs", stems[0], *(f"{stem}.{kind}" for stem in stems for kind in ("refs", "lock"))
        }  # fmt: skip
    assert [trees[repo_id].exists() for repo_id in models] == [True, False, False, False]
    assert {model["state"] for model in node.models().values()} == {"unverified"}
    node.assert_disk_truth()

    healed = {"org/whole": None, "org/truncated": "model.safetensors", "org/missing": shard, "org/dangling": shard}
    for repo_id, files in models.items():
        (ready,) = node.ensure(repo_id, "--profile", "full")
        path = healed[repo_id]
        assert ready["outcome"] == ("downloaded" if path else "hit")
        assert ready["bytes_fetched"] == (len(files[path]) if path else 0)
        assert content(Path(ready["path"])) == files
        assert trees[repo_id].exists()
        fetched = {total.file for total in hub.totals() if total.repo == repo_id and total.kind != "api"}
        assert fetched == ({path} if path else set())
    quarantined = node.private / "quarantine" / blob_of(node, hub, "org/truncated", "model.safetensors").name
    assert quarantined.stat().st_size == 1000
    assert {model["state"] for model in node.models().values()} == {"ready"}
    node.assert_disk_truth()
    node.stop()
    node.start()
    assert node.log_lines("recovered")[-1]["ready"] == len(models)
    assert node.log_lines("recovered")[-1]["removed"] == []


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_no_answer_before_a_hash(hub: Hub, make_node: Callable[..., Node], path: str) -> None:
    """A flipped byte with the old size and mtime is found before the first answer, in a large file and in a small."""
    node, model = make_node(), tiny_llama()
    commit = hub.create_repo("org/tiny").commit(model)
    fill(hub, node, "org/tiny")
    blob = blob_of(node, hub, "org/tiny", path)
    flip_unseen(blob)
    wrong = blob.read_bytes()
    hub.reset_counters()
    node.start()
    (ready,) = node.ensure("org/tiny")
    assert (ready["commit"], ready["bytes_fetched"]) == (commit, len(model[path]))
    assert (Path(ready["path"]) / path).read_bytes() == model[path]
    assert (node.private / "quarantine" / blob.name).read_bytes() == wrong
    assert hub.body_bytes("org/tiny", path) == len(model[path])
    assert [line["digest"] for line in node.log_lines("blob is not what its name says")] == [blob.name]
    node.assert_disk_truth()


def test_what_is_right_is_sealed_and_not_fetched(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node()
    hub.create_repo("org/tiny").commit(tiny_llama())
    fill(hub, node, "org/tiny")
    blob = blob_of(node, hub, "org/tiny", "model.safetensors")
    before = blob.stat()
    hub.reset_counters()
    node.start()
    (ready,) = node.ensure("org/tiny")
    assert (ready["outcome"], ready["bytes_fetched"]) == ("hit", 0)
    assert hub.request_count(kind="resolve") + hub.request_count(kind="cdn") == 0
    assert blob.stat().st_ino == before.st_ino
    assert blob.stat().st_mode & 0o777 == 0o444
    node.assert_disk_truth()


@pytest.mark.parametrize("theirs", ["owner", "group"])
def test_what_others_can_write_is_copied(hub: Hub, make_node: Callable[..., Node], theirs: str) -> None:
    """Verified and then changed through its old name would be served: so it becomes an inode of our own."""
    node, model = make_node(), tiny_llama()
    hub.create_repo("org/tiny").commit(model)
    fill(hub, node, "org/tiny")
    blob = blob_of(node, hub, "org/tiny", "model.safetensors")
    if theirs == "owner":
        os.chown(blob, 1000, 1000)
    else:
        blob.chmod(0o664)
    kept = node.root / "their-own-name"
    os.link(blob, kept)
    hub.reset_counters()
    node.start()
    (ready,) = node.ensure("org/tiny")
    assert ready["bytes_fetched"] == 0
    assert hub.request_count(kind="resolve") + hub.request_count(kind="cdn") == 0
    status = blob.stat()
    assert status.st_ino != kept.stat().st_ino
    assert (status.st_uid, status.st_mode & 0o777, status.st_nlink) == (os.geteuid(), 0o444, 1)
    kept.write_bytes(b"changed later")
    assert content(Path(ready["path"]))["model.safetensors"] == model["model.safetensors"]
    node.assert_disk_truth()


def test_what_others_wrote_wrongly_is_fetched(hub: Hub, make_node: Callable[..., Node]) -> None:
    node, model = make_node(), tiny_llama()
    hub.create_repo("org/tiny").commit(model)
    fill(hub, node, "org/tiny")
    blob = blob_of(node, hub, "org/tiny", "model.safetensors")
    blob.chmod(0o664)
    flip_unseen(blob)
    node.start()
    (ready,) = node.ensure("org/tiny")
    assert ready["bytes_fetched"] == len(model["model.safetensors"])
    assert content(Path(ready["path"]))["model.safetensors"] == model["model.safetensors"]
    node.assert_disk_truth()


def test_the_shared_blobs_of_2x_become_the_repositories_own(hub: Hub, make_node: Callable[..., Node]) -> None:
    """Two repositories share a payload: afterwards they share an inode, and the store is gone."""
    node, model = make_node(), tiny_llama()
    for repo_id in ("org/one", "org/two"):
        hub.create_repo(repo_id).commit(model, xet=True)
    fill(hub, node, "org/one", "org/two", shared=True)
    blobs = [blob_of(node, hub, repo_id, "model.safetensors") for repo_id in ("org/one", "org/two")]
    payload = blobs[0].resolve()
    assert all(blob.is_symlink() and blob.resolve() == payload for blob in blobs)
    assert payload.parent.parent == node.hub_dir / "blobs"
    inode = payload.stat().st_ino
    hub.reset_counters()

    node.start()
    assert [(blob.is_symlink(), blob.stat().st_ino) for blob in blobs] == [(False, inode), (False, inode)]
    assert not (node.hub_dir / "blobs").exists()
    (recovered,) = node.log_lines("recovered")
    assert len(recovered["unverified"]) == 2
    assert recovered["removed"] == []
    assert {Path(path).name for path in recovered["reported"]} <= {"CACHEDIR.TAG", ".locks"}
    node.assert_disk_truth()
    for repo_id in ("org/one", "org/two"):
        (ready,) = node.ensure(repo_id, "--profile", "full")
        assert (ready["outcome"], ready["bytes_fetched"]) == ("hit", 0)
        assert content(Path(ready["path"])) == model
    assert hub.request_count(kind="resolve") + hub.request_count(kind="cdn") == 0
    assert blobs[0].stat().st_nlink == 2
    node.assert_disk_truth()


def test_a_wrong_shared_payload_is_healed_for_both(hub: Hub, make_node: Callable[..., Node]) -> None:
    node, model = make_node(), tiny_llama()
    for repo_id in ("org/one", "org/two"):
        hub.create_repo(repo_id).commit(model, xet=True)
    fill(hub, node, "org/one", "org/two", shared=True)
    payload = blob_of(node, hub, "org/one", "model.safetensors").resolve()
    payload.chmod(0o644)
    flip_unseen(payload)
    hub.reset_counters()
    node.start()
    for repo_id in ("org/one", "org/two"):
        (ready,) = node.ensure(repo_id)
        assert content(Path(ready["path"]))["model.safetensors"] == model["model.safetensors"]
    assert hub.body_bytes("org/one", "model.safetensors") == len(model["model.safetensors"])
    assert hub.body_bytes("org/two", "model.safetensors") == 0
    node.assert_disk_truth()


def test_shared_blobs_that_others_can_write_are_copied(hub: Hub, make_node: Callable[..., Node]) -> None:
    node, model = make_node(), tiny_llama()
    hub.create_repo("org/one").commit(model, xet=True)
    fill(hub, node, "org/one", shared=True)
    blob = blob_of(node, hub, "org/one", "model.safetensors")
    payload = blob.resolve()
    os.chown(payload, 1000, 1000)
    digest = hashlib.sha256(payload.read_bytes()).hexdigest()
    node.start()
    assert blob.is_symlink(), "not linked, and not touched before it is copied"
    (ready,) = node.ensure("org/one")
    assert ready["bytes_fetched"] == 0
    assert not blob.is_symlink()
    assert blob.stat().st_ino != payload.stat().st_ino
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest
    node.assert_disk_truth()

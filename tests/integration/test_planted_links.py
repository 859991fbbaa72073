"""Symlinks that a stranger plants anywhere in hub/ are refused by name or replaced, never followed.

Whoever can write into hub/ must not lead the daemon, which may be root, out of it: a canary tree beside the cache
(names, contents, modes, link counts, times) is the same afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from modelcache.client import ModelCacheError, reference
from modelcache.v1 import cache_pb2

from tests.hub import Hub
from tests.hub.models import tiny_llama
from tests.node import Node
from tests.node.canary import Canary, assert_log_is_clean

MIB = 1 << 20
REPO = "models--org--tiny"


def move_out(place: Path, canary: Canary) -> None:
    """Whatever is at the place goes to the canary, a symlink to it stays: by stat alone all is as before."""
    target = canary.root / f"moved-{len(list(canary.root.iterdir()))}"
    shutil.move(place, target)
    place.symlink_to(target)
    canary.settle()


def unlike_any(number: int) -> dict[str, bytes]:
    """Nothing that another repository has: hard links to what was moved away would be no trespass."""
    return {"config.json": b'{"number": %d}' % number, "model.safetensors": bytes([number]) * 100_000}


DIRECTORIES = ["", "blobs", "snapshots", "refs", "trees"]


@pytest.mark.parametrize("restarted", [False, True], ids=["while it runs", "before it starts"])
def test_a_symlink_in_a_directorys_place_is_refused_by_name(
    hub: Hub, guarded: Node, canary: Canary, restarted: bool
) -> None:
    """Not followed by a hit, a growth, an eviction or a restart: none reads, writes, links or chmods behind it."""
    models = {f"org/in-{place or 'itself'}": (place, unlike_any(n)) for n, place in enumerate(DIRECTORIES)}
    commits = {repo_id: hub.create_repo(repo_id).commit(files) for repo_id, (_, files) in models.items()}
    planted = {}
    for repo_id, (place, _) in models.items():
        guarded.ensure(repo_id, "--profile", "full")
        planted[repo_id] = (guarded.hub_dir / f"models--{repo_id.replace('/', '--')}" / place).absolute()
    if restarted:
        guarded.stop()
    for place in planted.values():
        move_out(place, canary)
    if restarted:
        guarded.start()
    with guarded.client() as client, guarded.admin() as admin:
        for repo_id, place in planted.items():
            repo = hub.find_repo(repo_id)
            assert repo is not None
            repo.commit({**models[repo_id][1], "more.json": b"{}"})
            asked = [reference(repo_id, commits[repo_id], profile=profile) for profile in ("full", "vllm")]
            for model in (*asked, reference(repo_id)):
                with pytest.raises(ModelCacheError) as refused:
                    list(client.ensure(model, timeout_seconds=30))
                assert (refused.value.reason, refused.value.exit_status) == ("STORAGE_ERROR", 74), place
                assert f"{place} is a symlink" in refused.value.text
        guarded.release_all()
        for repo_id in models:
            with contextlib.suppress(ModelCacheError):  # what it says depends on what it could still find
                admin.evict([reference(repo_id)], dry_run=False)
        canary.assert_untouched()

        for repo_id, place in planted.items():
            place.unlink(missing_ok=True)  # an eviction may have removed the link itself
            *_, ready = client.ensure(reference(repo_id), timeout_seconds=30)
            assert isinstance(ready, cache_pb2.Ready)
            root = guarded.hub_dir / ready.models[0].path
            assert (root / "model.safetensors").read_bytes() == models[repo_id][1]["model.safetensors"]
    guarded.assert_disk_truth()


@pytest.mark.parametrize("restarted", [False, True], ids=["while it runs", "before it starts"])
def test_a_symlink_in_a_files_place_is_replaced_not_followed(
    hub: Hub, guarded: Node, canary: Canary, restarted: bool
) -> None:
    planted, models = {}, {}
    for number, place in enumerate(["refs/main", "snapshots/{commit}", "blobs/{blob}"]):
        repo_id, model = f"org/m{number}", tiny_llama(seed=number)
        repo = hub.create_repo(repo_id)
        commit = repo.commit(model)
        guarded.ensure(repo_id, "--profile", "full")
        blob = repo.files(commit)["model.safetensors"].etag
        planted[repo_id] = guarded.hub_dir / f"models--org--m{number}" / place.format(commit=commit, blob=blob)
        models[repo_id] = model
    if restarted:
        guarded.stop()
    for place in planted.values():
        move_out(place, canary)
    if restarted:
        guarded.start()
    for repo_id, model in models.items():
        (ready,) = guarded.ensure(repo_id, "--profile", "full")
        assert {name: (Path(ready["path"]) / name).read_bytes() for name in model} == model
        assert planted[repo_id].exists()
        assert not planted[repo_id].is_symlink()
    canary.assert_untouched()
    guarded.assert_disk_truth()


def test_a_listing_that_leads_elsewhere_is_reported_and_left_alone(hub: Hub, guarded: Node, canary: Canary) -> None:
    repo = hub.create_repo("org/tiny")
    commit = repo.commit(tiny_llama())
    guarded.ensure("org/tiny")
    planted = guarded.hub_dir / REPO / "trees" / f"{commit}.json"
    planted.parent.mkdir()
    planted.symlink_to(canary.root / "etc" / "deep" / "config.json")
    guarded.stop()
    guarded.start()
    assert guarded.log_lines("recovered")[-1]["reported"] == [str(planted)]
    guarded.ensure("org/tiny", "--profile", "full")
    assert planted.is_file()
    assert not planted.is_symlink()


def test_a_snapshots_file_that_leads_elsewhere_is_made_anew(hub: Hub, guarded: Node, canary: Canary) -> None:
    model = tiny_llama()
    commit = hub.create_repo("org/tiny").commit(model)
    guarded.ensure("org/tiny", "--profile", "full")
    root = guarded.snapshot("org/tiny", commit)
    (root / "config.json").unlink()
    (root / "config.json").symlink_to(canary.root / "etc" / "passwd")
    guarded.ensure("org/tiny", "--profile", "full")
    assert {name: (root / name).read_bytes() for name in model} == model
    assert os.readlink(root / "config.json").startswith("../../blobs/")


def test_a_snapshots_folder_that_leads_elsewhere_is_made_anew(hub: Hub, guarded: Node, canary: Canary) -> None:
    """All that is behind it is right: only the way there is not the daemon's."""
    model = {**tiny_llama(), "sub/extra.json": b"{}"}
    commit = hub.create_repo("org/tiny").commit(model)
    guarded.ensure("org/tiny", "--profile", "full")
    root = guarded.snapshot("org/tiny", commit)
    shutil.move(root / "sub", canary.root / "sub")
    (root / "sub").symlink_to(canary.root / "sub")
    canary.settle()
    guarded.ensure("org/tiny", "--profile", "full")
    assert {name: (root / name).read_bytes() for name in model} == model
    assert not (root / "sub").is_symlink()


@pytest.mark.parametrize("restarted", [False, True], ids=["while it runs", "before it starts"])
def test_a_symlink_among_nested_refs_is_refused_by_name(
    hub: Hub, guarded: Node, canary: Canary, restarted: bool
) -> None:
    guarded.stop()
    guarded.settings["hub"]["resolve_ttl"] = "1ms"
    guarded.start()
    repo = hub.create_repo("org/tiny")
    repo.move("feature/x", repo.commit(tiny_llama()))
    guarded.ensure("org/tiny", "--revision", "feature/x")
    if restarted:
        guarded.stop()
    planted = guarded.hub_dir / REPO / "refs" / "feature"
    move_out(planted, canary)
    if restarted:
        guarded.start()
        assert guarded.log_lines("recovered")[-1]["reported"] == [str(planted)]
    repo.move("feature/x", repo.commit(tiny_llama(seed=1)))
    done = guarded.run("ensure-model", "org/tiny", "--revision", "feature/x")
    assert (done.returncode, f"{planted} is a symlink" in done.stderr) == (74, True), done.stderr
    canary.assert_untouched()
    planted.unlink()
    guarded.ensure("org/tiny", "--revision", "feature/x")
    guarded.assert_disk_truth()


@pytest.mark.parametrize("place", ["blobs", "blobs/ab", "blobs/ab/payload"])
def test_a_shared_store_that_leads_elsewhere_is_left_alone(
    hub: Hub, make_node: Callable[..., Node], canary: Canary, place: str
) -> None:
    """A blob that goes through it (huggingface_hub 2.x with Xet) is fetched, not adopted: what it shows is right."""
    node, model = make_node(), tiny_llama()
    repo = hub.create_repo("org/tiny")
    etag = repo.files(repo.commit(model))["model.safetensors"].etag
    payload = node.hub_dir / "blobs" / "ab" / "payload"
    payload.parent.mkdir(parents=True)
    payload.write_bytes(model["model.safetensors"])
    payload.chmod(0o444)
    (node.hub_dir / REPO / "blobs").mkdir(parents=True)
    (node.hub_dir / REPO / "blobs" / etag).symlink_to("../../blobs/ab/payload")
    move_out(node.hub_dir / place, canary)
    node.start()
    (ready,) = node.ensure("org/tiny", "--profile", "full")
    assert ready["outcome"] == "downloaded"
    assert {name: (Path(ready["path"]) / name).read_bytes() for name in model} == model
    assert not (node.hub_dir / REPO / "blobs" / etag).is_symlink()
    canary.assert_untouched()
    node.assert_disk_truth()


def test_wrong_content_behind_a_planted_directory_is_not_quarantined(hub: Hub, guarded: Node, canary: Canary) -> None:
    """A file outside whose name is a digest and whose content is not would be moved away, were it followed."""
    repo = hub.create_repo("org/tiny")
    commit = repo.commit(tiny_llama())
    outside = canary.root / "blobs"
    outside.mkdir()
    for file in repo.files(commit).values():
        (outside / file.etag).write_bytes(b"precious")
    (guarded.hub_dir / REPO).mkdir()
    (guarded.hub_dir / REPO / "blobs").symlink_to(outside)
    canary.settle()
    done = guarded.run("ensure-model", "org/tiny")
    assert (done.returncode, "blobs is a symlink" in done.stderr) == (74, True), done.stderr


def test_a_planted_symlink_keeps_no_other_model_from_coming(hub: Hub, guarded: Node, canary: Canary) -> None:
    """Space for one model is made by evicting another, which cannot go: the next one does."""
    for number in range(4):
        files = {"config.json": b"%d" % number, "model.safetensors": bytes([number]) * 8 * MIB}
        hub.create_repo(f"org/m{number}").commit(files)
    guarded.stop()
    guarded.settings["cache"]["budget"] = "32MiB"
    guarded.start()
    for number in range(3):
        guarded.ensure(f"org/m{number}")
    guarded.release_all()
    move_out(guarded.hub_dir / "models--org--m0" / "snapshots", canary)
    guarded.ensure("org/m3")
    assert [name for name in ("org/m1", "org/m2", "org/m3") if guarded.visible(name)] == ["org/m2", "org/m3"]


def test_the_hub_directory_itself_must_be_real(make_node: Callable[..., Node], canary: Canary) -> None:
    node = make_node()
    node.cache_dir.mkdir(parents=True)
    node.hub_dir.symlink_to(canary.root)
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 74
    assert f"{node.hub_dir} is a symlink" in node.log_text()
    canary.assert_untouched()


@pytest.mark.parametrize("form", ["json", "console"])
def test_planted_names_reach_no_terminal(hub: Hub, make_node: Callable[..., Node], form: str) -> None:
    node = make_node(log={"format": form})
    evil = "evil\x1b[31m\nforged line\x9b"
    for place in (evil, REPO, f"{REPO}/blobs", f"{REPO}/refs", f"{REPO}/snapshots"):
        (node.hub_dir / place).mkdir(parents=True)
    for directory in ("blobs", "refs", "snapshots"):
        (node.hub_dir / REPO / directory / evil).write_text("x")
    repo = hub.create_repo("org/tiny")
    repo.commit(tiny_llama())
    repo.hostile_entries([evil])
    node.start()
    assert node.run("ensure-model", "org/tiny").returncode == 65
    repo.hostile_entries([])
    node.ensure("org/tiny")
    node.stop()
    assert_log_is_clean(node)
    assert "forged line" in node.log_text()
    assert not any(line.startswith("forged") for line in node.log_text().splitlines())

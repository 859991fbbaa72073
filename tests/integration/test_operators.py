"""What operators see and do with cachectl: history, one model's detail, reading again, garbage, eviction by rule."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modelcache.v1 import admin_pb2

from tests.hub import MIB, Hub, Synthetic
from tests.hub.models import tiny_llama
from tests.integration.test_scrub import LATER, Model, rot
from tests.node.daemon import Node, reference
from tests.node.library import fill
from tests.node.terminal import Terminal

SIZE = 8 * MIB


def publish(hub: Hub, *names: str, size: int = SIZE) -> None:
    for name in names:
        content = {"config.json": f'"{name}"'.encode(), "model.safetensors": Synthetic(size, hash(name) & 0xFFFF)}
        hub.create_repo(f"org/{name}").commit(content)


def events(node: Node, *arguments: str) -> list[dict[str, Any]]:
    """Newest first."""
    return node.ctl("events", *arguments)  # type: ignore[no-any-return]


def on_disk(node: Node) -> dict[Path, tuple[int, int, int]]:
    """All but the daemon's own books."""
    books = node.cache_dir / "modelcached"
    there = [path for path in node.cache_dir.glob("**/*") if books not in (path.parent, path)]
    return {path: (status.st_ino, status.st_size, status.st_mtime_ns) for path in there if (status := path.lstat())}


# History


def test_the_history_says_who_asked_what_was_fetched_evicted_and_refused(hub: Hub, node: Node) -> None:
    publish(hub, "one")
    (ready,) = node.ensure("org/one", "--holder", "vllm-7")
    name = f"org/one@{ready['commit']}"
    node.ensure("org/one")  # a hit, which leaves none
    refused = node.run("ensure-model", "org/none")
    assert refused.returncode == 66
    (line,) = [line for line in node.log_lines("ensured") if line["outcome"] == "error"]
    assert line["why"] in refused.stderr, "the log has what the client said"
    assert line["request_id"] in refused.stderr
    node.ctl("pin", "org/one")
    node.ctl("unpin", "org/one")
    for lease in node.ctl("leases"):
        node.ctl("release", lease["id"])
    node.ctl("evict", "org/one", "--yes")
    told = events(node)
    assert [event["kind"] for event in told] == [
        "evicted",
        "released",
        "released",
        "unpinned",
        "pinned",
        "refused",
        "asked",
        "fetched",
        "started",
    ]
    evicted, _, released, unpinned, pinned, refused, asked, fetched, started = told
    assert (evicted["model"], evicted["reason"]) == (name, "operator")
    assert evicted["bytes"] >= SIZE
    assert released["model"] == name
    assert "vllm-7" in released["detail"]
    assert pinned["model"] == unpinned["model"] == "org/one@main"
    assert (refused["model"], refused["reason"]) == ("org/none@main", "REPO_NOT_FOUND")
    assert "org/none" in refused["detail"]
    assert (asked["model"], asked["reason"], asked["holder"]) == ("org/one@main", "downloaded", "vllm-7")
    assert (fetched["model"], fetched["bytes"]) == (name, SIZE + len('"one"'))
    assert "0 models" in started["detail"]
    (line,) = [line for line in node.log_lines("ensured") if line["outcome"] == "downloaded"]
    assert line["request_id"] == asked["request_id"]
    assert [event["id"] for event in told] == sorted((event["id"] for event in told), reverse=True)


def test_the_history_can_be_narrowed_and_outlives_the_daemon(hub: Hub, node: Node) -> None:
    publish(hub, "one", "two")
    for name in ("one", "two"):
        node.ensure(f"org/{name}")
    node.kill()
    node.start()
    assert {event["model"].partition("@")[0] for event in events(node, "org/two")} == {"org/two"}
    assert [event["kind"] for event in events(node, "--kind", "fetched", "--kind", "started")] == [
        "started",
        "fetched",
        "fetched",
        "started",
    ]
    assert len(events(node, "--limit", "3")) == 3
    assert events(node, "--since", "1ms") == []
    assert len(events(node, "--since", "1h")) == len(events(node))


def test_every_page_of_the_history_is_told_once(hub: Hub, node: Node) -> None:
    publish(hub, "one", size=MIB)
    for _ in range(4):
        node.run("ensure-model", "org/none")
    with node.admin() as admin:
        pages = [event.id for event in admin.events(page_size=2)]
        assert pages == [event.id for event in admin.events()]
        assert len(pages) == 5
        kinds = {event.kind for event in admin.events("org/none", page_size=1)}
        assert kinds == {admin_pb2.EVENT_KIND_REFUSED}


# One model


def test_show_tells_files_digests_profiles_leases_pins_and_what_shares_them(hub: Hub, node: Node) -> None:
    shared = Synthetic(SIZE, 7)
    for name in ("one", "two"):
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": shared})
    (one,) = node.ensure("org/one", "--holder", "vllm-7")
    (two,) = node.ensure("org/two")
    node.ctl("pin", "org/one")
    told = node.ctl("show", "org/one")
    assert (told["repo_id"], told["commit"], told["revisions"]) == ("org/one", one["commit"], ["main"])
    config, weights = told["files"]
    assert (weights["path"], weights["size_bytes"]) == ("model.safetensors", SIZE)
    assert weights["digest"] == f"sha256:{shared.sha256()}"
    assert weights["shared_with"] == [f"org/two@{two['commit']}"]
    assert config["digest"].startswith("git-sha1:")
    assert config["shared_with"] == []
    assert all(file["cached"] and file["verified"] and file["verified_at"] for file in told["files"])
    (selection,) = told["selections"]
    assert (selection["profile"], selection["format"]) == ("vllm", "safetensors")
    assert [lease["holder"] for lease in told["leases"]] == ["vllm-7"]
    assert told["pins"] == [{"revision": "main", "owner": "operator"}]
    assert any("vllm-7" in reason for reason in told["kept_by"])
    assert [event["kind"] for event in told["events"]] == ["pinned", "asked", "fetched"]
    missing = node.run("cachectl", "show", "org/none")
    assert missing.returncode == 66
    assert "org/none@main is not in the cache; cachectl ls shows what is" in missing.stderr


def test_show_of_what_somebody_else_downloaded_says_so(hub: Hub, node: Node) -> None:
    model = tiny_llama()
    commit = hub.create_repo("org/theirs").commit(model)
    fill(hub, node, "org/theirs")
    node.wait_until(lambda: len(node.models()) == 1, 15, "their download")
    node.wait_until(lambda: len(node.ctl("show", "org/theirs")["files"]) == len(model), 15, "all of it")
    told = node.ctl("show", f"org/theirs@{commit}")
    assert told["state"] == "unverified"
    assert told["selections"] == []
    assert not any(file["verified"] or file["verified_at"] for file in told["files"])
    assert {file["path"] for file in told["files"]} == set(model)


def test_ls_filters_sorts_and_shows_a_tree(hub: Hub, node: Node) -> None:
    publish(hub, "small", size=MIB)
    publish(hub, "large")
    for name in ("large", "small"):
        node.ensure(f"org/{name}")
    node.release_all()
    node.ctl("pin", "org/small")

    def names(*arguments: str) -> list[str]:
        return [model["repo_id"] for model in node.ctl("ls", *arguments)]

    assert names("--sort", "size") == ["org/large", "org/small"]
    assert names("--sort", "used") == ["org/small", "org/large"]
    assert names("--sort", "unused") == ["org/large", "org/small"]
    assert names("--only", "pinned") == ["org/small"]
    assert names("--only", "idle") == ["org/large"]
    assert names("*/sm*") == ["org/small"]
    assert names("--only", "leased") == []
    tree = node.ctl("ls", "--tree", "*/large")
    assert [file["path"] for file in tree[0]["files"]] == ["config.json", "model.safetensors"]
    shown = node.run("cachectl", "ls", "--tree").stdout
    assert "org/large@main" in shown
    assert "model.safetensors  8.4 MB" in shown


# Reading again


@pytest.fixture
def calm(make_node: Callable[..., Node]) -> Node:
    """A node that does not scrub by itself."""
    return make_node(scrub=LATER).start()


def test_verify_reads_all_and_finds_nothing_wrong(hub: Hub, calm: Node) -> None:
    models = [Model(calm, hub, name, seed) for seed, name in enumerate(("one", "two"))]
    for model in models:
        model.ensure()
    hub.stop()
    told = calm.ctl("verify", "--all")
    assert (told["models"], told["files"], told["bad"]) == (2, 4, [])
    assert told["bytes"] > 2 * models[0].content.size
    assert calm.metric("modelcached_scrubbed_bytes_total") == told["bytes"]
    one = calm.ctl("verify", "org/one")
    assert (one["models"], one["files"]) == (1, 2)


def test_verify_finds_what_is_bad_and_changes_nothing_on_the_disk(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    rot(model.blob)
    before = on_disk(calm)
    done = calm.run("cachectl", "verify", "org/one", "--json")
    assert done.returncode == 65
    (bad,) = json.loads(done.stdout)["bad"]
    assert (bad["path"], bad["verdict"], bad["repaired"]) == ("model.safetensors", "bad", False)
    assert bad["digest"] == f"sha256:{model.content.sha256()}"
    assert on_disk(calm) == before
    assert calm.metric("modelcached_scrub_failures_total") == 1
    assert not calm.ctl("show", "org/one")["files"][1]["verified"]
    prose = calm.run("cachectl", "verify", "org/one")
    assert "served to nobody new" in prose.stdout
    assert "--repair" in prose.stderr
    model.ensure()  # heals it
    assert model.is_right
    assert calm.ctl("verify", "org/one")["bad"] == []


def test_verify_with_repair_fetches_only_what_is_bad_and_stays_in_sight(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    rot(model.blob)
    (model.node.snapshot("org/one", model.commit) / "config.json").resolve().unlink()
    hub.reset_counters()
    told = calm.ctl("verify", "org/one", "--repair")
    assert {(bad["path"], bad["verdict"], bad["repaired"]) for bad in told["bad"]} == {
        ("config.json", "missing", True),
        ("model.safetensors", "bad", True),
    }
    assert model.is_right
    assert model.fetched()["model.safetensors"] == model.content.size
    assert calm.ctl("verify", "org/one")["bad"] == []
    assert [event["kind"] for event in events(calm, "--kind", "damaged")] == ["damaged"]


def test_a_repair_that_cannot_be_made_says_why(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    rot(model.blob)
    calm.settings["transfer"] = {"retry_timeout": "1s"}
    hub.stop()
    done = calm.run("cachectl", "verify", "org/one", "--repair", "--json", timeout=170)
    assert done.returncode == 65
    (bad,) = json.loads(done.stdout)["bad"]
    assert bad["repaired"] is False
    assert bad["detail"]
    (kept,) = [item for item in calm.ctl("gc", "--dry-run")["items"] if item["kind"] == "quarantine"]
    assert kept["bytes"] == 0, "it is in use, and has its name in hub/ too: nothing is lost with this one"


def test_verify_reads_what_lies_in_the_librarys_shared_store(hub: Hub, calm: Node) -> None:
    model = tiny_llama()
    hub.create_repo("org/theirs").commit(model, xet=True)
    fill(hub, calm, "org/theirs", shared=True)
    calm.wait_until(lambda: len(calm.models()) == 1, 15, "their download")
    # At whatever moment: what the daemon has not found yet is on the disk all the same.
    told = calm.ctl("verify", "--all")
    assert (told["files"], told["bad"]) == (len(set(model.values())), [])
    (shared,) = {path.resolve() for path in calm.hub_dir.glob("models--org--theirs/snapshots/*/model.safetensors")}
    rot(shared)
    done = calm.run("cachectl", "verify", "--all", "--json")
    assert [(bad["path"], bad["verdict"]) for bad in json.loads(done.stdout)["bad"]] == [("model.safetensors", "bad")]
    rot(shared)  # the same bit again
    calm.wait_until(lambda: all(file["cached"] for file in calm.ctl("show", "org/theirs")["files"]), 15, "all of it")
    (ready,) = calm.ensure("org/theirs")
    assert ready["bytes_fetched"] == 0, "it is still known"


@pytest.mark.deep
def test_who_stops_a_reading_leaves_nothing_behind(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1, 512 * MIB)
    model.ensure("--timeout", "60s")
    tasks = calm.metric("modelcached_event_loop_tasks")
    running = calm.popen("cachectl", "verify", "--all")
    calm.wait_until(lambda: calm.metric("modelcached_event_loop_tasks") > tasks, 20, "the reading to begin")
    running.send_signal(signal.SIGINT)
    assert running.wait(10) == 130
    calm.wait_until(lambda: calm.metric("modelcached_event_loop_tasks") == tasks, 20, "the reading to end")
    assert calm.ctl("verify", "--all")["bad"] == []


# What is no model


def test_garbage_is_shown_and_removed_by_kind(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    rot(model.blob)
    calm.ctl("verify", "org/one", "--repair")  # its bad blob is in quarantine now
    there = calm.ctl("gc", "--dry-run")
    assert [(item["kind"], item["name"]) for item in there["items"]] == [("quarantine", model.content.sha256())]
    assert there["bytes_freed"] >= model.content.size
    assert calm.run("cachectl", "gc").returncode == 64  # nobody to ask
    assert calm.ctl("gc", "--kind", "partial", "--yes")["items"] == []
    before = calm.du()
    gone = calm.ctl("gc", "--yes")
    assert gone["removed"] is True
    assert before - calm.du() == gone["bytes_freed"] >= model.content.size
    assert calm.ctl("gc", "--dry-run")["items"] == []
    assert model.is_right
    calm.assert_disk_truth()


def test_what_has_just_come_into_the_trash_may_come_back_and_stays(node: Node) -> None:
    (node.cache_dir / "modelcached" / "trash" / "something").mkdir()
    (item,) = node.ctl("gc", "--dry-run")["items"]
    assert (item["kind"], item["name"], item["in_use"]) == ("trash", "something", True)
    assert node.ctl("gc", "--yes")["items"] == []
    with node.admin() as admin:  # cachectl does not even ask
        assert list(admin.garbage(remove=True).items) == []


def test_what_a_request_is_fetching_is_no_garbage_until_it_has_gone(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    hub.gate.close("model.safetensors")
    running = calm.popen("ensure-model", "org/one")
    assert hub.gate.wait_for_waiting(1)
    items = {item["name"]: item for item in calm.ctl("gc", "--dry-run")["items"]}
    assert items[model.content.sha256()]["in_use"] is True
    assert items[model.content.sha256()]["kind"] == "partial"
    assert calm.ctl("gc", "--yes")["items"] == []
    calm.ctl("cancel", "org/one")
    assert running.wait(30) == 75
    hub.gate.open()
    left = {item["kind"]: item for item in calm.ctl("gc", "--yes")["items"]}
    assert left["partial"]["name"] == model.content.sha256()
    assert os.listdir(calm.cache_dir / "modelcached" / "partial") == []
    if "orphan" in left:  # the small file may have been whole by then
        assert left["orphan"]["repo_id"] == "org/one"
    assert not (calm.hub_dir / "models--org--one").exists()
    calm.assert_disk_truth()


# By rule


def test_eviction_by_rule_takes_what_would_go_first_and_no_more(hub: Hub, small_disk: Node) -> None:
    node = small_disk  # on which nobody else makes or takes free space
    names = ["one", "two", "three", "four"]
    publish(hub, *names)
    for name in names:
        node.ensure(f"org/{name}")
    node.release_all()
    node.ctl("pin", "org/one")

    def planned(*arguments: str) -> list[str]:
        return [model["repo_id"] for model in node.ctl("evict", *arguments, "--dry-run")["models"]]

    assert planned("--all-unpinned") == ["org/two", "org/three", "org/four"]
    assert planned("--older-than", "1h") == []
    assert planned("--older-than", "1ms") == ["org/two", "org/three", "org/four"]
    free = node.ctl("status")["filesystem_free_bytes"]
    assert planned("--until-free", "1MB") == []
    beyond = node.run("cachectl", "--json", "evict", "--until-free", f"{free + 100 * SIZE}B", "--dry-run")
    assert beyond.returncode == 75
    told = json.loads(beyond.stdout)
    assert [model["repo_id"] for model in told["models"]] == ["org/two", "org/three", "org/four"]
    assert 96 * SIZE < told["bytes_short"] < 98 * SIZE
    said = node.run("cachectl", "evict", "--until-free", f"{free + 100 * SIZE}B", "--dry-run")
    assert "free cannot be had" in said.stdout
    nothing = node.run("cachectl", "evict", "--older-than", "1h", "--yes")
    assert (nothing.returncode, nothing.stdout) == (0, "")
    before = node.du()
    gone = node.ctl("evict", "--all-unpinned", "--yes")
    assert [model["repo_id"] for model in gone["models"]] == ["org/two", "org/three", "org/four"]
    assert abs(before - node.du() - gone["bytes_freed"]) < MIB // 4  # state.db grows by what it tells of it
    assert [model["repo_id"] for model in node.ctl("ls")] == ["org/one"]


def test_eviction_until_free_takes_one_where_one_is_enough(hub: Hub, small_disk: Node) -> None:
    node = small_disk
    names = ["one", "two", "three"]
    publish(hub, *names)
    for name in names:
        node.ensure(f"org/{name}")
    node.release_all()
    free = node.ctl("status")["filesystem_free_bytes"]
    gone = node.ctl("evict", "--until-free", f"{free + SIZE // 2}B", "--yes")
    assert [model["repo_id"] for model in gone["models"]] == ["org/one"]
    assert node.ctl("status")["filesystem_free_bytes"] >= free + SIZE // 2


def test_models_and_rules_exclude_each_other(node: Node) -> None:
    for wrong in (
        ["org/one", "--all-unpinned"],
        [],
        ["--all-unpinned", "--older-than", "1d"],
        ["--until-free", "200"],
        ["--older-than", "week"],
    ):
        done = node.run("cachectl", "evict", *wrong, "--yes")
        assert done.returncode == 64, wrong
        assert done.stderr.count("\n") == 1


# Settings, and live


def test_config_shows_what_is_in_force_and_what_was_set(node: Node) -> None:
    told = node.ctl("config", "--changed")
    assert told["config_file"] == str(node.config_file)
    assert told["settings"]["cache.dir"]["value"] == str(node.cache_dir)
    assert told["settings"]["cache.dir"]["reloadable"] is False
    whole = node.ctl("config")["settings"]
    assert whole["transfer.models"] == {"value": 4, "default": 4, "reloadable": True}
    assert "transfer.models" not in told["settings"]
    node.settings["transfer"] = {"models": 3}
    node.write_config()
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    node.wait_until(lambda: node.ctl("config")["settings"]["transfer.models"]["value"] == 3, 10, "a reload")


def test_top_shows_status_again_and_again(hub: Hub, node: Node) -> None:
    publish(hub, "one")
    running = node.popen("cachectl", "top", "--json", "--interval", "100ms")
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["models"] == 0
    node.ensure("org/one")
    deadline = time.monotonic() + 10
    while json.loads(running.stdout.readline())["models"] == 0:
        assert time.monotonic() < deadline
    running.send_signal(signal.SIGINT)
    assert running.wait(10) == 130
    plain = node.run("cachectl", "top", "--count", "1")
    assert plain.returncode == 0
    assert "cache" in plain.stdout
    assert "\x1b" not in plain.stdout


def test_top_on_a_terminal_waits_for_a_restart(hub: Hub, node: Node) -> None:
    with Terminal(node, "top", "--interval", "100ms") as screen:
        screen.until("models    0")
        node.terminate()
        screen.until("no daemon answers, for ")
        node.start()
        publish(hub, "one")
        node.ensure("org/one")
        screen.until("models    1")
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(10) == 130


def test_top_elsewhere_shows_each_look_and_ends_with_the_daemon(node: Node) -> None:
    running = node.popen("cachectl", "top", "--interval", "100ms")
    assert running.stdout is not None
    looks = 0
    while looks < 3:
        looks += running.stdout.readline().startswith("cache ")
    node.kill()
    assert running.wait(10) == 69


def test_a_cache_over_its_budget_says_so_until_it_is_not(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(cache={"budget": "100MB"}).start()
    publish(hub, "one", "two")
    for name in ("one", "two"):
        node.ensure(f"org/{name}")
        node.ctl("pin", f"org/{name}")
    node.settings["cache"]["budget"] = "10MB"
    node.write_config()
    node.wait_until(lambda: any("cache.budget is 10.0 MB" in why for why in node.status().degraded), 15, "degraded")
    assert "room      none" in node.run("cachectl", "status").stdout
    node.settings["cache"]["budget"] = "100MB"
    node.write_config()
    node.wait_until(lambda: not node.status().degraded, 15, "all well")


def test_a_refused_eviction_names_the_commands_that_make_it_possible(hub: Hub, node: Node) -> None:
    publish(hub, "one")
    node.ensure("org/one")
    node.ctl("pin", "org/one")
    done = node.run("cachectl", "evict", "org/one", "--yes")
    assert done.returncode == 75
    for command in ("cachectl release --model org/one", "cachectl unpin org/one@main"):
        assert command in done.stderr
        assert node.run(*command.split()).returncode == 0
    assert node.run("cachectl", "evict", "org/one", "--yes").returncode == 0


def test_what_names_no_kind_of_ours_is_refused(node: Node) -> None:
    with node.admin() as admin:
        stub = admin._stub
        for call, request in (
            (stub.ListEvents, admin_pb2.ListEventsRequest(kinds=[99])),
            (stub.ListEvents, admin_pb2.ListEventsRequest(page_token="x")),
            (stub.ListEvents, admin_pb2.ListEventsRequest(page_token="9" * 20)),
            (stub.ListEvents, admin_pb2.ListEventsRequest(page_token="\u00b2")),
            (stub.CollectGarbage, admin_pb2.CollectGarbageRequest(kinds=[99])),
            (stub.EvictModels, admin_pb2.EvictModelsRequest(models=[reference("a/b")], rule=admin_pb2.EvictionRule())),
        ):
            with pytest.raises(Exception, match=r"INVALID_REQUEST|INVALID_ARGUMENT"):
                call(request)


# Out of the cache


def test_export_makes_a_plain_folder_that_is_what_upstream_has(hub: Hub, node: Node, tmp_path: Path) -> None:
    model = tiny_llama()
    hub.create_repo("org/model").commit({**model, "deep/er/notes.md": b"notes"})
    node.ensure("org/model", "--profile", "full")
    node.release_all()
    hub.stop()
    target = tmp_path / "there" / "model"
    target.parent.mkdir()
    told = node.ctl("export", "org/model", str(target))
    assert (told["path"], told["files"]) == (str(target), len(model) + 1)
    for path, content in {**model, "deep/er/notes.md": b"notes"}.items():
        file = target / path
        assert file.read_bytes() == content
        assert not file.is_symlink()
        assert file.stat().st_nlink == 1
    assert node.ctl("leases") == []
    again = node.run("cachectl", "export", "org/model", str(target))
    assert again.returncode == 64
    assert "is there already" in again.stderr


def test_an_export_of_what_went_bad_is_refused_by_file_and_leaves_nothing(hub: Hub, calm: Node, tmp_path: Path) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    calm.release_all()
    rot(model.blob)
    done = calm.run("cachectl", "export", "org/one", str(tmp_path / "model"))
    assert done.returncode == 65
    assert "model.safetensors is not what its digest says" in done.stderr
    assert "cachectl verify --repair" in done.stderr
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".model.part").exists()
    assert calm.ctl("leases") == []


@pytest.mark.deep
def test_an_export_that_is_broken_off_leaves_nothing(hub: Hub, calm: Node, tmp_path: Path) -> None:
    model = Model(calm, hub, "one", 1, 1024 * MIB)
    model.ensure("--timeout", "60s")
    calm.release_all()
    running = calm.popen("cachectl", "export", "org/one", str(tmp_path / "model"))
    calm.wait_until((tmp_path / ".model.part" / "model.safetensors").exists, 20, "it to begin")
    assert [lease["holder"] for lease in calm.ctl("leases")] == ["cachectl export"]
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 130
    assert not (tmp_path / ".model.part").exists()
    assert not (tmp_path / "model").exists()
    assert calm.ctl("leases") == []


def test_a_target_that_takes_nothing_is_named(hub: Hub, calm: Node) -> None:
    Model(calm, hub, "one", 1).ensure()
    done = calm.run("cachectl", "export", "org/one", "/proc/model")
    assert done.returncode == 74
    assert "cannot copy to /proc/model" in done.stderr


# On a terminal


def on_terminal(node: Node, *arguments: str, columns: int = 80) -> str:
    """What cachectl shows there, escapes and all; it must succeed."""
    with Terminal(node, *arguments, columns=columns) as screen:
        shown = screen.to_the_end()
        assert screen.process.wait(30) == 0, shown
    return shown


def test_pull_shows_a_bar_for_each_file_and_leaves_none(hub: Hub, make_node: Callable[..., Node]) -> None:
    shards = {f"model-0000{number}-of-00003.safetensors": Synthetic(6 * MIB, number) for number in (1, 2, 3)}
    index = {"weight_map": {f"layer.{number}": path for number, path in enumerate(shards)}}
    content = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    hub.create_repo("org/sharded").commit(content)
    node = make_node(transfer={"rate_limit": "6MB"}).start()
    shown = on_terminal(node, "pull", "org/sharded")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", shown)]
    for path in shards:
        assert any(re.search(rf"  {re.escape(path)} [━╸╺]+ *6\.3 MB", line) for line in lines), path
    assert max(len(line) for line in lines if "━" in line) <= 80
    end = shown[shown.rindex("downloaded") :]
    assert "━" not in end, "the bars are gone at the end"

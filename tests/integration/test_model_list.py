"""The model list: what it names is fetched behind all requests, pinned, kept current; a bad list harms nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from modelcache.cachectl.rows import listed_state_word
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2, common_pb2
from modelcached.config import load
from modelcached.daemon import Daemon
from modelcached.store.disk import Disk

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node, reference

SIZE = 8 * MIB
LARGE = 36 * MIB
"""More than what passes the line for downloading."""
FOR_ITSELF = 8 * MIB
"""What a budget needs beside models: 4 MiB set aside, a ballast of 1 MiB, directories; still less than a model."""
SECONDS = 30
PATIENT = {"stall_timeout": "60s", "retry_timeout": "120s"}
"""For bodies that the Hub's gate holds."""
QUICK = {"resolve_ttl": "1s"}
"""Each model of the list is looked at again after two seconds, the least."""


def budget(models: int) -> dict[str, str]:
    return {"budget": f"{models * SIZE + FOR_ITSELF - MIB}B"}


def publish(hub: Hub, *names: str, size: int = SIZE) -> None:
    """Models with weights of their own, in a file with their own name, so that a gate can hold each alone."""
    for name in names:
        repo = hub.find_repo(f"org/{name}") or hub.create_repo(f"org/{name}")
        commit_number = len(repo._state.commits)
        seed = int.from_bytes(hashlib.sha256(f"{name} {commit_number}".encode()).digest()[:4], "big")
        files = {"config.json": f'"{name} {commit_number}"'.encode(), f"{name}.safetensors": Synthetic(size, seed)}
        repo.commit(files)


def now_at(hub: Hub, name: str) -> str:
    repo = hub.find_repo(f"org/{name}")
    assert repo is not None
    return repo.branches["main"]


class Listing:
    """The model list of a node, as a test writes it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.file = node.root / "list" / "models.yaml"
        self.file.parent.mkdir()
        node.settings["models"] = {"file": str(self.file)}

    def says(self, *entries: str | dict[str, Any]) -> Listing:
        """In the way of ``kubectl``: beside it, and then in its place."""
        models = [{"repo": f"org/{entry}"} if isinstance(entry, str) else entry for entry in entries]
        self.is_text(yaml.safe_dump({"models": models}))
        return self

    def is_text(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def standing(self) -> dict[str, str]:
        listed = self.node.status().model_list
        return {entry.repo_id.removeprefix("org/"): listed_state_word(entry.state) for entry in listed}

    def detail(self, name: str) -> str:
        (detail,) = [entry.detail for entry in self.node.status().model_list if entry.repo_id == f"org/{name}"]
        return str(detail)

    def until(self, **standing: str) -> None:
        """Exactly those models, standing so."""
        self.node.wait_until(lambda: self.standing() == standing, SECONDS, f"{standing}, not {self.standing()}")


@pytest.fixture
def listing(make_node: Callable[..., Node]) -> Listing:
    """Of a node that is not started."""
    return Listing(make_node(hub=QUICK, transfer={"models": 1, **PATIENT}))


def models(node: Node) -> dict[str, common_pb2.Model]:
    """By "name@commit"."""
    with node.client() as client:
        return {f"{model.repo_id.removeprefix('org/')}@{model.commit}": model for model in client.list_models()}


def pinned(node: Node) -> set[str]:
    return {name.partition("@")[0] for name, model in models(node).items() if model.pinned}


def cached(node: Node) -> set[str]:
    return {name.partition("@")[0] for name in models(node)}


def is_pinned(node: Node, name: str, commit: str) -> bool:
    model = models(node).get(f"{name}@{commit}")
    return model is not None and model.pinned


def ensure(node: Node, name: str, revision: str = "") -> cache_pb2.Ready:
    with node.client() as client:
        *_, last = client.ensure(reference(f"org/{name}", revision))
    assert isinstance(last, cache_pb2.Ready)
    return last


def bodies(hub: Hub) -> list[str]:
    """Whose weights were fetched, in order, each time once."""
    repos = [r.repo.removeprefix("org/") for r in hub.requests() if r.kind == "cdn" and r.is_content]
    return [repo for before, repo in zip([None, *repos], repos, strict=False) if repo != before]


def is_watched(node: Node, directory: Path) -> bool:
    """The kernel tells the daemon of changes there (proc(5), fdinfo of inotify)."""
    watches: list[str] = []
    for descriptor in Path(f"/proc/{node.ps.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is closed by now
            watches += descriptor.read_text().splitlines()
    return any(f" ino:{directory.stat().st_ino:x} " in watch for watch in watches if watch.startswith("inotify "))


# What it does


def test_what_is_listed_is_fetched_and_pinned_without_a_lease_or_a_use(hub: Hub, listing: Listing) -> None:
    publish(hub, "one", "two")
    other = hub.create_repo("org/other").commit({"config.json": b"{}", "notes.txt": b"x"}, branch="dev")
    node = listing.node
    listing.says("one", {"repo": "org/other", "revision": other, "include": ["*.json"]})
    node.start()
    listing.until(one="held", other="held")
    rows = {row["repo_id"]: row for row in node.ctl("ls")}
    for row in rows.values():
        assert (row["pinned"], row["leases"], row["last_used"]) == (True, [], None)
    assert rows["org/other"]["profiles"] == ["include=*.json"]
    assert (node.snapshot("org/one", now_at(hub, "one")) / "one.safetensors").stat().st_size == SIZE
    assert [node.metric("modelcached_model_list_entries", state=s) for s in ("held", "failing")] == [2, 0]
    assert node.metric("modelcached_requests_total") == 0, "nobody asked"
    assert list(node.status().degraded) == []
    assert "list      2 held\n" in node.run("cachectl", "status").stdout
    done = node.run("cachectl", "evict", "org/one", "--yes")
    assert done.returncode == 75
    assert "pinned by org/one@main of the model list" in done.stderr
    hub.reset_counters()
    assert ensure(node, "one").models[0].outcome == common_pb2.OUTCOME_HIT
    assert hub.request_count(kind="cdn") == 0
    node.assert_disk_truth()


def test_a_line_that_is_gone_takes_away_the_pin_of_the_list_alone(hub: Hub, listing: Listing) -> None:
    publish(hub, "gone", "both", "stays")
    node = listing.node
    listing.says("gone", "both", "stays")
    node.start()
    listing.until(gone="held", both="held", stays="held")
    node.ctl("pin", "org/both")
    listing.says("stays")
    listing.until(stays="held")
    node.wait_until(lambda: pinned(node) == {"both", "stays"}, SECONDS, "the list's own pins went")
    assert cached(node) == {"gone", "both", "stays"}, "unpinned, not removed"
    node.kill()
    node.start()
    listing.until(stays="held")
    assert pinned(node) == {"both", "stays"}
    node.ctl("evict", "org/gone", "--yes")
    listing.says()
    node.wait_until(lambda: pinned(node) == {"both"}, SECONDS, "an empty list unpins all")
    assert listing.standing() == {}


def test_an_operator_takes_away_an_operators_pin_and_is_told_of_the_lists(hub: Hub, listing: Listing) -> None:
    publish(hub, "one")
    node = listing.node
    listing.says("one")
    node.start()
    listing.until(one="held")
    node.ctl("pin", "org/one")
    assert node.run("cachectl", "unpin", "org/one").stderr == "org/one is still pinned by the model list\n"
    done = node.run("cachectl", "unpin", "org/one")
    assert (done.returncode, done.stderr) == (
        66,
        "cachectl: org/one@main is pinned by the model list, by nobody else; remove its line there (models.file)\n",
    )
    assert pinned(node) == {"one"}


def test_a_branch_that_moves_is_followed_and_the_old_commit_stays_until_the_new_one_is_whole(
    hub: Hub, listing: Listing
) -> None:
    publish(hub, "one")
    old = now_at(hub, "one")
    node = listing.node
    listing.says("one")
    node.start()
    listing.until(one="held")
    hub.gate.close("one.safetensors")
    publish(hub, "one")
    assert hub.gate.wait_for_waiting(1)
    listing.until(one="fetching")
    assert is_pinned(node, "one", old), "it is what the branch means on this node"
    hub.gate.open()
    new = now_at(hub, "one")
    node.wait_until(lambda: is_pinned(node, "one", new), SECONDS, "the new one is held")
    assert f"one@{old}" in models(node)
    assert not is_pinned(node, "one", old)
    listing.until(one="held")
    node.ctl("evict", f"org/one@{old}", "--yes")
    assert node.visible("org/one") == [new]


def test_a_swapped_symlink_is_another_list(hub: Hub, make_node: Callable[..., Node]) -> None:
    """As the kubelet replaces a ConfigMap: ..data is a link to a directory, and is swapped for another."""
    publish(hub, "one", "two", size=MIB)
    node = make_node()
    volume = node.root / "config-map"
    for name, model in (("..1", "one"), ("..2", "two")):
        (volume / name).mkdir(parents=True)
        (volume / name / "models.toml").write_text(f'[[models]]\nrepo = "org/{model}"\n')
    (volume / "..data").symlink_to("..1")
    (volume / "models.toml").symlink_to("..data/models.toml")
    node.settings["models"] = {"file": str(volume / "models.toml")}
    node.start()
    node.wait_until(lambda: pinned(node) == {"one"}, SECONDS, "the first list")
    node.wait_until(lambda: is_watched(node, volume), SECONDS, "it is watched")
    (volume / "..data_tmp").symlink_to("..2")
    (volume / "..data_tmp").rename(volume / "..data")
    node.wait_until(lambda: pinned(node) == {"two"}, SECONDS, "the second list")


def test_a_reload_names_another_list_and_none(hub: Hub, listing: Listing) -> None:
    publish(hub, "one", "two", size=MIB)
    node = listing.node
    listing.says("one")
    node.start()
    listing.until(one="held")
    listing.file = node.root / "other.yaml"
    listing.says("two")
    node.settings["models"]["file"] = str(listing.file)
    node.write_config()
    node.wait_until(lambda: pinned(node) == {"two"}, SECONDS, "the other list")
    node.wait_until(lambda: is_watched(node, listing.file.parent), SECONDS, "it is watched")
    assert not is_watched(node, node.root / "list")
    listing.says("one", "two")
    listing.until(one="held", two="held")
    node.settings["models"]["file"] = ""
    node.write_config()
    node.wait_until(lambda: pinned(node) == set(), SECONDS, "no list pins nothing")
    assert cached(node) == {"one", "two"}


# What is wrong with it


@pytest.mark.parametrize("text", ["models:\n - {repo: org/one, profil: x}\n", "", "models: [{repo: org/one", None])
def test_a_list_that_cannot_be_used_changes_nothing_and_is_reported(
    hub: Hub, listing: Listing, text: str | None
) -> None:
    publish(hub, "one", "two", size=MIB)
    node = listing.node
    listing.says("one", "two")
    node.start()
    listing.until(one="held", two="held")
    if text is None:
        listing.file.unlink()
    else:
        listing.is_text(text)
    node.wait_until(lambda: node.status().degraded, SECONDS, "status says so")
    (told,) = node.status().degraded
    assert told.startswith(f"model list: {listing.file}: ")
    assert told.endswith("; the last good one stays in force")
    (line,) = node.log_lines("model list refused, what it said before stays")
    assert line["why"] in told
    listing.until(one="held", two="held")
    assert pinned(node) == {"one", "two"}
    publish(hub, "one", size=MIB)  # and it is in force: a branch that moves is followed
    new = now_at(hub, "one")
    node.wait_until(lambda: is_pinned(node, "one", new), SECONDS, "kept current")

    node.kill()
    node.start()
    node.wait_until(lambda: node.status().degraded, SECONDS, "the next start says so too")
    assert node.status().degraded[0].endswith("; its last pins stay")
    assert pinned(node) == {"one", "two"}
    listing.says("two")
    node.wait_until(lambda: pinned(node) == {"two"}, SECONDS, "a good one is taken")
    assert list(node.status().degraded) == []


def test_a_model_that_cannot_be_had_says_why_and_keeps_no_other(hub: Hub, listing: Listing) -> None:
    publish(hub, "one")
    node = listing.node
    listing.says({"repo": "org/none", "priority": 7}, "one")
    node.start()
    listing.until(none="failing", one="held")
    assert "org/none does not exist on" in listing.detail("none")
    (told,) = node.status().degraded
    assert told.startswith("1 of the model list's models fail: org/none@main (vllm): org/none does not exist")
    assert node.metric("modelcached_model_list_entries", state="failing") == 1
    shown = node.run("cachectl", "status").stdout
    assert "list      1 failing, 1 held\n          org/none@main (vllm) failing: org/none does not exist on" in shown
    publish(hub, "none", size=MIB)
    listing.until(none="held", one="held")
    assert list(node.status().degraded) == []


def test_a_list_that_is_not_there_yet_is_taken_when_it_is(hub: Hub, listing: Listing) -> None:
    """Nor its directory, which cannot be watched then."""
    publish(hub, "one", size=MIB)
    listing.says("one")
    directory = listing.file.parent
    directory.rename(directory.with_name("later"))
    node = listing.node.start()
    node.wait_until(lambda: node.status().degraded, SECONDS, "it is not there")
    assert node.log_lines("a file is not watched")
    directory.with_name("later").rename(directory)
    listing.until(one="held")
    assert list(node.status().degraded) == []


# Its place


def test_the_highest_priority_comes_first(hub: Hub, listing: Listing) -> None:
    publish(hub, "last", "first", "second", "third")
    low, high = {"repo": "org/last", "priority": -1}, {"repo": "org/first", "priority": 1}
    listing.says(low, "second", high, "third").node.start()
    listing.until(first="held", second="held", third="held", last="held")
    assert list(listing.standing()) == ["first", "second", "third", "last"]
    assert bodies(hub) == ["first", "second", "third", "last"]


def test_a_new_line_of_higher_priority_goes_before_what_is_being_fetched(hub: Hub, listing: Listing) -> None:
    publish(hub, "slow", "quick")
    hub.gate.close("slow.safetensors")
    listing.says("slow").node.start()
    assert hub.gate.wait_for_waiting(1)
    listing.says("slow", {"repo": "org/quick", "priority": 1})
    listing.node.wait_until(lambda: listing.standing().get("quick") == "held", SECONDS, "quick is not behind it")
    hub.gate.open()
    listing.until(slow="held", quick="held")


def test_a_line_that_is_gone_is_fetched_no_further_unless_a_pod_asked(hub: Hub, listing: Listing) -> None:
    publish(hub, "dropped", "shared", size=LARGE)
    node = listing.node
    hub.gate.close("*.safetensors")
    listing.says("dropped").node.start()
    assert hub.gate.wait_for_waiting(1)
    listing.says("shared")
    node.wait_until(lambda: [t.repo_id for t in node.status().transfers] == ["org/shared"], SECONDS, "it ended")
    pod = node.popen("ensure-model", "org/shared")
    node.wait_until(lambda: [t.waiters for t in node.status().transfers] == [1], SECONDS, "a pod waits for it")
    listing.says()
    node.wait_until(lambda: listing.standing() == {}, SECONDS, "the line is gone")
    hub.gate.open()
    assert pod.wait(SECONDS) == 0
    pod.communicate()
    assert pinned(node) == set()
    assert cached(node) == {"shared"}


def test_a_pod_goes_before_it(hub: Hub, listing: Listing) -> None:
    """One turn: what the list fetches stands still while a pod waits, and goes on then."""
    publish(hub, "listed", "asked", size=LARGE)
    node = listing.node
    hub.gate.close("*.safetensors")
    listing.says("listed").node.start()
    assert hub.gate.wait_for_waiting(1)
    pod = node.popen("ensure-model", "org/asked")
    node.wait_until(lambda: listing.standing() == {"listed": "waiting"}, SECONDS, "it steps aside")
    assert listing.detail("listed") == "1 model comes first, transfer.models is 1"
    (background,) = [t for t in node.status().transfers if t.repo_id == "org/listed"]
    assert (background.background, background.waiters) == (True, 0)
    hub.gate.open()
    assert pod.wait(SECONDS) == 0
    pod.communicate()
    listing.until(listed="held")
    assert hub.body_bytes("org/listed", "listed.safetensors") == LARGE


def test_it_waits_in_line_behind_pods(hub: Hub, listing: Listing) -> None:
    publish(hub, "listed", "first", "second", size=LARGE)
    node = listing.node.start()
    hub.gate.close("*.safetensors")
    first = node.popen("ensure-model", "org/first")
    assert hub.gate.wait_for_waiting(1)
    listing.says("listed")
    listing.until(listed="waiting")
    second = node.popen("ensure-model", "org/second")
    node.wait_until(lambda: len(node.status().transfers) == 3, SECONDS, "all three are under way")
    node.wait_until(lambda: listing.detail("listed").startswith("2 models come first"), SECONDS, "behind both")
    hub.gate.open()
    for pod in (first, second):
        assert pod.wait(SECONDS) == 0
        pod.communicate()
    listing.until(listed="held")
    assert bodies(hub)[-1] == "listed"


def test_a_pod_that_asks_for_the_same_makes_it_urgent_and_bytes_come_once(hub: Hub, listing: Listing) -> None:
    publish(hub, "listed", "first", size=LARGE)
    node = listing.node.start()
    hub.gate.close("*.safetensors")
    first = node.popen("ensure-model", "org/first")
    assert hub.gate.wait_for_waiting(1)
    listing.says("listed")
    listing.until(listed="waiting")
    pod = node.popen("ensure-model", "org/listed")
    node.wait_until(
        lambda: [t.waiters for t in node.status().transfers if t.repo_id == "org/listed"] == [1], SECONDS, "it joined"
    )
    pod.kill()  # who waits in line and goes takes it along, but not from the list
    pod.communicate()
    node.wait_until(
        lambda: [t.waiters for t in node.status().transfers if t.repo_id == "org/listed"] == [0], SECONDS, "it went"
    )
    hub.gate.open()
    assert first.wait(SECONDS) == 0
    first.communicate()
    listing.until(listed="held")
    assert hub.body_bytes("org/listed", "listed.safetensors") == LARGE


def test_what_an_operator_cancels_is_left_alone_for_a_while(hub: Hub, listing: Listing) -> None:
    publish(hub, "one", "two")
    hub.gate.close("one.safetensors")
    listing.says("one", "two").node.start()
    assert hub.gate.wait_for_waiting(1)
    assert listing.node.ctl("cancel", "org/one") == {"cancelled": 1}
    listing.until(one="failing", two="held")
    assert "was cancelled by an operator" in listing.detail("one")
    (line,) = listing.node.log_lines("model of the list is not held")
    assert line["again_seconds"] == 300
    hub.gate.open()


# Space


def test_it_evicts_nothing_that_a_pod_asked_for(hub: Hub, make_node: Callable[..., Node]) -> None:
    listing = Listing(make_node(cache=budget(2), hub=QUICK))
    publish(hub, "used", "also", "listed")
    node = listing.says().node.start()
    for name in ("used", "also"):
        ensure(node, name)
    node.release_all()
    listing.says("listed")
    listing.until(listed="failing")
    assert listing.detail("listed").startswith("does not fit: org/listed@")
    assert "what pods have asked for is not evicted for the model list" in listing.detail("listed")
    (told,) = node.status().degraded
    assert "does not fit" in told
    assert cached(node) == {"used", "also"}
    assert hub.request_count(repo="org/listed", kind="cdn") == 0
    ensure(node, "listed")  # a pod may have what the list may not
    assert cached(node) == {"also", "listed"}
    listing.until(listed="held")
    assert pinned(node) == {"listed"}
    assert list(node.status().degraded) == []


def test_it_evicts_what_nobody_asked_for_and_what_was_superseded(hub: Hub, make_node: Callable[..., Node]) -> None:
    listing = Listing(make_node(cache=budget(2), hub=QUICK))
    publish(hub, "moving", "first", "second", "third")
    node = listing.says("first").node.start()
    listing.until(first="held")
    listing.says("second")
    listing.until(second="held")
    listing.says("third")
    listing.until(third="held")
    assert len(cached(node)) == 2, "what the list brought, and names no more, made room"
    listing.says()
    node.wait_until(lambda: pinned(node) == set(), SECONDS, "unpinned")
    ensure(node, "moving")
    publish(hub, "moving")
    node.wait_until(lambda: ensure(node, "moving").models[0].commit == now_at(hub, "moving"), SECONDS, "it moved")
    node.release_all()
    assert len(node.visible("org/moving")) == 2
    listing.says("first")
    listing.until(first="held")
    assert node.visible("org/moving") == [now_at(hub, "moving")], "the commit that the branch has left went"


def test_it_does_not_make_the_watermarks_evict_for_it(hub: Hub, make_node: Callable[..., Node]) -> None:
    """Room for both below the budget, but not below the mark from which pods' models would go."""
    listing = Listing(make_node(cache={**budget(2), "high_watermark": "70%", "low_watermark": "10%"}, hub=QUICK))
    publish(hub, "used", "listed")
    node = listing.says().node.start()
    ensure(node, "used")
    node.release_all()
    listing.says("listed")
    listing.until(listed="failing")
    turns = node.metric("modelcached_upkeep_runs_total", loop="watermarks")
    node.wait_until(lambda: node.metric("modelcached_upkeep_runs_total", loop="watermarks") > turns, SECONDS, "a turn")
    assert cached(node) == {"used"}


async def test_a_pod_that_comes_while_the_list_is_being_refused_is_not_refused_with_it(
    hub: Hub, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It joins what is under way, and may have what a pod may have."""
    listing = Listing(make_node(cache=budget(1), hub=QUICK))
    publish(hub, "used", "wanted")
    listing.says()
    listing.node.write_config()
    daemon = Daemon(load(listing.node.config_file), Disk())
    await daemon.start()
    looking, go_on = threading.Event(), threading.Event()
    try:
        await asyncio.to_thread(ensure, listing.node, "used")
        await asyncio.to_thread(listing.node.release_all)
        listed = daemon.core.partials.listed

        def slowly() -> Any:
            looking.set()
            go_on.wait(SECONDS)
            return listed()

        monkeypatch.setattr(daemon.core.partials, "listed", slowly)
        listing.says("wanted")
        daemon.prefetcher.soon.set()
        assert await asyncio.to_thread(looking.wait, SECONDS)
        pod = asyncio.create_task(asyncio.to_thread(ensure, listing.node, "wanted"))
        assemblies = daemon.cache._assemblies._running
        await asyncio.to_thread(
            listing.node.wait_until,
            lambda: any(a.waiters for a in list(assemblies.values())),
            SECONDS,
            "the pod joined",
        )
        go_on.set()
        assert (await pod).models[0].outcome in (common_pb2.OUTCOME_DOWNLOADED, common_pb2.OUTCOME_JOINED)
        await asyncio.to_thread(listing.until, wanted="held")
        assert not daemon.core.index.repos.keys() & {"org/used"}
    finally:
        go_on.set()
        await daemon.stop()


# The Hub, and restarts


def test_a_hub_that_is_down_costs_nothing_that_is_held_and_is_asked_again(hub: Hub, listing: Listing) -> None:
    publish(hub, "one", "two")
    node = listing.says("one").node.start()
    listing.until(one="held")
    hub.refuse(True)
    listing.says("one", "two")
    listing.until(one="held", two="failing")
    assert "cannot be reached" in listing.detail("two")
    looks = len(node.log_lines("serving the cached commit"))
    node.wait_until(lambda: len(node.log_lines("serving the cached commit")) > looks, SECONDS, "it asks about one too")
    listing.until(one="held", two="failing")
    assert pinned(node) == {"one"}
    hub.refuse(False)
    listing.until(one="held", two="held")
    assert list(node.status().degraded) == []


@pytest.mark.parametrize("end", [Node.terminate, Node.kill])
def test_a_restart_keeps_what_is_held_and_goes_on_with_what_is_not(
    hub: Hub, listing: Listing, end: Callable[[Node], Any]
) -> None:
    publish(hub, "one", "two", size=LARGE)
    hub.rate = 12 * MIB
    node = listing.says("one", "two").node.start()
    assert hub.wait_until(lambda: hub.body_bytes("org/two", "two.safetensors") > LARGE // 2)
    end(node)
    hub.rate = None
    assert pinned(node.start()) == {"one"}, "before anything was looked at"
    listing.until(one="held", two="held")
    assert hub.body_bytes("org/one", "one.safetensors") == LARGE
    assert hub.body_bytes("org/two", "two.safetensors") < LARGE + LARGE // 2, "gone on, not begun anew"


def test_files_that_somebody_removed_come_again(hub: Hub, listing: Listing) -> None:
    publish(hub, "one")
    node = listing.says("one").node.start()
    listing.until(one="held")
    weights: Path = node.snapshot("org/one", now_at(hub, "one")) / "one.safetensors"
    weights.resolve().unlink()
    node.wait_until(weights.exists, SECONDS, "it is whole again")
    listing.until(one="held")


def test_a_request_for_a_listed_model_is_refused_as_any_other(hub: Hub, listing: Listing) -> None:
    """The list is no way around the policy."""
    publish(hub, "bad")
    listing.node.settings["policy"] = {"deny": ["org/bad"]}
    node = listing.says("bad").node.start()
    listing.until(bad="failing")
    assert "policy" in listing.detail("bad")
    with pytest.raises(ModelCacheError) as caught:
        ensure(node, "bad")
    assert caught.value.reason == "POLICY"
    assert cached(node) == set()

"""cachectl plan says what a request would do, by the reckoning that would do it; and does nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node

SIZE = 8 * MIB


@pytest.fixture
def node(hub: Hub, make_node: Callable[..., Node]) -> Node:
    """Room for two."""
    node = make_node(cache={"budget": f"{2 * SIZE + 7 * MIB}B"}).start()
    for number, (name, size) in enumerate({"one": SIZE, "two": SIZE, "new": SIZE, "huge": 4 * SIZE}.items()):
        weights = Synthetic(size, 500 + number)
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": weights})
    return node


def planned(node: Node, *models: str) -> dict[str, Any]:
    done = node.run("cachectl", "--json", "plan", *models)
    told: dict[str, Any] = json.loads(done.stdout)
    told["status"] = done.returncode
    return told


def ensure(node: Node, name: str) -> None:
    assert node.run("ensure-model", f"org/{name}").returncode == 0


def test_a_plan_says_what_a_request_does(hub: Hub, node: Node) -> None:
    plan = planned(node, "org/one")
    assert (plan["fit"], plan["status"], plan["evicts"]) == ("now", 0, [])
    assert SIZE < plan["bytes_needed"] < SIZE + MIB
    assert plan["models"][0]["bytes_to_fetch"] == SIZE + len('"one"')
    assert hub.request_count(kind="cdn") == 0
    used = node.status().used_bytes
    ensure(node, "one")
    assert node.status().used_bytes - used <= plan["bytes_needed"], "no more than was reckoned"
    plan = planned(node, "org/one")
    assert (plan["fit"], plan["bytes_needed"], plan["models"][0]["bytes_to_fetch"]) == ("cached", 0, 0)

    ensure(node, "two")
    node.release_all()
    plan = planned(node, "org/new")
    assert (plan["fit"], plan["status"]) == ("after_eviction", 0)
    assert [model["repo_id"] for model in plan["evicts"]] == ["org/one"]
    assert {model["repo_id"] for model in node.ctl("ls")} == {"org/one", "org/two"}, "it was only a plan"
    assert node.status().reserved_bytes == 0
    ensure(node, "new")
    assert {model["repo_id"] for model in node.ctl("ls")} == {"org/new", "org/two"}, "and the request does that"


def test_what_is_in_use_is_named_and_what_never_fits_is_told_from_it(node: Node) -> None:
    ensure(node, "one")
    ensure(node, "two")
    plan = planned(node, "org/new")
    assert (plan["fit"], plan["status"], plan["evicts"]) == ("not_now", 75, [])
    assert "leased" in plan["reason"]
    plan = planned(node, "org/huge")
    assert (plan["fit"], plan["status"]) == ("never", 73)
    assert "cache.budget" in plan["reason"]


def test_models_are_planned_together_as_they_would_be_admitted(node: Node) -> None:
    assert planned(node, "org/one")["fit"] == "now"
    plan = planned(node, "org/one", "org/two", "org/new")
    assert (plan["fit"], len(plan["models"])) == ("never", 3)
    plan = planned(node, "org/one", "org/two")
    assert plan["fit"] == "now"
    assert plan["bytes_needed"] > 2 * SIZE


def test_what_the_request_has_itself_does_not_go_for_it(hub: Hub, node: Node) -> None:
    """A newer commit shares blobs with the older one, which is the only one that could go."""
    ensure(node, "one")
    node.release_all()
    repo = hub.find_repo("org/one")
    assert repo is not None
    repo.commit({"more.safetensors": Synthetic(SIZE, 9)}, base="main", branch="main")
    plan = planned(node, "org/one")
    assert plan["models"][0]["bytes_to_fetch"] <= SIZE + 10


def test_a_plan_that_cannot_be_made_is_refused_as_the_request_would_be(node: Node) -> None:
    done = node.run("cachectl", "plan", "org/unknown")
    assert done.returncode == 66
    assert node.run("cachectl", "plan", "not-a-repo/with/slashes").returncode == 64


def test_without_a_model_the_model_list_is_planned(hub: Hub, make_node: Callable[..., Node], tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        weights = Synthetic(SIZE, 600 + number)
        hub.create_repo(f"org/{name}").commit({"config.json": f'"{name}"'.encode(), "model.safetensors": weights})
    listed = tmp_path / "models.toml"
    listed.write_text('[[models]]\nrepo = "org/one"\n[[models]]\nrepo = "org/two"\nprofile = "full"\n')
    node = make_node(cache={"budget": f"{SIZE + 9 * MIB}B"}, models={"file": str(listed)}).start()
    node.wait_until(lambda: len(node.status().model_list) == 2, 20, "the list to be read")
    plan = planned(node)
    assert (plan["fit"], plan["status"]) == ("never", 73)
    assert [(m["repo_id"], m["profile"]) for m in plan["models"]] == [("org/one", "vllm"), ("org/two", "full")]


def test_without_a_model_and_without_a_list_there_is_nothing_to_plan(node: Node) -> None:
    done = node.run("cachectl", "plan")
    assert done.returncode == 64
    assert "there is no model list" in done.stderr

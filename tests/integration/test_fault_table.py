"""I6 and I7: every fault of upstream ends in time, within a bounded number of requests, and explains itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from modelcache.reasons import TABLE as REASONS
from modelcache.reasons import Reason

from tests.hub import MIB, Fault, FaultKind, Hub, RequestRecord, Synthetic
from tests.integration.fault_table import LARGE, SETTINGS, SMALL, START_SECONDS, TABLE, Row
from tests.node import Node
from tests.node.asking import ask

SIZE = 2 * MIB


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[Hub]:
    """One Hub for all rows."""
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def shared_node(shared_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One daemon for all rows: a fault that it does not get over would be seen in the next."""
    made = Node(tmp_path_factory.mktemp("node"), shared_hub.endpoint, SETTINGS).start()
    yield made
    made.stop()


def commit(hub: Hub, repo_id: str, **options: bool) -> str:
    """A repository of which no file is in another, so that nothing is linked instead of fetched."""
    config = json.dumps({"architectures": ["LlamaForCausalLM"], "name": repo_id}).encode()
    weights = Synthetic(SIZE, seed=zlib.crc32(repo_id.encode()))
    return hub.create_repo(repo_id, **options).commit({SMALL: config, LARGE: weights})


def longest_pause(requests: list[RequestRecord]) -> float:
    """Seconds between two requests about one thing that follow each other; 0 where nothing was asked twice."""
    pauses = [0.0]
    for about in {request.file for request in requests}:
        times = [request.at for request in requests if request.file == about]
        pauses += [later - earlier for earlier, later in pairwise(times)]
    return max(pauses)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.fault)
def test_a_fault_costs_and_comes_to_what_the_table_says(shared_hub: Hub, shared_node: Node, row: Row) -> None:
    hub, node = shared_hub, shared_node
    repo_id = f"org/row-{TABLE.index(row)}"
    sha = commit(hub, repo_id)
    hub.reset_counters()
    faults = [hub.faults.add(replace(fault, repo=repo_id)) for fault in row.faults]
    hub.refuse(row.refused)
    asked = ask(node, repo_id)
    requests = hub.requests()
    hub.refuse(False)
    hub.faults.clear()

    assert all(fault.fired for fault in faults)
    assert asked.reason == (row.outcome or ""), asked.stderr
    assert asked.exit_status == (REASONS[row.outcome].exit_status if row.outcome else 0)
    assert asked.seconds <= row.most_seconds + START_SECONDS
    assert longest_pause(requests) >= row.least_seconds
    assert len(requests) <= row.most_requests, [f"{r.kind} {r.file} {r.range} {r.status}" for r in requests]
    for words in row.says:
        assert words.format(endpoint=hub.endpoint, repo=repo_id, commit=sha[:12]) in asked.text
    if row.outcome is None:
        assert hub.body_bytes(repo_id, LARGE) == SIZE  # I2: a broken connection costs no byte twice
    else:
        assert REASONS[row.outcome].mend in asked.text
        assert node.visible(repo_id) == []
        hub.faults.clear()
        assert [ready["commit"] for ready in node.ensure(repo_id)] == [sha]
    assert node.visible(repo_id) == [sha]


def test_a_bad_token_of_the_daemon_costs_only_what_needs_it(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("hf_wrong\n")
    commit(hub, "org/public")
    commit(hub, "org/gated", gated=True)
    hub.find_repo("org/gated").allow("hf_right")
    node = make_node(hub={"token_file": str(token_file), "resolve_ttl": "0s"}).start()
    node.ensure("org/public")
    asked = ask(node, "org/gated")
    assert (asked.reason, asked.exit_status) == (Reason.TOKEN_REJECTED, 77)
    assert "rejects the token" in asked.text
    assert "hub.token_file" in asked.text
    assert any("rejects the token" in why for why in node.status().degraded)
    node.wait_until(lambda: node.log_lines("degraded"), 5, "the log says so too")
    (warned,) = node.log_lines("degraded")
    assert (warned["level"], warned["topic"]) == ("warning", "token")

    hub.tokens.add("hf_right")
    token_file.write_text("hf_right\n")
    node.ensure("org/gated")
    assert not node.status().degraded
    node.wait_until(lambda: node.log_lines("no longer degraded"), 5, "and that it is over")

    hub.tokens.discard("hf_right")  # revoked
    node.terminate()
    node.start()  # who was asked a minute ago is not asked again
    (served,) = node.ensure("org/gated")
    assert served["outcome"] == "hit"
    node.ensure("org/public")
    assert any("rejects the token" in why for why in node.status().degraded)
    assert "hf_wrong" not in asked.stderr + node.log_text()
    assert "hf_right" not in node.log_text()


def test_a_token_file_that_cannot_be_read_costs_only_what_needs_it(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    commit(hub, "org/public")
    commit(hub, "org/gated", gated=True)
    node = make_node(hub={"token_file": str(tmp_path / "nowhere")}).start()
    node.ensure("org/public")
    asked = ask(node, "org/gated")
    assert (asked.reason, asked.exit_status) == (Reason.TOKEN_REJECTED, 77)
    assert "cannot be read" in asked.text
    assert any("cannot be read" in why for why in node.status().degraded)


def test_a_gated_repository_is_for_the_tokens_it_allows_and_the_cdn_sees_none(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    for name in ("file", "passed"):
        commit(hub, f"org/gated-{name}", gated=True)
        hub.find_repo(f"org/gated-{name}").allow(f"hf_{name}")
        hub.tokens.add(f"hf_{name}")
    token_file = tmp_path / "token"
    token_file.write_text("hf_file\n")
    node = make_node(hub={"token_file": str(token_file)}).start()

    node.ensure("org/gated-file")
    asked = ask(node, "org/gated-passed")
    assert (asked.reason, asked.exit_status) == (Reason.GATED_REPO, 77)
    assert "the token given" in asked.text
    node.ensure("org/gated-passed", "--pass-token", env={"HF_TOKEN": "hf_passed"})
    asked = ask(node, "org/gated-passed")
    assert asked.reason == Reason.GATED_REPO  # cached is not allowed: who may read it is the Hub's to say

    senders = {(r.repo, r.authorization) for r in hub.requests() if r.kind == "resolve" and r.status in (200, 206, 302)}
    assert senders == {("org/gated-file", "Bearer hf_file"), ("org/gated-passed", "Bearer hf_passed")}
    to_cdn = [r for r in hub.requests() if r.kind == "cdn"]
    assert {r.repo for r in to_cdn} == {"org/gated-file", "org/gated-passed"}
    assert {r.authorization for r in to_cdn} == {None}
    said = node.log_text() + asked.stderr
    assert "hf_file" not in said
    assert "hf_passed" not in said


def test_a_redirect_to_another_host_never_carries_the_token(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("hf_secret\n")
    hub.tokens.add("hf_secret")
    sha = commit(hub, "org/moved")
    node = make_node(hub={"token_file": str(token_file)}).start()
    with Hub() as elsewhere:
        assert commit(elsewhere, "org/moved") == sha
        for where, path, target in (
            ("api", "revision", "/api/models/org/moved/revision/main"),
            ("resolve", SMALL, f"/org/moved/resolve/{sha}/{SMALL}"),
            ("resolve", LARGE, f"/org/moved/resolve/{sha}/{LARGE}"),
        ):
            location = {"Location": f"{elsewhere.endpoint}{target}"}
            hub.faults.add(Fault(FaultKind.STATUS, where=where, path=path, status=307, headers=location))
        node.ensure("org/moved")
        there = elsewhere.requests()
    assert {r.file for r in there if r.kind != "cdn"} == {"revision", SMALL, LARGE}
    assert {r.authorization for r in there} == {None}
    assert {r.authorization for r in hub.requests()} == {"Bearer hf_secret"}

"""The status page: one file and one JSON object; a browser sees it in tests/system."""

from __future__ import annotations

import json
import re
import signal
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node


def get(node: Node, path: str) -> tuple[Any, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}{path}", timeout=10) as answer:
        return answer.headers, answer.read().decode()


def told(node: Node) -> Any:
    return json.loads(get(node, "/status.json")[1])


def test_the_page_is_one_file_that_asks_nobody_else(node: Node) -> None:
    headers, html = get(node, "/")
    assert headers["Content-Type"].startswith("text/html")
    assert re.findall(r"https?://|//[a-z]", html) == []
    assert re.findall(r"<(?:link|img|iframe|script src)", html) == []
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "innerHTML" not in html


def test_its_data_says_what_is_cached_who_keeps_it_and_what_happened(hub: Hub, node: Node) -> None:
    for number, name in enumerate(("one", "two", "three")):
        hub.create_repo(f"org/{name}").commit({"config.json": b"{}", "model.safetensors": Synthetic(MIB, number)})
        node.ensure(f"org/{name}")
    node.ctl("pin", "org/one")
    node.ctl("release", "--model", "org/two")
    now = told(node)
    kinds = {model["repo_id"]: model["kind"] for model in now["models"]}
    assert kinds == {"org/one": "pinned", "org/two": "idle", "org/three": "leased"}
    assert [model["repo_id"] for model in now["models"]] == ["org/three", "org/two", "org/one"]
    assert now["status"]["models"] == 3
    assert now["status"]["used_bytes"] == node.status().used_bytes
    assert [event["kind"] for event in now["events"]][:2] == ["released", "pinned"]
    assert now["transfers"] == []


def test_it_can_be_turned_off_while_running(node: Node) -> None:
    get(node, "/")
    node.settings["metrics"] = {**node.settings["metrics"], "page": False}
    node.write_config()
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    node.wait_until(lambda: node.ctl("config")["settings"]["metrics.page"]["value"] is False, 10, "a reload")
    for path in ("/", "/status.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(node, path)
    get(node, "/metrics")

"""Prometheus' own checker on /metrics. Needs `promtool` (Debian: prometheus); tests/integration/test_metrics.py
checks the same rules without it."""

from __future__ import annotations

import subprocess
import urllib.request

from tests.hub import Hub
from tests.hub.models import tiny_llama
from tests.node.daemon import Node


def test_promtool_accepts_the_exposition(hub: Hub, node: Node) -> None:
    hub.create_repo("org/tiny").commit(tiny_llama())
    node.ensure("org/tiny")
    node.ensure("org/tiny")
    assert node.run("ensure-model", "org/unknown").returncode == 66
    node.release_all()
    node.ctl("evict", "org/tiny", "--yes")
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics", timeout=10) as answer:
        text = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

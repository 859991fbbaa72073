"""The dashboard and the rules on a real Prometheus that scrapes a real daemon. There is no Grafana here: its JSON is
checked by what it asks."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.node.daemon import Node, free_port

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
SECONDS = 60


class Prometheus:
    """A server with one target."""

    def __init__(self, root: Path, target: int) -> None:
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "rules.yaml")],
            "scrape_configs": [{"job_name": "modelcached", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        }
        root.mkdir()
        (root / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = (root / "log").open("wb")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={root / 'prometheus.yml'}",
                f"--storage.tsdb.path={root / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            told = json.loads(answer.read())
        assert told["status"] == "success", told
        return told["data"]

    def query(self, expression: str) -> list[Any]:
        """Nothing while it does not listen yet."""
        with contextlib.suppress(OSError):
            return self.ask("query", query=expression)["result"]  # type: ignore[no-any-return]
        return []

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


@pytest.fixture
def prometheus(tmp_path: Path, node: Node) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path / "prometheus", node.metrics_port)
    yield server
    server.stop()


def something_of_everything(hub: Hub, node: Node) -> None:
    for number, name in enumerate(("one", "two")):
        hub.create_repo(f"org/{name}").commit({"config.json": b"{}", "model.safetensors": Synthetic(4 * MIB, number)})
    hub.faults.add(Fault(FaultKind.STATUS, status=429, where="cdn", times=1))
    node.ensure("org/one")
    node.ensure("org/two")
    node.ensure("org/two")
    node.run("ensure-model", "org/none")
    node.release_all()
    node.ctl("evict", "org/one", "--yes")
    node.ctl("verify", "--all")


RARE = ("transfer_failures", "scrub_failures", "drift")
"""Of which there is nothing on a day on which nothing goes wrong."""


def test_each_query_of_the_dashboard_shows_something_on_a_real_prometheus(
    hub: Hub, node: Node, prometheus: Prometheus
) -> None:
    node.wait_until(lambda: prometheus.query("modelcached_models"), SECONDS, "the first scrape")
    something_of_everything(hub, node)
    node.wait_until(lambda: prometheus.query("sum(modelcached_requests_total) >= 4"), SECONDS, "what was done")
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = {
        target["expr"]: panel["title"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    }
    assert len(expressions) > 30
    assert prometheus.query("modelcached_build_info"), "what the list of nodes is made from"

    def silent() -> list[tuple[str, str]]:
        asked = {e: e.replace("$instance", ".*").replace("$__rate_interval", "5m") for e in expressions}
        return [
            (expressions[name], expression)
            for name, expression in asked.items()
            if not prometheus.query(expression) and not any(rare in expression for rare in RARE)
        ]

    node.wait_until(lambda: not silent(), SECONDS, "two scrapes of everything")


def test_the_rules_are_evaluated_and_nothing_fires_on_a_daemon_that_is_well(
    hub: Hub, node: Node, prometheus: Prometheus
) -> None:
    node.wait_until(lambda: prometheus.query("modelcached:used:ratio"), SECONDS, "a recorded series")
    something_of_everything(hub, node)
    node.wait_until(lambda: prometheus.query("sum(modelcached_requests_total) >= 4"), SECONDS, "what was done")
    node.wait_until(lambda: prometheus.query("modelcached:hits:ratio_rate1h"), SECONDS, "another recorded series")
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")

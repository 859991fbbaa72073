"""Writes prometheusrule.yaml from rules.yaml, and dashboard.json from the panels below: `make docs`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
NODE = 'instance=~"$instance"'
COLUMNS = 24
HEIGHT = 8

Query = tuple[str, str]
"""An expression and its legend."""


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    unit: str
    queries: list[Query]
    kind: str = "timeseries"


def gauge(name: str, legend: str) -> Query:
    """As it is."""
    return f"{name if ':' in name else f'modelcached_{name}'}{{{NODE}}}", legend


def rate(name: str, by: str) -> Query:
    """Of a counter, a second."""
    return f"sum by ({by}) (rate(modelcached_{name}_total{{{NODE}}}[$__rate_interval]))", f"{{{{{by}}}}}"


def rise(name: str, by: str, legend: str, match: str = "") -> Query:
    """Of a counter, within a step."""
    return f"sum by ({by}) (increase(modelcached_{name}_total{{{match}{NODE}}}[$__rate_interval]))", legend


def quantile(share: float, name: str, legend: str, by: str = "le") -> Query:
    """Of a histogram."""
    buckets = f"sum by ({by}) (rate(modelcached_{name}_bucket{{{NODE}}}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})", legend


ROWS = {
    "Disk": [
        Panel("Budget in use", "percentunit", [gauge("modelcached:used:ratio", "{{instance}}")], "gauge"),
        Panel(
            "What the cache holds",
            "bytes",
            [
                gauge("used_bytes", "used"),
                gauge("reserved_bytes", "promised"),
                gauge("pinned_bytes", "pinned"),
                gauge("leased_bytes", "leased"),
                gauge("partial_bytes", "unfinished"),
                gauge("budget_bytes", "budget"),
            ],
        ),
        Panel(
            "Free on the filesystem",
            "bytes",
            [gauge("filesystem_free_bytes", "free"), gauge("min_free_bytes", "kept free")],
        ),
        Panel("Free inodes", "short", [gauge("filesystem_free_inodes", "free"), gauge("min_free_inodes", "kept free")]),
    ],
    "Requests": [
        Panel("Requests by outcome", "reqps", [rate("requests", "outcome")]),
        Panel(
            "Answered from the disk", "percentunit", [gauge("modelcached:hits:ratio_rate1h", "{{instance}}")], "stat"
        ),
        Panel("Refusals by reason", "short", [rise("requests", "reason", "{{reason}}", 'outcome="error",')]),
        Panel(
            "How long requests take (median, 95 %)",
            "s",
            [
                quantile(share, "request_duration_seconds", f"{share} {{{{outcome}}}}", "le, outcome")
                for share in (0.5, 0.95)
            ],
        ),
    ],
    "Transfers": [
        Panel("Received by origin", "Bps", [rate("received_bytes", "origin")]),
        Panel(
            "Models on their way",
            "short",
            [
                gauge("transfers", "on their way"),
                gauge("transfers_queued", "in line"),
                gauge("transfer_waiters", "calls that wait"),
                gauge("flights", "blobs"),
            ],
        ),
        Panel(
            "Waiting for the first byte, and in line (95 %)",
            "s",
            [quantile(0.95, "first_byte_seconds", "first byte"), quantile(0.95, "queue_seconds", "in line")],
        ),
        Panel(
            "Retries, failures, and 429s",
            "short",
            [
                rise("transfer_retries", "reason", "retry {{reason}}"),
                rise("transfer_failures", "reason", "failure {{reason}}"),
                rise("rate_limits", "instance", "429"),
            ],
        ),
    ],
    "Use and eviction": [
        Panel(
            "Models, pins and leases",
            "short",
            [gauge("models", "models"), gauge("pins", "pins"), gauge("leases", "{{kind}} leases")],
        ),
        Panel("Evicted by what for", "bytes", [rise("evicted_bytes", "reason", "{{reason}}")]),
        Panel("Idle time of the next to go", "s", [gauge("oldest_idle_seconds", "{{instance}}")]),
    ],
    "Health": [
        Panel(
            "Not as it should be",
            "short",
            [
                gauge("degraded", "reasons"),
                gauge("witness_healthy", "pods are seen (1)"),
                rise("scrub_failures", "instance", "bad blobs"),
                rise("drift", "instance", "changed by others"),
            ],
        ),
        Panel("Calls to the Hub by outcome", "reqps", [rate("hub_calls", "outcome")]),
        Panel("Scrub: due", "bytes", [gauge("scrub_due_bytes", "due")]),
        Panel(
            "Lag of the event loop (99.9 %, most)",
            "s",
            [quantile(0.999, "event_loop_lag_seconds", "99.9 %"), gauge("event_loop_lag_max_seconds", "most")],
        ),
    ],
}


def dashboard() -> str:
    """Grafana's JSON (schema 39, Grafana 10 and newer)."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append({"id": len(placed) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        width = COLUMNS // len(row)
        for number, panel in enumerate(row):
            place = {"x": number * width, "y": y + 1, "w": width, "h": HEIGHT}
            placed.append({"id": len(placed) + 1, "gridPos": place, **_picture(panel)})
        y += 1 + HEIGHT
    whole = {
        "title": "modelcached",
        "uid": "modelcached",
        "tags": ["modelcached"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [_datasource(), _nodes()]},
        "panels": placed,
    }
    return json.dumps(whole, indent=2) + "\n"


def _picture(panel: Panel) -> dict[str, Any]:
    defaults = {"unit": panel.unit, "min": 0} | ({"max": 1} if panel.kind == "gauge" else {})
    targets = [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for number, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _nodes() -> dict[str, Any]:
    return {
        "name": "instance",
        "type": "query",
        "label": "Node",
        "datasource": SOURCE,
        "query": {"query": "label_values(modelcached_build_info, instance)", "refId": "instance"},
        "includeAll": True,
        "multi": True,
        "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }


def prometheus_rule() -> str:
    """The same rules as an object of the Prometheus operator."""
    whole = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "modelcached", "namespace": "modelcached"},
        "spec": yaml.safe_load((HERE / "rules.yaml").read_text()),
    }
    return "# Made from rules.yaml by `make docs`; do not edit.\n" + yaml.safe_dump(whole, sort_keys=False, width=1000)


FILES = {"dashboard.json": dashboard, "prometheusrule.yaml": prometheus_rule}


def main() -> int:
    """Writes both."""
    for name, make in FILES.items():
        (HERE / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())

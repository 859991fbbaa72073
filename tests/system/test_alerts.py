"""Alerting rules against series as they would be: each fires when it should, and only then (promtool test rules)."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "monitoring" / "rules.yaml"
NODE = 'job="modelcached", instance="node-1"'
GB = 10**9


@dataclass(frozen=True)
class Case:
    """Series, each as promtool writes them at a sample a minute, and whether the alert fires at that minute."""

    alert: str
    name: str
    series: dict[str, str]
    minute: int
    fires: bool
    labels: str = ""
    """Further labels of what fires."""


def labelled(name: str, more: str = "") -> str:
    return f"{name}{{{NODE}{', ' + more if more else ''}}}"


def steady(value: float, minutes: int) -> str:
    return f"{value}x{minutes}"


CASES = [
    Case("ModelcachedDown", "gone for ten minutes", {labelled("up"): "1x5 0x30"}, 20, True),
    Case("ModelcachedDown", "restarted", {labelled("up"): "1x5 0x2 1x30"}, 20, False),
    Case("ModelcachedDown", "another job", {'up{job="node", instance="node-1"}': "0x60"}, 20, False),
    *(
        Case(
            "ModelcachedNotRunning", f"a {kind} {name}", {labelled(series, f'{kind}="{who}"'): values}, 20, fires, more
        )
        for kind, series in (
            ("daemonset", "kube_daemonset_status_number_unavailable"),
            ("deployment", "kube_deployment_status_replicas_unavailable"),
        )
        for name, who, values, fires, more in (
            ("that never started", "modelcached", "1x60", True, f'{kind}="modelcached"'),
            ("that is replaced", "modelcached", "0x10 1x10 0x40", False, ""),
            ("of somebody else's", "other", "1x60", False, ""),
        )
    ),
    Case(
        "ModelcachedDiskFillsSoon",
        "loses 1 GB a minute of 100",
        {
            labelled("modelcached_filesystem_free_bytes"): f"{100 * GB}-{GB}x90",
            labelled("modelcached_used_bytes"): steady(50 * GB, 90),
        },
        80,
        True,
    ),
    Case(
        "ModelcachedDiskFillsSoon",
        "loses 1 GB a minute of 1000",
        {
            labelled("modelcached_filesystem_free_bytes"): f"{1000 * GB}-{GB}x90",
            labelled("modelcached_used_bytes"): steady(50 * GB, 90),
        },
        80,
        False,
    ),
    Case(
        "ModelcachedDiskFillsSoon",
        "the cache itself takes 140 GB at once",
        {
            labelled("modelcached_filesystem_free_bytes"): f"{500 * GB}x45 {360 * GB}x60",
            labelled("modelcached_used_bytes"): f"{50 * GB}x45 {190 * GB}x60",
        },
        80,
        False,
    ),
    Case(
        "ModelcachedCannotEvict",
        "full, and nothing may go",
        {
            labelled("modelcached_used_bytes"): steady(95, 60),
            labelled("modelcached_budget_bytes"): steady(100, 60),
            labelled("modelcached_evictable"): steady(0, 60),
        },
        40,
        True,
    ),
    Case(
        "ModelcachedCannotEvict",
        "full, and something may go",
        {
            labelled("modelcached_used_bytes"): steady(95, 60),
            labelled("modelcached_budget_bytes"): steady(100, 60),
            labelled("modelcached_evictable"): steady(1, 60),
        },
        40,
        False,
    ),
    Case(
        "ModelcachedCannotEvict",
        "half full, all of it in use",
        {
            labelled("modelcached_used_bytes"): steady(50, 60),
            labelled("modelcached_budget_bytes"): steady(100, 60),
            labelled("modelcached_evictable"): steady(0, 60),
        },
        40,
        False,
    ),
    Case(
        "ModelcachedRefusals",
        "the first one ever",
        {labelled("modelcached_requests_total", 'outcome="error", reason="NO_SPACE_NOW"'): "0x20 1x40"},
        25,
        True,
        'reason="NO_SPACE_NOW"',
    ),
    Case(
        "ModelcachedRefusals",
        "long ago",
        {labelled("modelcached_requests_total", 'outcome="error", reason="NO_SPACE_NOW"'): "0x20 1x40"},
        50,
        False,
    ),
    Case(
        "ModelcachedRefusals",
        "of what is not there",
        {labelled("modelcached_requests_total", 'outcome="error", reason="REPO_NOT_FOUND"'): "0+1x60"},
        30,
        False,
    ),
    Case(
        "ModelcachedVerificationFailed",
        "the scrub",
        {labelled("modelcached_scrub_failures_total"): "0x9 1x60"},
        20,
        True,
    ),
    Case(
        "ModelcachedVerificationFailed",
        "a download",
        {labelled("modelcached_requests_total", 'outcome="error", reason="DIGEST_MISMATCH"'): "0x9 1x60"},
        20,
        True,
    ),
    Case(
        "ModelcachedVerificationFailed",
        "long ago",
        {
            labelled("modelcached_scrub_failures_total"): "0x9 1x200",
            labelled("modelcached_requests_total", 'outcome="error", reason="DIGEST_MISMATCH"'): "3x200",
        },
        150,
        False,
    ),
    Case(
        "ModelcachedTransferStalled",
        "nothing comes",
        {
            labelled("modelcached_transfers"): steady(2, 60),
            labelled("modelcached_transfers_queued"): steady(1, 60),
            labelled("modelcached_received_bytes_total", 'origin="hub"'): steady(5000, 60),
        },
        40,
        True,
    ),
    Case(
        "ModelcachedTransferStalled",
        "it comes",
        {
            labelled("modelcached_transfers"): steady(2, 60),
            labelled("modelcached_transfers_queued"): steady(1, 60),
            labelled("modelcached_received_bytes_total", 'origin="hub"'): steady(5000, 60),
            labelled("modelcached_received_bytes_total", 'origin="xet"'): "0+1000x60",
        },
        40,
        False,
    ),
    Case(
        "ModelcachedTransferStalled",
        "all wait in line",
        {
            labelled("modelcached_transfers"): steady(2, 60),
            labelled("modelcached_transfers_queued"): steady(2, 60),
            labelled("modelcached_received_bytes_total", 'origin="hub"'): steady(5000, 60),
        },
        40,
        False,
    ),
    Case(
        "ModelcachedScrubBehind",
        "for two days",
        {labelled("modelcached_scrub_due_bytes"): steady(GB, 4000)},
        3500,
        True,
    ),
    Case(
        "ModelcachedScrubBehind",
        "caught up",
        {labelled("modelcached_scrub_due_bytes"): f"{GB}x2000 0x5 {GB}x2000"},
        3500,
        False,
    ),
    Case("ModelcachedScrubBehind", "new", {labelled("modelcached_scrub_due_bytes"): steady(GB, 500)}, 400, False),
    Case(
        "ModelcachedHubFailing",
        "most fail",
        {
            labelled("modelcached_hub_calls_total", 'call="resolve", outcome="ok"'): "0+1x60",
            labelled("modelcached_hub_calls_total", 'call="resolve", outcome="UPSTREAM_UNAVAILABLE"'): "0+3x60",
        },
        50,
        True,
    ),
    Case(
        "ModelcachedHubFailing",
        "users ask for what is not there",
        {
            labelled("modelcached_hub_calls_total", 'call="resolve", outcome="ok"'): "0+1x60",
            labelled("modelcached_hub_calls_total", 'call="resolve", outcome="REPO_NOT_FOUND"'): "0+9x60",
        },
        50,
        False,
    ),
    Case("ModelcachedWitnessLost", "for long", {labelled("modelcached_witness_healthy"): steady(0, 60)}, 30, True),
    Case("ModelcachedWitnessLost", "never", {labelled("modelcached_witness_healthy"): steady(1, 60)}, 30, False),
    Case("ModelcachedDegraded", "for long", {labelled("modelcached_degraded"): steady(2, 60)}, 30, True),
    Case("ModelcachedDegraded", "for a moment", {labelled("modelcached_degraded"): "0x10 1x5 0x40"}, 30, False),
    Case(
        "ModelcachedLoopLate", "for long", {labelled("modelcached_event_loop_lag_max_seconds"): steady(2, 60)}, 30, True
    ),
    Case(
        "ModelcachedLoopLate", "once", {labelled("modelcached_event_loop_lag_max_seconds"): "0x10 3x2 0x40"}, 30, False
    ),
]


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.name}")
def test_an_alert_fires_when_it_should_and_only_then(case: Case, tmp_path: Path) -> None:
    severity = alerts()[case.alert]["labels"]["severity"]
    labels = f'alertname="{case.alert}", alertstate="firing", {NODE}, severity="{severity}"'
    fired = {"labels": f"ALERTS{{{labels}{', ' + case.labels if case.labels else ''}}}", "value": 1}
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'ALERTS{{alertname="{case.alert}", alertstate="firing"}}',
                        "eval_time": f"{case.minute}m",
                        "exp_samples": [fired] if case.fires else [],
                    }
                ],
            }
        ],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_one_that_does_not_and_a_line_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    assert (
        {case.alert for case in CASES if case.fires}
        == {case.alert for case in CASES if not case.fires}
        == set(alerts())
    )
    for name, rule in alerts().items():
        assert f"\n## {name}\n" in runbook
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_json_of_panels_that_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "deploy" / "monitoring" / "dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells

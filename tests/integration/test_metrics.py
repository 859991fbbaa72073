"""What Prometheus and probes see: promtool's rules, checked on the exposition, and numbers that move as they should."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable

from modelcached.config import load
from modelcached.daemon import Daemon
from modelcached.store.disk import Disk
from modelcached.telemetry.listener import Listener
from modelcached.telemetry.metrics import COUNTERS, GAUGES, HISTOGRAMS, PREFIX
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.node.daemon import Node

BASE_UNITS = ("seconds", "bytes", "ratio", "info", "total")
NO_UNITS = {
    "model_list_entries",
    "models",
    "leases",
    "pins",
    "witness_healthy",
    "evictable",
    "flights",
    "filesystem_inodes",
    "filesystem_free_inodes",
    "reserved_inodes",
    "min_free_inodes",
    "transfers",
    "transfers_queued",
    "transfer_waiters",
    "degraded",
    "event_loop_tasks",
}
"""Gauges that count things."""


def get(daemon: Node | Listener, path: str) -> tuple[int, str]:
    port = daemon.metrics_port if isinstance(daemon, Node) else daemon.port
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def busy(hub: Hub, node: Node) -> None:
    """Something of everything: a download, a hit, a refusal, a failure, an eviction."""
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    node.ensure("org/model")
    node.ensure("org/model")
    assert node.run("ensure-model", "org/unknown").returncode == 66
    node.release_all()
    node.ctl("evict", "org/model", "--yes")


def families(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def test_the_exposition_keeps_promtools_rules(hub: Hub, node: Node) -> None:
    """`promtool check metrics` itself runs in tests/system; these are its rules (promlint), in Python."""
    busy(hub, node)
    status, text = get(node, "/metrics")
    assert status == 200
    helps = Counter(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))
    types = Counter(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert set(helps) == set(types)
    assert max(helps.values()) == max(types.values()) == 1, "one HELP and TYPE a family"
    series = Counter(line.rpartition(" ")[0] for line in text.splitlines() if line and not line.startswith("#"))
    assert [name for name, count in series.items() if count > 1] == [], "no series twice"
    for family in families(text):
        name = family.name
        assert re.fullmatch(r"modelcached_[a-z][a-z_]*", name), "lower case, one prefix, no colons"
        assert family.documentation.strip(), f"{name} has a HELP"
        assert not re.search(r"(gauge|counter|histogram|summary)", name), "no type in a name"
        assert not re.search(r"(milli|micro|nano|kilo|mega|kibi|mebi|minutes|hours|_ms$)", name), "base units only"
        suffixes = {sample.name.removeprefix(name) for sample in family.samples}
        if family.type == "counter":
            assert suffixes <= {"_total", "_created"}, name
        elif family.type == "histogram":
            assert suffixes <= {"_bucket", "_count", "_sum", "_created"}, name
            assert name.endswith("_seconds")
        elif not name.endswith("_created"):
            assert not name.endswith(("_total", "_count", "_sum", "_bucket")), name
            bare = name.removeprefix("modelcached_")
            assert name.endswith(BASE_UNITS) or bare in NO_UNITS, f"{name} says its unit"
        for sample in family.samples:
            assert all(re.fullmatch(r"[a-z_]+", label) for label in sample.labels), sample
            assert not {"job", "instance"} & set(sample.labels)


def test_labels_are_few(hub: Hub, node: Node) -> None:
    """No repository, commit, path or caller ever becomes a label: a series each would be one too many."""
    busy(hub, node)
    _, text = get(node, "/metrics")
    assert "org/" not in text
    values = {value for family in families(text) for s in family.samples for k, value in s.labels.items() if k != "le"}
    assert len(values) < 40
    assert not [value for value in values if re.fullmatch(r"[0-9a-f]{32,64}", value)]


def test_requests_bytes_and_evictions_are_counted(hub: Hub, node: Node) -> None:
    total, outcomes = "modelcached_requests_total", {"hit": 1, "downloaded": 1, "error": 1}
    busy(hub, node)
    for outcome, count in outcomes.items():
        assert node.metric(total, outcome=outcome) == count
        assert node.metric("modelcached_request_duration_seconds_count", outcome=outcome) == count
    assert node.metric(total, outcome="error", reason="REPO_NOT_FOUND") == 1
    assert node.metric("modelcached_fetched_bytes_total", origin="hub") == 2 * MIB + 2
    assert node.metric("modelcached_evictions_total", reason="operator") == 1
    assert 2 * MIB <= node.metric("modelcached_evicted_bytes_total", reason="operator") < 2.2 * MIB
    assert node.metric("modelcached_hub_calls_total", call="tree", outcome="ok") == 1
    assert node.metric("modelcached_hub_calls_total", call="resolve", outcome="REPO_NOT_FOUND") == 1
    buckets = [
        (float(sample.labels["le"]), sample.value)
        for family in families(get(node, "/metrics")[1])
        for sample in family.samples
        if sample.name == "modelcached_request_duration_seconds_bucket" and sample.labels["outcome"] == "hit"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (float("inf"), 1.0)
    assert dict(buckets)[2.0] == 1, "a hit is no matter of seconds"
    assert buckets[-2][0] >= 3600, "a cold model of 140 GB takes hours"


def test_gauges_show_what_status_shows(hub: Hub, node: Node) -> None:
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    node.ensure("org/model")
    node.ctl("pin", "org/model")
    node.assert_disk_truth()
    status = node.status()
    for name in ("budget", "used", "reserved", "partial", "trash", "quarantine", "pinned", "leased", "min_free"):
        assert node.metric(f"modelcached_{name}_bytes") == getattr(status, f"{name}_bytes"), name
    assert node.metric("modelcached_pinned_bytes") >= 2 * MIB
    assert (node.metric("modelcached_models"), node.metric("modelcached_leases")) == (1, 1)
    assert node.metric("modelcached_degraded") == 0
    assert node.metric("modelcached_build_info", version=status.version) == 1


def test_a_transfer_under_way_and_its_waiters_are_seen(hub: Hub, node: Node) -> None:
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(4 * MIB, 1)})
    hub.gate.close("*.safetensors")
    clients = [node.popen("ensure-model", "org/model") for _ in range(2)]
    node.wait_until(lambda: node.metric("modelcached_transfer_waiters") == 2, 20, "both wait")
    assert node.metric("modelcached_transfers") == 1
    hub.gate.open()
    for client in clients:
        client.communicate(timeout=30)
        assert client.returncode == 0
    assert node.metric("modelcached_transfers") == node.metric("modelcached_transfer_waiters") == 0
    assert node.metric("modelcached_requests_total", outcome="downloaded") == 1
    assert node.metric("modelcached_requests_total", outcome="joined") == 1


def test_what_was_wrong_is_counted_by_reason(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node().start()
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    hub.faults.add(Fault(FaultKind.WRONG_BYTES, where="cdn"))
    assert node.run("ensure-model", "org/model").returncode == 65
    assert node.metric("modelcached_requests_total", outcome="error", reason="DIGEST_MISMATCH") == 1
    assert node.metric("modelcached_fetched_bytes_total", origin="hub") == 2, "only what was right was fetched"


def test_the_event_loops_lag_is_exported_with_its_maximum(node: Node) -> None:
    """A daemon that stands still for a while (SIGSTOP) is late by so much, and says so afterwards."""
    lag, stood = "modelcached_event_loop_lag_seconds", 0.5
    node.wait_until(lambda: node.metric(f"{lag}_count") > 0, 10, "the lag is measured")
    samples = [sample for family in families(get(node, "/metrics")[1]) for sample in family.samples]
    ends = {float(sample.labels["le"]) for sample in samples if sample.name == f"{lag}_bucket"}
    assert ends >= {0.001, 0.02, 0.05, 0.1, 1.0}
    late = node.metric(f"{lag}_count") - node.metric(f"{lag}_bucket", le="0.3")
    node.ps.suspend()
    time.sleep(stood)  # what is measured
    node.ps.resume()
    node.wait_until(
        lambda: node.metric(f"{lag}_count") - node.metric(f"{lag}_bucket", le="0.3") > late, 10, "it was late"
    )
    assert node.metric("modelcached_event_loop_lag_max_seconds") >= stood - 0.1


def test_health_means_that_the_event_loop_answers(node: Node) -> None:
    assert get(node, "/healthz") == (200, "ok\n")
    assert get(node, "/readyz") == (200, "ok\n")
    assert get(node, "/elsewhere") == (404, "/, /status.json, /metrics, /healthz or /readyz\n")
    status, body = get(node, "/metrics?name[]=x")
    assert (status, "modelcached_used_bytes" in body) == (200, True)


async def test_a_daemon_that_drains_is_alive_and_not_ready(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node()
    node.write_config()
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    writing, go_on = threading.Event(), threading.Event()

    def stop_the_world(operation: str, path: str) -> None:
        if operation == "rename" and "/blobs/" in path:
            writing.set()
            assert go_on.wait(30)

    daemon = Daemon(load(node.config_file), Disk(stop_the_world))
    await daemon.start()
    assert daemon.listener is not None
    client = node.popen("ensure-model", "org/model")
    stopping: asyncio.Task[None] | None = None
    try:
        assert await asyncio.to_thread(writing.wait, 20), "the disk is busy with a blob"
        stopping = asyncio.create_task(daemon.stop())
        while await asyncio.to_thread(get, daemon.listener, "/readyz") != (503, "not serving\n"):
            assert not stopping.done()
        assert await asyncio.to_thread(get, daemon.listener, "/healthz") == (200, "ok\n")
        assert not stopping.done()
    finally:
        go_on.set()
        await (stopping or daemon.stop())
        client.terminate()
        client.communicate(timeout=20)


def test_a_metrics_address_that_is_taken_is_named(hub: Hub, make_node: Callable[..., Node]) -> None:
    first = make_node().start()
    second = Node(first.root / "second", hub.endpoint, {"metrics": {"address": f"127.0.0.1:{first.metrics_port}"}})
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(20) == 74
    (told,) = second.log_lines("cannot start")
    assert told["why"].startswith(f"[Errno 98] metrics.address 127.0.0.1:{first.metrics_port} cannot be listened on")


def test_transfers_are_counted_as_they_go(hub: Hub, node: Node) -> None:
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(8 * MIB, 1)})
    hub.faults.add(Fault(FaultKind.RESET, where="cdn", at_fraction=0.5, times=1))
    hub.faults.add(Fault(FaultKind.STATUS, status=429, where="cdn", retry_after=1, times=1))
    hub.gate.close("*.safetensors")
    client = node.popen("ensure-model", "org/model")
    node.wait_until(lambda: node.metric("modelcached_flights") == 1, 20, "its weights are wanted")
    assert node.metric("modelcached_transfer_remaining_bytes") == 8 * MIB
    hub.gate.open()
    client.communicate(timeout=40)
    assert client.returncode == 0
    assert node.metric("modelcached_flights") == node.metric("modelcached_transfer_remaining_bytes") == 0
    assert node.metric("modelcached_received_bytes_total", origin="hub") == 8 * MIB + 2
    assert node.metric("modelcached_transfer_retries_total", reason="UPSTREAM_UNAVAILABLE") >= 1
    assert node.metric("modelcached_transfer_retries_total", reason="RATE_LIMITED") >= 1
    assert node.metric("modelcached_rate_limits_total") == 1
    assert 0.5 < node.metric("modelcached_rate_limit_wait_seconds_total") < 5
    assert node.metric("modelcached_first_byte_seconds_count") == 2
    assert node.metric("modelcached_queue_seconds_count") == 1
    assert node.metric("modelcached_transfer_failures_total") == 0


def test_a_transfer_that_fails_for_good_is_counted_by_why(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(transfer={"retry_timeout": "1s"}).start()
    hub.create_repo("org/model").commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    hub.faults.add(Fault(FaultKind.STATUS, status=503, where="cdn"))
    assert node.run("ensure-model", "org/model").returncode == 69
    assert node.metric("modelcached_transfer_failures_total", reason="UPSTREAM_UNAVAILABLE") == 1


def test_use_is_shown_by_kind_and_by_age(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(metrics={"models": 1}).start()
    for name in ("one", "two"):
        hub.create_repo(f"org/{name}").commit({"config.json": b"{}", "model.safetensors": Synthetic(MIB, len(name))})
        node.ensure(f"org/{name}")
    node.ctl("pin", "org/one")
    assert node.metric("modelcached_pins") == 1
    assert node.metric("modelcached_leases", kind="ttl") == node.metric("modelcached_leases") == 2
    assert node.metric("modelcached_witness_healthy") == 1
    assert "modelcached_oldest_idle_seconds" not in get(node, "/metrics")[1], "everything is in use"
    assert node.metric("modelcached_evictable") == 0
    node.release_all()
    assert node.metric("modelcached_evictable") == 1
    assert 0 < node.metric("modelcached_oldest_idle_seconds") < 60
    text = get(node, "/metrics")[1]
    assert re.findall(r'modelcached_model_size_bytes\{.*model="([^"]+)"', text) == ["org/two"]
    assert 0 < node.metric("modelcached_model_idle_seconds", model="org/two") < 60
    node.ctl("verify", "--all")
    assert node.metric("modelcached_scrub_due_bytes") == 0
    assert node.metric("modelcached_filesystem_free_inodes") > node.metric("modelcached_min_free_inodes") > 0


def test_every_metric_of_the_table_is_exposed_and_no_other(hub: Hub, node: Node) -> None:
    busy(hub, node)
    node.ensure("org/model")
    node.release_all()
    table = {PREFIX + each.name for each in (*COUNTERS, *HISTOGRAMS, *GAUGES)}
    by_request = {f"{PREFIX}model_size_bytes", f"{PREFIX}model_idle_seconds"}
    others = {f"{PREFIX}{name}" for name in ("build_info", "event_loop_lag_seconds", "event_loop_lag_max_seconds")}
    exposed = {family.name for family in families(get(node, "/metrics")[1])}
    exposed = {name for name in exposed if not name.endswith("_created")}
    exposed.add(f"{PREFIX}oldest_check_age_seconds")  # known once the scrub has looked
    assert exposed == (table - by_request) | others | {f"{PREFIX}event_loop_tasks"}

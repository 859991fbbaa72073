"""cachectl's verbs that look closer: what they ask of a fake daemon, and what they print."""

from __future__ import annotations

import json
import time

from modelcache.v1 import admin_pb2

from tests.unit.client.fake_daemon import COMMIT, LEASE
from tests.unit.client.test_cachectl import LS_KEYS, STATUS_KEYS


def test_show_has_files_profiles_pins_leases_and_events(full_daemon, cachectl):
    status, out, _ = cachectl("show", "org/name@v1")
    assert status == 0
    assert "vllm: 2 files, safetensors" in out
    assert "main of the model list" in out
    assert "kept by   pinned as main" in out
    assert "missing" in out
    assert "5.0 GB" in out
    assert "evicted" in out
    told = json.loads(cachectl("show", "org/name", "--json")[1])
    assert set(told) == LS_KEYS | {"path", "files", "selections", "pins", "kept_by", "events"}
    assert told["pins"] == [{"revision": "main", "owner": "list"}]
    assert told["files"][1] == {
        "path": "deep/" + "w" * 70 + ".safetensors",
        "size_bytes": 5_000_000_000,
        "digest": "sha256:" + "2" * 64,
        "cached": True,
        "verified": True,
        "verified_at": "2026-01-02T00:00:00Z",
        "shared_with": [f"org/other@{COMMIT}"],
    }
    asked = full_daemon.asked[0]
    assert (asked.model.repo_id, asked.model.revision) == ("org/name", "v1")


def test_events_are_asked_for_by_repository_kind_and_time_and_read_page_after_page(full_daemon, cachectl):
    status, out, _ = cachectl("events", "org/name", "--kind", "evicted", "--since", "1h", "--json")
    told = json.loads(out)
    assert (status, [event["kind"] for event in told]) == (0, ["evicted", "fetched", "unknown"])
    assert told[0] == {
        "id": 9,
        "at": "2026-01-02T00:00:00Z",
        "kind": "evicted",
        "model": f"org/name@{COMMIT}",
        "reason": "space",
        "bytes": 5000,
        "seconds": 90.0,
        "holder": "pod x",
        "request_id": None,
        "detail": None,
    }
    first = full_daemon.asked[0]
    assert (first.repo_id, list(first.kinds)) == ("org/name", [admin_pb2.EVENT_KIND_EVICTED])
    assert 3590 < time.time() - first.since.seconds < 3700
    assert "space, 5.0 kB, in 1m 30s, for pod x" in cachectl("events", "--limit", "1")[1].replace("\n", " ")
    assert len(json.loads(cachectl("events", "--limit", "1", "--json")[1])) == 1
    full_daemon.events = []
    assert cachectl("events")[:2] == (0, "")


def test_verify_says_what_is_bad_and_exits_65(full_daemon, cachectl):
    status, out, err = cachectl("verify", "org/name@v1", "--repair")
    assert (status, out) == (0, "")
    assert "2 files of 1 model (5.0 kB) read; none bad" in err
    assert (full_daemon.asked[0].repair, full_daemon.asked[0].models[0].revision) == (True, "v1")
    bad = admin_pb2.BadFile(repo_id="org/name", commit=COMMIT, path="w", digest="sha256:0", verdict=1)
    full_daemon.read.bad.append(bad)
    status, out, err = cachectl("verify", "--all")
    assert status == 65
    assert "served to nobody new" in out
    assert "--repair" in err
    assert list(full_daemon.asked[-1].models) == []
    told = json.loads(cachectl("verify", "--all", "--json")[1])["bad"]
    assert told == [
        {
            "repo_id": "org/name",
            "commit": COMMIT,
            "path": "w",
            "digest": "sha256:0",
            "verdict": "bad",
            "repaired": False,
            "detail": None,
        }
    ]
    full_daemon.read.bad[0].repaired = True
    status, out, _ = cachectl("verify", "--all")
    assert status == 0
    assert "fetched again" in out


def test_gc_shows_what_there_is_and_refuses_without_a_terminal_or_yes(full_daemon, cachectl):
    status, out, err = cachectl("gc")
    assert (status, out) == (64, "")
    assert "in use: it stays" in err
    assert "of org/name: whole" in err
    assert [request.remove for request in full_daemon.asked] == [False]
    told = json.loads(cachectl("gc", "--dry-run", "--kind", "orphan", "--json")[1])
    assert (told["removed"], told["bytes_freed"], told["items"][1]["repo_id"]) == (False, 5000, "org/name")
    assert list(full_daemon.asked[-1].kinds) == [admin_pb2.GARBAGE_KIND_ORPHAN]
    status, _, err = cachectl("gc", "--yes")
    assert status == 0
    assert "5.0 kB freed" in err
    assert [request.remove for request in full_daemon.asked[-2:]] == [False, True]
    full_daemon.garbage = admin_pb2.CollectGarbageResponse()
    assert json.loads(cachectl("gc", "--yes", "--json")[1]) == {"removed": True, "items": [], "bytes_freed": 0}
    assert full_daemon.asked[-1].remove is False  # there was nothing to be removed


def test_config_says_what_differs(full_daemon, cachectl):
    status, out, err = cachectl("config")
    assert status == 0
    assert "cache.budget" in out
    assert "/etc/modelcached/config.toml" in err
    told = json.loads(cachectl("config", "--changed", "--json")[1])
    assert told == {
        "config_file": "/etc/modelcached/config.toml",
        "settings": {"cache.budget": {"value": "500GB", "default": "80%", "reloadable": True}},
    }


def test_a_rule_says_which_go_and_what_was_shown_is_what_goes(full_daemon, cachectl):
    assert cachectl("evict", "--older-than", "7d", "--until-free", "200GB", "--yes")[0] == 0
    planned, gone = full_daemon.asked
    assert (planned.rule.older_than.seconds, planned.rule.until_free_bytes) == (7 * 86400, 200 * 10**9)
    assert planned.dry_run
    assert not gone.HasField("rule")
    assert [(model.repo_id, model.revision) for model in gone.models] == [("org/name", COMMIT)]
    full_daemon.evictable = admin_pb2.EvictModelsResponse()
    status, out, err = cachectl("evict", "--all-unpinned", "--yes")
    assert (status, out) == (0, "")
    assert "nothing that may go is like that" in err
    assert [request.dry_run for request in full_daemon.asked[2:]] == [True]


def test_doctor_says_what_is_wrong_and_what_to_do(daemon, cachectl):
    daemon.findings = [
        admin_pb2.Finding(level=level, check="a check", text="a text " * 20, mend="do this")
        for level in (admin_pb2.FINDING_LEVEL_OK, admin_pb2.FINDING_LEVEL_WARNING)
    ]
    status, out, err = cachectl("doctor")
    assert status == 0
    assert out.count("-> do this") == 1
    assert "give --model" in out
    assert err == "1 ok, 1 warning, 1 skipped\n"
    daemon.findings.append(admin_pb2.Finding(level=admin_pb2.FINDING_LEVEL_FAILURE, check="x", text="y", mend="z"))
    status, out, _ = cachectl("doctor", "--json")
    told = json.loads(out)
    assert (status, [row["level"] for row in told]) == (1, ["ok", "warning", "failure", "skipped"])
    assert told[2] == {"level": "failure", "check": "x", "text": "y", "mend": "z"}


def test_doctor_fetches_and_loads_the_model_that_is_named(daemon, cachectl):
    def on_ensure(request, _context):
        ready = daemon.ready(request)
        config = daemon.hub / ready.ready.models[0].path / "config.json"
        config.write_text("{}" if request.model.repo_id == "a/b" else "{")
        yield ready

    daemon.on_ensure = on_ensure
    status, out, _ = cachectl("doctor", "--model", "a/b@v1")
    assert status == 0
    assert "900 bytes fetched" in out
    assert "1 files read through" in out
    assert daemon.asked[0].repo_id == "a/b"
    request = daemon.ensured.get_nowait()
    assert list(request.model.profile.include) == ["*.json"]
    assert daemon.released.get_nowait() == LEASE
    status, out, _ = cachectl("doctor", "--model", "a/broken")
    assert status == 1
    assert "offline load" in out


def test_top_asks_for_its_interval_and_ends_at_its_count(full_daemon, cachectl):
    status, out, _ = cachectl("top", "--json", "--count", "2", "--interval", "250ms")
    assert status == 0
    assert [set(json.loads(line)) for line in out.splitlines()] == [STATUS_KEYS] * 2
    assert full_daemon.asked[0].interval.ToMilliseconds() == 250

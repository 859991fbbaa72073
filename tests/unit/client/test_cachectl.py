"""cachectl against a fake daemon: what it asks, what it prints, how it fails."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest
from modelcache.admin import Admin
from modelcache.cachectl.commands import cli
from modelcache.client import answer
from modelcache.errors import ModelCacheError
from modelcache.reasons import TABLE, Reason
from modelcache.v1 import admin_pb2, common_pb2

from tests.unit.client.fake_daemon import COMMIT, LEASE, progress, refuse, snapshot_path, until_over

STATUS_KEYS = {
    "budget_bytes",
    "used_bytes",
    "reserved_bytes",
    "partial_bytes",
    "trash_bytes",
    "quarantine_bytes",
    "filesystem_free_bytes",
    "models",
    "transfers",
    "min_free_bytes",
    "filesystem_total_bytes",
    "filesystem_inodes",
    "filesystem_free_inodes",
    "reserved_inodes",
    "min_free_inodes",
    "room_bytes",
    "pinned_models",
    "leased_models",
    "pinned_bytes",
    "leased_bytes",
    "leases",
    "hub_dir",
    "version",
    "degraded",
    "model_list",
}
LS_KEYS = {
    "repo_id",
    "commit",
    "revisions",
    "profiles",
    "size_bytes",
    "unique_bytes",
    "last_used",
    "pinned",
    "leases",
    "state",
}
VERBS = {
    "status": [],
    "ls": [],
    "pull": ["org/name"],
    "plan": ["org/name"],
    "evict": ["org/name", "--yes"],
    "pin": ["org/name"],
    "unpin": ["org/name"],
    "cancel": ["org/name"],
    "leases": [],
    "release": [LEASE],
    "show": ["org/name"],
    "events": [],
    "verify": ["--all"],
    "gc": ["--yes"],
    "config": [],
    "top": ["--count", "1"],
    "doctor": [],
    "import": ["/srv/model", "org/name"],
}


@pytest.mark.parametrize("arguments", [("--json", "status"), ("status", "--json")])
def test_status_json_has_exactly_the_keys_of_the_contract(full_daemon, cachectl, arguments):
    status, out, err = cachectl(*arguments)
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert set(told) == STATUS_KEYS
    assert (told["budget_bytes"], told["used_bytes"], told["models"]) == (500_000_000_000, 250_000_000_000, 3)
    assert told["transfers"] == [
        {
            "repo_id": "org/name",
            "commit": COMMIT,
            "bytes_total": 100,
            "bytes_done": 42,
            "bytes_per_second": 7_000_000,
            "eta_seconds": 90.0,
            "waiters": 8,
            "background": False,
            "detail": None,
        }
    ]


def test_status_is_a_few_lines(full_daemon, cachectl):
    status, out, _ = cachectl("status")
    assert status == 0
    assert "250.0 GB of 500.0 GB used (50 %)" in out
    assert "degraded  the hub is down" in out
    assert "42 B of 100 B (42 %), 7.0 MB/s, 1m 30s left, 8 waiting" in out
    assert "\x1b" not in out
    assert "[#" not in out


def test_status_has_a_line_for_each_listed_model_that_is_not_held(full_daemon, cachectl):
    _, out, _ = cachectl("status")
    lines = out.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith("list ")]
    assert lines[first : first + 6] == [
        "list      1 failing, 1 waiting, 1 fetching, 1 held, 1 unknown",
        "          org/big@main (vllm) failing: does not fit:  [2J",  # no terminal obeys it
        "          org/next@main (vllm) waiting",
        "          org/now@main (vllm) fetching",
        "          org/new@main (vllm) unknown",
        lines[first + 5],
    ]
    assert lines[first + 5].startswith("transfer ")
    told = json.loads(cachectl("status", "--json")[1])["model_list"]
    assert [row["state"] for row in told] == ["failing", "waiting", "fetching", "held", "unknown"]
    assert told[3] == {
        "repo_id": "org/there",
        "revision": "main",
        "profile": "vllm",
        "priority": -5,
        "state": "held",
        "detail": "",
    }
    del full_daemon.status.model_list[:]
    assert "list " not in cachectl("status")[1]


def test_ls_json_has_exactly_the_keys_of_the_contract_for_every_page(full_daemon, cachectl):
    status, out, _ = cachectl("ls", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [set(row) for row in rows] == [LS_KEYS] * 3
    assert [row["state"] for row in rows] == ["ready", "unverified", "condemned"]
    assert [row["last_used"] for row in rows] == ["2026-01-02T00:00:00Z", None, None]
    assert rows[0]["leases"] == ["lease-1", "lease-2"]


def test_ls_fits_80_columns_and_cuts_nothing(full_daemon, cachectl):
    status, out, _ = cachectl("ls")
    assert status == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert out.count("y") == 90
    assert "140.0 GB" in out
    assert "\x1b" not in out


def test_an_empty_list_is_no_prose_on_stdout(daemon, cachectl):
    assert cachectl("ls")[:2] == (0, "")
    assert json.loads(cachectl("ls", "--json")[1]) == []
    assert json.loads(cachectl("leases", "--json")[1]) == []


def test_leases_lists_every_page(full_daemon, cachectl):
    rows = json.loads(cachectl("leases", "--json")[1])
    assert [row["kind"] for row in rows] == ["pod", "stream", "ttl", "recovered"]
    assert [row["expires_at"] for row in rows] == [None, None, "2126-01-02T00:00:00Z", None]
    status, out, _ = cachectl("leases")
    assert status == 0
    assert "with its pod" in out
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize("arguments", [("leases",), ("show", "org/name")], ids=["leases", "show"])
def test_a_lease_can_be_copied_from_80_columns_and_nothing_of_it_is_cut(daemon, full_daemon, cachectl, arguments):
    lease = daemon.leases[2]
    lease.id, lease.holder = "0123456789abcdef" * 2, "x" * 90
    lease.models[0].repo_id = "org/" + "y" * 90
    daemon.detail.leases.append(lease)
    status, out, _ = cachectl(*arguments)
    assert status == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert [line.split()[0] for line in out.splitlines() if "0123" in line] == [lease.id]
    assert (out.count("x") >= 90, out.count("y") >= 90) == (True, True)


def test_pull_shows_progress_prints_the_path_and_gives_its_lease_back(daemon, cachectl):
    def on_ensure(request, _context):
        yield progress(done=1, total=2)
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    status, out, err = cachectl("pull", "org/one@v1", "org/two", "--profile", "full")
    assert status == 0
    assert out.splitlines() == [str(daemon.hub / snapshot_path(name)) for name in ("org/one", "org/two")]
    assert "org/one@v1: downloading" in err
    request = daemon.ensured.get_nowait()
    assert (request.model.revision, request.model.profile.name) == ("v1", "full")
    assert 0 < request.lease.ttl.seconds <= 300
    assert [daemon.released.get_nowait() for _ in range(2)] == [LEASE, LEASE]


def test_an_interrupted_pull_is_130_and_says_that_the_transfer_goes_on(daemon, programs):
    def on_ensure(_request, context):
        yield progress(done=1, total=2)
        until_over(context)

    daemon.on_ensure = on_ensure
    running = programs.start("modelcache.cachectl.main", "pull", "org/name")
    running.wait_for("downloading")
    running.process.send_signal(signal.SIGINT)
    status, out, err = running.end()
    assert (status, out) == (130, "")
    assert "goes on" in err
    assert "Traceback" not in err


def test_pull_json_is_one_list_even_when_a_later_one_fails(daemon, cachectl):
    def on_ensure(request, context):
        if request.model.repo_id == "org/two":
            refuse(context, Reason.GATED_REPO)
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    status, out, err = cachectl("pull", "org/one", "org/two", "--json")
    assert status == 77
    assert [row["repo_id"] for row in json.loads(out)] == ["org/one"]
    assert json.loads(err)["error"]["reason"] == "GATED_REPO"


def test_evict_shows_its_plan_and_refuses_without_a_terminal_or_yes(full_daemon, cachectl):
    status, out, err = cachectl("evict", "org/name@v1")
    assert (status, out) == (64, "")
    assert "5.0 kB" in err
    assert "--yes" in err
    assert [request.dry_run for request in full_daemon.asked] == [True]


def test_a_dry_run_removes_nothing(full_daemon, cachectl):
    status, out, _ = cachectl("evict", "org/name", "--dry-run")
    assert status == 0
    assert "5.0 kB" in out
    told = json.loads(cachectl("evict", "org/name", "--dry-run", "--json")[1])
    assert told == {
        "dry_run": True,
        "models": [{"repo_id": "org/name", "commit": COMMIT, "bytes_freed": 5000}],
        "bytes_freed": 5000,
        "bytes_short": 0,
    }
    assert [request.dry_run for request in full_daemon.asked] == [True, True]


@pytest.mark.parametrize("flags", [["--dry-run"], ["--yes"], ["--yes", "--json"]])
def test_what_cannot_be_freed_is_said_and_exits_75(full_daemon, cachectl, flags):
    full_daemon.evictable.bytes_short = 3 * 10**9
    status, out, err = cachectl("evict", "--until-free", "200GB", *flags)
    assert status == 75
    if "--json" in flags:
        assert json.loads(out)["bytes_short"] == 3 * 10**9
    else:
        assert "200.0 GB free cannot be had: 3.0 GB short" in " ".join((out + err).split())


@pytest.mark.parametrize(
    ("room", "free", "told"),
    [
        (200_000_000_000, 999_000_000_000, "200.0 GB without evicting"),
        (
            30_000_000_000,
            80_000_000_000,
            "30.0 GB without evicting; the limit is the disk's free space, not the budget",
        ),
        (-5_000_000_000, 999_000_000_000, "none, 5.0 GB over"),
    ],
)
def test_status_says_what_fits_and_whose_limit_that_is(full_daemon, cachectl, room, free, told):
    full_daemon.status.room_bytes, full_daemon.status.filesystem_free_bytes = room, free
    out = cachectl("status")[1]
    assert f"room      {told}\n" in out
    assert json.loads(cachectl("status", "--json")[1])["room_bytes"] == room


def test_status_of_an_older_daemon_says_nothing_of_room(full_daemon, cachectl):
    assert "room" not in cachectl("status")[1]
    assert json.loads(cachectl("status", "--json")[1])["room_bytes"] is None


def test_evict_with_yes_says_what_was_freed(full_daemon, cachectl):
    status, out, err = cachectl("evict", "org/name", "--yes")
    assert (status, out) == (0, f"org/name@{COMMIT}\n")
    assert "freed 5.0 kB" in err
    assert [request.dry_run for request in full_daemon.asked] == [True, False]
    assert json.loads(cachectl("evict", "org/name", "--yes", "--json")[1])["dry_run"] is False


@pytest.mark.parametrize(("answer", "status", "dry_runs"), [(b"y\n", 0, [True, False]), (b"n\n", 1, [True])])
def test_evict_asks_on_a_terminal(full_daemon, programs, answer, status, dry_runs):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "modelcache.cachectl.main", "evict", "org/name"],
        env=programs.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    programs.started.append(process)
    seen = b""
    while b"free 5.0 kB?" not in seen:
        seen += os.read(ours, 4096)
    os.write(ours, answer)
    assert process.wait(30) == status
    os.close(ours)
    os.close(theirs)
    assert [request.dry_run for request in full_daemon.asked] == dry_runs


@pytest.mark.parametrize(("listed", "told"), [(True, "still pinned by the model list"), (False, "no longer pinned")])
def test_unpin_says_whether_the_model_list_keeps_it(daemon, cachectl, listed, told):
    daemon.listed = listed
    assert cachectl("unpin", "org/name") == (0, "", f"org/name is {told}\n")
    assert json.loads(cachectl("unpin", "org/name", "--json")[1])["listed"] is listed


def test_pin_unpin_cancel_and_release_ask_for_what_they_are_told(full_daemon, cachectl):
    assert cachectl("pin", "org/name@v1")[0] == 0
    assert cachectl("unpin", "org/name")[0] == 0
    assert cachectl("cancel", f"org/name@{COMMIT}")[0] == 0
    status, out, _ = cachectl("release", "lease-1", "lease-2")
    assert (status, out) == (0, "lease-1\nlease-2\n")
    assert cachectl("release", "--recovered", "--json")[:2] == (0, '{\n  "lease_ids": [\n    "lease-7"\n  ]\n}\n')
    assert cachectl("release", "--model", "org/name")[0] == 0
    pin, unpin, cancel, by_id, recovered, by_model = full_daemon.asked
    assert (pin.model.repo_id, pin.model.revision) == ("org/name", "v1")
    assert (unpin.model.repo_id, unpin.model.revision) == ("org/name", "")
    assert (cancel.repo_id, cancel.commit) == ("org/name", COMMIT)
    assert list(by_id.lease_ids) == ["lease-1", "lease-2"]
    assert (recovered.recovered, by_model.repo_id) == (True, "org/name")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json_on_stdout_and_an_example(full_daemon, cachectl, verb):
    status, out, _ = cachectl(verb, *VERBS[verb], "--json")
    assert status == 0
    json.loads(out)
    assert f"Example: cachectl {verb}" in cachectl(verb, "--help")[1]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_one_line_and_its_exit_status(daemon, cachectl, reason):
    daemon.on_any = lambda context: refuse(context, reason)
    status, out, err = cachectl("pin", "org/name")
    assert (status, out) == (TABLE[reason].exit_status, "")
    assert err == f"cachectl: the message of the daemon; {TABLE[reason].mend}\n"


def test_json_errors_are_an_object_on_stderr(daemon, cachectl):
    daemon.on_any = lambda context: refuse(context, Reason.IN_USE)
    status, out, err = cachectl("evict", "org/name", "--yes", "--json")
    assert (status, out) == (75, "")
    assert json.loads(err) == {
        "error": {
            "reason": "IN_USE",
            "message": f"the message of the daemon; {TABLE[Reason.IN_USE].mend}",
            "exit_status": 75,
        }
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_daemon_that_is_down_is_one_clear_line(idle_daemon, cachectl, verb):
    status, out, err = cachectl(verb, *VERBS[verb])
    assert (status, out) == (69, "")
    assert err.count("\n") == 1
    assert err.startswith(f"cachectl: no daemon answers at {idle_daemon.address}: no socket there yet")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["evict"],
        ["pull", "org/name@"],
        ["pull", "org/name", "--profile", "full", "--include", "*"],
        ["release"],
        ["status", "--bogus"],
        ["verify"],
        ["verify", "org/name", "--all"],
        ["show"],
        ["gc", "--kind", "nothing"],
        ["events", "--since", "yesterday"],
        ["evict", "org/name", "--all-unpinned"],
        ["evict", "--until-free", "200"],
        ["ls", "--sort", "colour"],
        ["top", "--count", "0"],
        ["status", "--address", "nowhere"],
    ],
)
def test_usage_errors_are_64(cachectl, arguments):
    status, out, err = cachectl(*arguments)
    assert (status, out) == (64, "")
    assert err
    assert ".;" not in err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("pull", "import")])
def test_every_verb_fits_80_columns_and_has_no_colour_in_a_pipe(full_daemon, cachectl, verb):
    status, out, err = cachectl(verb, *VERBS[verb])
    assert status == 0
    assert "\x1b" not in out + err
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert [line for line in cachectl(verb, "--help")[1].splitlines() if len(line) > 80] == []


def test_names_from_upstream_cannot_move_the_cursor_or_change_colours(daemon, cachectl):
    daemon.cached = [common_pb2.Model(repo_id="\x1b[2Jorg/[red]name", commit=COMMIT, state=1)]
    _, out, _ = cachectl("ls")
    assert "\x1b" not in out
    assert "[red]" in out


def planned(fit, **more):
    return admin_pb2.PlanModelsResponse(
        models=[
            admin_pb2.PlannedModel(
                repo_id="org/name",
                revision="main",
                commit=COMMIT,
                profile="vllm",
                format="safetensors",
                bytes_total=8_000_000_000,
                bytes_to_fetch=5_000_000_000,
            )
        ],
        fit=fit,
        bytes_needed=5_100_000_000,
        bytes_room=-2,
        **more,
    )


@pytest.mark.parametrize(
    ("fit", "status", "said"),
    [
        (admin_pb2.FIT_CACHED, 0, "all of it is cached"),
        (admin_pb2.FIT_NOW, 0, "fits: needs 5.1 GB, there is room for 0 B"),
        (admin_pb2.FIT_AFTER_EVICTION, 0, "fits once these have gone"),
        (admin_pb2.FIT_NOT_NOW, 75, "does not fit, not now: because"),
        (admin_pb2.FIT_NEVER, 73, "does not fit, never: because"),
    ],
)
def test_a_plan_says_whether_it_fits_and_in_its_exit_status_too(daemon, cachectl, fit, status, said):
    gone = admin_pb2.EvictedModel(repo_id="org/old", commit=COMMIT, bytes_freed=7_000_000_000)
    daemon.planned = planned(fit, reason="because", evicts=[gone] if fit == admin_pb2.FIT_AFTER_EVICTION else [])
    got, out, err = cachectl("plan", "org/name", "org/lora@v2", "--profile", "full")
    assert (got, err) == (status, "")
    assert said in out
    assert "5.0 GB" in out
    assert ("org/old" in out) == (fit == admin_pb2.FIT_AFTER_EVICTION)
    (asked,) = daemon.asked
    assert [(m.repo_id, m.revision, m.profile.name) for m in asked.models] == [
        ("org/name", "", "full"),
        ("org/lora", "v2", "full"),
    ]


def test_a_plan_as_json(daemon, cachectl):
    daemon.planned = planned(admin_pb2.FIT_NOT_NOW, reason="because")
    status, out, _ = cachectl("plan", "org/name", "--json")
    told = json.loads(out)
    assert (status, told["fit"], told["reason"], told["bytes_needed"], told["bytes_room"], told["evicts"]) == (
        75,
        "not_now",
        "because",
        5_100_000_000,
        -2,
        [],
    )
    assert told["models"][0]["bytes_to_fetch"] == 5_000_000_000


def test_every_verb_is_tried_here():
    """But export, which copies files of a real cache: tests/integration/test_operators.py."""
    assert set(cli.list_commands(None)) - {"export"} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_daemon_that_does_not_answer_can_be_left(full_daemon, programs, verb):
    asked = threading.Event()

    def never(context):
        asked.set()
        until_over(context)

    full_daemon.on_any = never
    running = programs.start("modelcache.cachectl.main", verb, *VERBS[verb])
    assert asked.wait(30)
    running.process.send_signal(signal.SIGINT)
    status, out, err = running.end()
    assert (status, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["pull", "verify", "import", "doctor"])
def test_an_interrupt_that_comes_while_a_call_begins_ends_it(full_daemon, programs, tmp_path, verb):
    """Of the verbs that follow a stream: gRPC's close waits for one that is sent and that no thread of it reads yet."""
    (tmp_path / "sitecustomize.py").write_text(
        "import grpc._channel\n"
        "def interrupted(state):\n"
        "    raise KeyboardInterrupt\n"
        "grpc._channel._run_channel_spin_thread = interrupted\n"
    )
    full_daemon.on_any = until_over
    status, out, err = programs.run("modelcache.cachectl.main", verb, *VERBS[verb], PYTHONPATH=str(tmp_path))
    assert (status, out) == (130, "")
    assert "Traceback" not in err


def test_a_daemon_that_is_too_slow_is_told_from_one_that_is_down(daemon):
    daemon.on_any = until_over
    with Admin(daemon.address) as admin, pytest.raises(ModelCacheError) as caught:
        answer(admin._stub.GetStatus, admin_pb2.GetStatusRequest(), 0.2)
    assert (caught.value.label, caught.value.exit_status) == ("DEADLINE_EXCEEDED", 75)
    assert "give it more time" in caught.value.text

"""ensure-model outlasts a daemon that is not there yet, goes away, or is full for now."""

from __future__ import annotations

import signal
import socket
import threading
from datetime import timedelta

import pytest
from modelcache.connection import explain_unreachable
from modelcache.reasons import Reason

from tests.unit.client.fake_daemon import progress, refuse, snapshot_path, until_over


def test_a_daemon_that_comes_up_later_is_waited_for(idle_daemon, start_ensure_model):
    running = start_ensure_model("org/name")
    line = running.wait_for("waiting for the daemon")
    assert idle_daemon.address in line
    assert "no socket there yet" in line
    idle_daemon.start()
    status, out, _ = running.end()
    assert (status, out) == (0, f"{idle_daemon.hub / snapshot_path('org/name')}\n")


def test_an_address_whose_directory_is_missing_says_so_and_waits(ensure_model, tmp_path):
    status, _, err = ensure_model("org/name", "--address", f"unix://{tmp_path}/absent/c.sock", "--timeout", "300ms")
    assert status == 75
    assert f"its directory {tmp_path}/absent does not exist" in err
    assert "timed out" in err


def test_a_host_that_does_not_answer_is_told_of_in_words_of_our_own(start_ensure_model, cachectl):
    with socket.socket() as taken:  # and not listening: nobody else can
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = start_ensure_model("org/name", "--address", address).wait_for("waiting for the daemon")
        _, _, err = cachectl("status", "--address", address)
    assert line.startswith(f"ensure-model: waiting for the daemon at {address} (nobody listens there")
    assert err.startswith(f"cachectl: no daemon answers at {address}: nobody listens there")
    assert "failed to connect" not in line + err


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("errors resolving node-7:50: [field:hostname lookup error: ...]", "its name is not known here"),
        ("DNS resolution failed for node-7:50: C-ares status is not ARES_SUCCESS", "its name is not known here"),
        ("failed to connect to all addresses; last error: UNKNOWN: Network is unreachable", "no network leads there"),
        ("something new", "it does not answer"),
    ],
)
def test_what_grpc_says_of_a_host_is_said_shorter(told, why):
    assert explain_unreachable("node-7:50", told) == why


def test_a_socket_behind_which_the_connection_breaks_is_told_of_in_words_of_our_own(start_ensure_model, short_tmp):
    path = short_tmp / "broken.sock"
    with socket.socket(socket.AF_UNIX) as broken:
        broken.bind(str(path))
        broken.listen()
        running = start_ensure_model("org/name", "--address", f"unix://{path}")
        broken.accept()[0].close()
        line = running.wait_for("waiting for the daemon")
    assert "somebody listens there, but the connection broke" in line


def test_a_restart_in_the_middle_is_survived_under_one_request_id(daemon, start_ensure_model):
    def on_ensure(_request, context):
        yield progress(done=1, total=2)
        until_over(context)

    daemon.on_ensure = on_ensure
    running = start_ensure_model("org/name")
    running.wait_for("downloading")
    daemon.stop()
    running.wait_for("waiting for the daemon")
    daemon.on_ensure = None
    daemon.start()
    status, out, _ = running.end()
    assert (status, out) == (0, f"{daemon.hub / snapshot_path('org/name')}\n")
    assert daemon.ensured.get_nowait().request_id == daemon.ensured.get_nowait().request_id != ""


def test_a_daemon_that_says_it_shuts_down_is_asked_again(daemon, ensure_model):
    def on_ensure(request, context):
        if daemon.ensured.qsize() == 1:
            refuse(context, Reason.SHUTTING_DOWN, "draining")
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    status, _, err = ensure_model("org/name")
    assert status == 0
    assert "draining" in err


@pytest.mark.parametrize(
    "reason", [Reason.OVERLOADED, Reason.RATE_LIMITED, Reason.NO_SPACE_NOW, Reason.UPSTREAM_STALLED]
)
def test_retry_comes_again_after_the_delay_that_the_daemon_names(daemon, ensure_model, reason):
    def on_ensure(request, context):
        if daemon.ensured.qsize() == 1:
            refuse(context, reason, delay=timedelta(milliseconds=150))
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    assert ensure_model("org/name", "--retry")[0] == 0
    assert daemon.ensured.qsize() == 2


def test_retry_ends_with_the_timeout(daemon, ensure_model):
    def on_ensure(_request, context):
        yield progress()
        refuse(context, Reason.NO_SPACE_NOW, "full", delay=timedelta(hours=1))

    daemon.on_ensure = on_ensure
    status, _, err = ensure_model("org/name", "--retry", "--timeout", "500ms")
    assert status == 75
    assert "full" in err.splitlines()[-1]


def test_retry_does_not_touch_what_cannot_change(daemon, ensure_model):
    def on_ensure(_request, context):
        yield progress()
        refuse(context, Reason.OVER_BUDGET)

    daemon.on_ensure = on_ensure
    assert ensure_model("org/name", "--retry")[0] == 73
    assert daemon.ensured.qsize() == 1


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("there", [True, False])
def test_signals_end_the_wait_at_once_and_without_a_traceback(
    idle_daemon, start_ensure_model, termination_log, signum, expected, there
):
    def on_ensure(_request, context):
        context.add_callback(told.set)  # what comes after the yield may never run once the client has gone
        yield progress()
        until_over(context)

    told = threading.Event()
    idle_daemon.on_ensure = on_ensure
    if there:
        idle_daemon.start()
    running = start_ensure_model("org/name")
    running.wait_for("downloading" if there else "waiting for the daemon")
    running.process.send_signal(signum)
    status, out, err = running.end()
    assert (status, out) == (expected, "")
    assert "Traceback" not in err
    assert not termination_log.exists()
    assert not there or told.wait(10)  # the daemon knows at once that nobody waits any more


def test_progress_off_a_terminal_is_a_line_a_change_of_phase(daemon, ensure_model):
    def on_ensure(request, _context):
        for done in range(50):
            yield progress(phase=4, done=done, total=50)
        yield progress(phase=5, done=50, total=50)
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    _, _, err = ensure_model("org/name")
    assert "\r" not in err
    assert [line.split()[1] for line in err.splitlines()] == ["downloading", "verifying", "org/name"]

"""ensure-model outlasts a daemon that is not there yet, goes away, or is full for now."""

from __future__ import annotations

import signal
import threading
from datetime import timedelta

import pytest
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

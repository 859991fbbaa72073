"""ensure-model --hold: a lease that lives as long as the keeper, or as a command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from modelcache.reasons import Reason
from modelcache.v1 import cache_pb2, common_pb2

from tests.unit.client.fake_daemon import COMMIT, LEASE, refuse, snapshot_path, until_over

WAIT = 20
"""Seconds that an event may take before the test fails."""

# Says that it runs, and then does what signals tell it.
CHILD = """
import os, signal, sys
def tell(n, _f):
    os.write(2, f"{signal.Signals(n).name}\\n".encode())  # print() is not to be interrupted by itself
def end(n, _f):
    tell(n, _f)
    sys.exit(7)
for name in ("INT", "HUP", "QUIT", "USR1", "USR2"):
    signal.signal(getattr(signal, f"SIG{name}"), tell)
signal.signal(signal.SIGTERM, end)
os.write(2, b"child runs\\n")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_keeper_holds_until_a_signal_and_then_releases(daemon, start_ensure_model, tmp_path, signum):
    ready_file = tmp_path / "ready"
    running = start_ensure_model("org/name", "--hold", "--ready-file", str(ready_file))
    assert daemon.held.get(timeout=WAIT) == LEASE
    assert daemon.ensured.get_nowait().lease.stream is True
    assert ready_file.read_text() == f"{daemon.hub / snapshot_path('org/name')}\n"
    running.process.send_signal(signum)
    status, out, _ = running.end()
    assert (status, out) == (0, f"{daemon.hub / snapshot_path('org/name')}\n")
    assert daemon.released.get(timeout=WAIT) == LEASE
    assert not ready_file.exists()


def test_a_keeper_holds_the_same_lease_again_after_a_restart(daemon, start_ensure_model):
    running = start_ensure_model("org/name", "--hold")
    assert daemon.held.get(timeout=WAIT) == LEASE
    daemon.stop()
    line = running.wait_for("is not held")
    assert f"the daemon at {daemon.address} is not reachable: " in line
    daemon.start()
    running.wait_for("is held again")
    assert daemon.held.get(timeout=WAIT) == LEASE
    assert daemon.ensured.qsize() == 1
    running.process.terminate()
    assert running.end()[0] == 0


def test_a_keeper_whose_lease_is_gone_gets_a_new_one_for_the_same_commit(daemon, start_ensure_model):
    def on_hold(request, context):
        if request.lease_id == LEASE:
            daemon.lease = common_pb2.Lease(id="lease-2", kind=common_pb2.LEASE_KIND_STREAM)
            refuse(context, Reason.LEASE_NOT_FOUND)
        yield cache_pb2.HoldModelResponse()
        until_over(context)

    daemon.on_hold = on_hold
    running = start_ensure_model("org/name", "org/lora", "--hold", "--revision", "main")
    running.wait_for("held again")
    assert [daemon.held.get(timeout=WAIT) for _ in range(2)] == [LEASE, "lease-2"]
    assert daemon.ensured.get_nowait().model.revision == "main"
    # The workload has these files open, wherever the branch points by now.
    again = daemon.ensured.get_nowait()
    assert (again.model.revision, again.adapters[0].revision) == (COMMIT, COMMIT)
    running.process.terminate()
    assert running.end()[0] == 0
    assert daemon.released.get(timeout=WAIT) == "lease-2"


def test_a_keeper_ends_at_once_while_there_is_no_daemon(daemon, start_ensure_model):
    running = start_ensure_model("org/name", "--hold")
    daemon.held.get(timeout=WAIT)
    daemon.stop()
    running.wait_for("is not held")
    running.process.terminate()
    status, _, err = running.end()
    assert status == 0
    (last,) = (line for line in err.splitlines() if "not released" in line)
    assert f"the daemon at {daemon.address} is not reachable: " in last


def test_a_keeper_stays_when_the_daemon_refuses_to_hold(daemon, start_ensure_model):
    def on_hold(_request, context):
        refuse(context, Reason.INVALID_REQUEST, "not today")
        yield

    daemon.on_hold = on_hold
    running = start_ensure_model("org/name", "--hold")
    running.wait_for("not today")
    assert running.process.poll() is None
    running.process.terminate()
    assert running.end()[0] == 0


def forgetting_daemon(daemon):
    """Every hold finds its lease gone; asking again gets no answer until the caller goes."""

    def on_hold(_request, context):
        daemon.on_ensure = lambda _request, context: iter(until_over(context) or ())
        refuse(context, Reason.LEASE_NOT_FOUND)
        yield

    daemon.on_hold = on_hold
    return daemon


def test_a_keeper_ends_well_while_it_waits_for_a_new_lease(daemon, start_ensure_model):
    forgetting_daemon(daemon)
    running = start_ensure_model("org/name", "--hold")
    for _ in range(2):
        daemon.ensured.get(timeout=WAIT)
    running.process.terminate()
    assert running.end()[0] == 0


def test_a_command_that_ends_while_a_new_lease_is_waited_for_ends_us(daemon, start_ensure_model):
    forgetting_daemon(daemon)
    running = start_ensure_model("org/name", "--hold", "--", sys.executable, "-c", CHILD)
    running.wait_for("child runs")
    for _ in range(2):
        daemon.ensured.get(timeout=WAIT)
    running.process.terminate()
    assert running.end()[0] == 7


@pytest.mark.parametrize(("script", "expected"), [("exit 0", 0), ("exit 41", 41), ("kill -9 $$", 137)])
def test_a_commands_status_is_ours_and_its_lease_ends_with_it(daemon, ensure_model, termination_log, script, expected):
    status, _, _ = ensure_model("org/name", "--hold", "--", "sh", "-c", script)
    assert status == expected
    assert daemon.released.get(timeout=WAIT) == LEASE
    assert not termination_log.exists()  # its last word is its own


def test_stdout_is_the_commands_and_it_knows_the_path(daemon, ensure_model):
    _, out, _ = ensure_model(
        "org/name", "--hold", "--", "sh", "-c", 'echo "$MODELCACHE_PATH $0 $GRPC_VERBOSITY"', "--json"
    )
    assert out == f"{daemon.hub / snapshot_path('org/name')} --json \n"


def test_json_is_printed_before_the_command_when_asked_for(daemon, ensure_model):
    _, out, _ = ensure_model("org/name", "--json", "--hold", "--", "echo", "done")
    first, second = out.splitlines()
    assert json.loads(first)["lease_kind"] == "stream"
    assert second == "done"


def test_signals_go_to_the_command(daemon, start_ensure_model):
    running = start_ensure_model("org/name", "--hold", "--", sys.executable, "-c", CHILD)
    running.wait_for("child runs")
    for name in ("SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTERM"):
        running.process.send_signal(getattr(signal, name))
        running.wait_for(name)
    assert running.end()[0] == 7
    assert daemon.released.get(timeout=WAIT) == LEASE


def test_a_command_runs_on_through_a_restart_of_the_daemon(daemon, start_ensure_model):
    running = start_ensure_model("org/name", "--hold", "--", sys.executable, "-c", CHILD)
    running.wait_for("child runs")
    assert daemon.held.get(timeout=WAIT) == LEASE
    daemon.stop()
    running.wait_for("is not held")
    daemon.start()
    running.wait_for("is held again")
    running.process.terminate()
    assert running.end()[0] == 7


def test_a_command_that_ends_while_there_is_no_daemon_ends_us(daemon, start_ensure_model):
    running = start_ensure_model("org/name", "--hold", "--", sys.executable, "-c", CHILD)
    running.wait_for("child runs")
    daemon.held.get(timeout=WAIT)
    daemon.stop()
    running.wait_for("is not held")
    running.process.terminate()
    assert running.end()[0] == 7


@pytest.mark.parametrize(("mode", "expected"), [(None, 127), (0o644, 126)])
def test_a_command_that_cannot_run_is_127_or_126(daemon, ensure_model, tmp_path, mode, expected):
    command = tmp_path / "command"
    if mode is not None:
        command.write_text("#!/bin/sh\n")
        command.chmod(mode)
    status, _, err = ensure_model("org/name", "--hold", "--", str(command))
    assert status == expected
    assert str(command) in err
    assert daemon.released.get(timeout=WAIT) == LEASE


# Leaves an orphan behind and waits until somebody has reaped it.
ORPHANING = """
import os, sys, time
read, write = os.pipe()
middle = os.fork()
if middle == 0:
    orphan = os.fork()
    if orphan == 0:
        os._exit(0)
    os.write(write, str(orphan).encode())
    os._exit(0)
os.waitpid(middle, 0)
orphan = int(os.read(read, 20))
give_up = time.monotonic() + 10
while os.path.exists(f"/proc/{orphan}"):
    if time.monotonic() > give_up:
        sys.exit(9)
    time.sleep(0.01)
"""


def test_orphans_are_reaped_when_they_come_to_us(daemon, programs):
    # Orphans go to PID 1, and to a subreaper as well: prctl(2), PR_SET_CHILD_SUBREAPER = 36.
    arguments = ["ensure-model", "org/name", "--hold", "--", sys.executable, "-c", ORPHANING]
    code = (
        f"import ctypes, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); sys.argv = {arguments!r}; "
        "from modelcache.ensure import main; sys.exit(main())"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=programs.environ, check=False, timeout=60)
    assert ended.returncode == 0

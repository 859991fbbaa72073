"""What ensure-model says on stderr, and how often."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from modelcache.report import LINE_EVERY_SECONDS, SILENCE_SECONDS, Reporter
from modelcache.v1 import cache_pb2

from tests.unit.client.fake_daemon import progress, snapshot_path


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def reporter(clock):
    return Reporter(clock=clock, secret="hf_secret")


def downloading(done):
    return cache_pb2.Progress(phase=cache_pb2.PHASE_DOWNLOADING, bytes_done=done, bytes_total=100)


def test_a_line_comes_at_a_change_of_phase_and_every_five_seconds(reporter, clock, capfd):
    for second in range(11):
        reporter.progress(downloading(second))
        clock.now += 1
    reporter.progress(cache_pb2.Progress(phase=cache_pb2.PHASE_VERIFYING))
    lines = capfd.readouterr().err.splitlines()
    assert [line.removeprefix("ensure-model: ") for line in lines] == [
        "downloading 0 B of 100 B (0 %)",
        "downloading 5 B of 100 B (5 %)",
        "downloading 10 B of 100 B (10 %)",
        "verifying",
    ]


def test_a_silent_daemon_is_mentioned(reporter, clock, capfd):
    reporter._tick(0, None)
    clock.now += LINE_EVERY_SECONDS
    reporter._tick(0, None)
    reporter.progress(downloading(1))
    clock.now += SILENCE_SECONDS
    reporter._tick(0, None)
    first, _, last = capfd.readouterr().err.splitlines()
    assert first == "ensure-model: waiting for an answer from the daemon"
    assert last.endswith("no word from the daemon for 15s")


def test_a_wait_is_said_when_it_is_new_and_every_five_seconds(reporter, clock, capfd):
    for _ in range(60):
        reporter.waiting("the daemon at x")
        clock.now += 0.1
    reporter.waiting("the daemon at x, which is back")
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["ensure-model: waiting for the daemon at x"] * 2 + [
        "ensure-model: waiting for the daemon at x, which is back"
    ]


def test_after_a_minute_of_the_same_a_line_comes_every_thirty_seconds(reporter, clock, capfd):
    said_at = []
    for second in range(181):
        reporter.progress(downloading(second))
        if capfd.readouterr().err:
            said_at.append(second)
        clock.now += 1
    assert said_at == [*range(0, 60, 5), 85, 115, 145, 175]
    reporter.progress(cache_pb2.Progress(phase=cache_pb2.PHASE_VERIFYING))
    clock.now += LINE_EVERY_SECONDS
    reporter._tick(0, None)
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_quiet_leaves_warnings(clock, capfd):
    reporter = Reporter(quiet=True, clock=clock)
    reporter.say("a")
    reporter.progress(downloading(1))
    reporter.waiting("b")
    reporter.warn("c")
    reporter.fail("d")
    assert capfd.readouterr().err == "ensure-model: warning: c\nensure-model: d\n"


def test_the_secret_is_in_no_line(reporter, capfd):
    reporter.warn("it was hf_secret")
    reporter.progress(cache_pb2.Progress(phase=2, detail="hf_secret"))
    assert "hf_secret" not in capfd.readouterr().err


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(daemon, programs):
    def on_ensure(request, _context):
        yield progress(done=1, total=2)
        yield daemon.ready(request)

    daemon.on_ensure = on_ensure
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "modelcache.ensure", "org/name"],
        env=programs.environ,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    programs.started.append(process)
    out, _ = process.communicate(timeout=30)
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "\r\x1b[Kdownloading [###" in seen
    assert seen.endswith("fetched\r\n")
    assert out.decode() == f"{daemon.hub / snapshot_path('org/name')}\n"

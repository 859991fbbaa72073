"""The real programs, run as processes against a fake daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.unit.client.fake_daemon import FakeDaemon


@dataclass
class Running:
    """A program under way. Waits end with pytest's own timeout."""

    process: subprocess.Popen[str]
    seen: list[str] = field(default_factory=list)

    def wait_for(self, words: str) -> str:
        """Reads stderr until a line has these words in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.seen.append(line)
            if words in line:
                return line
        raise AssertionError(f"stderr ended without {words!r}: {self.seen}")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, "".join(self.seen) + err


@dataclass
class Programs:
    """Starts ensure-model and cachectl with an environment that is the test's alone."""

    environ: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, module: str, *arguments: str, **environ: str) -> Running:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return Running(process)

    def run(self, module: str, *arguments: str, **environ: str) -> tuple[int, str, str]:
        return self.start(module, *arguments, **environ).end()


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory whose name leaves room in the 107 bytes of a socket path."""
    path = Path(tempfile.mkdtemp(prefix="mc-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def idle_daemon(short_tmp: Path) -> Iterator[FakeDaemon]:
    """A daemon that a test starts when it wants to."""
    daemon = FakeDaemon(socket=short_tmp / "c.sock", hub=short_tmp / "hub")
    daemon.hub.mkdir()
    yield daemon
    daemon.stop()


@pytest.fixture
def daemon(idle_daemon: FakeDaemon) -> FakeDaemon:
    idle_daemon.start()
    return idle_daemon


@pytest.fixture
def termination_log(tmp_path: Path) -> Path:
    return tmp_path / "termination.log"


@pytest.fixture
def programs(idle_daemon: FakeDaemon, termination_log: Path) -> Iterator[Programs]:
    environ = {
        "PATH": os.environ["PATH"],
        "MODELCACHE_ADDRESS": idle_daemon.address,
        "MODELCACHE_ADMIN_ADDRESS": idle_daemon.address,
        "MODELCACHE_TERMINATION_LOG": str(termination_log),
        "MODELCACHE_TRACEBACK": "1",  # a fault of the client itself is to be seen, not turned into status 70
    }
    programs = Programs(environ)
    yield programs
    for process in programs.started:
        # With the commands that it runs: they have our pipes, too, and would be waited for without end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def ensure_model(programs: Programs) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments, **environ: programs.run("modelcache.ensure", *arguments, **environ)


@pytest.fixture
def start_ensure_model(programs: Programs) -> Callable[..., Running]:
    return lambda *arguments, **environ: programs.start("modelcache.ensure", *arguments, **environ)


@pytest.fixture
def cachectl(programs: Programs) -> Callable[..., tuple[int, str, str]]:
    return lambda *arguments, **environ: programs.run("modelcache.cachectl.main", *arguments, **environ)

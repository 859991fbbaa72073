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
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from modelcache.v1 import admin_pb2, common_pb2

from tests.unit.client.fake_daemon import COMMIT, FakeDaemon


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


@pytest.fixture
def full_daemon(daemon):
    """One with something to say to every verb."""
    used = common_pb2.Model(
        repo_id="meta-llama/Llama-3.1-70B-Instruct",
        commit=COMMIT,
        revisions=["main", "v1"],
        profiles=["vllm"],
        size_bytes=140_000_000_000,
        unique_bytes=1_000,
        pinned=True,
        lease_ids=["lease-1", "lease-2"],
        state=common_pb2.MODEL_STATE_READY,
    )
    used.last_used.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    daemon.cached = [
        used,
        common_pb2.Model(repo_id="gpt2", commit="b" * 40, state=common_pb2.MODEL_STATE_UNVERIFIED),
        common_pb2.Model(repo_id="x" * 90 + "/" + "y" * 90, commit="c" * 40, state=common_pb2.MODEL_STATE_CONDEMNED),
    ]
    daemon.status = admin_pb2.CacheStatus(
        budget_bytes=500_000_000_000,
        used_bytes=250_000_000_000,
        reserved_bytes=50_000_000_000,
        models=3,
        leases=2,
        hub_dir="/var/lib/llm-models/hub",
        version="0.1.0",
        degraded=["the hub is down"],
        transfers=[
            admin_pb2.Transfer(
                repo_id="org/name",
                commit=COMMIT,
                bytes_total=100,
                bytes_done=42,
                bytes_per_second=7_000_000,
                eta=Duration(seconds=90),
                waiters=8,
            )
        ],
        model_list=[
            admin_pb2.ListedModel(
                repo_id=f"org/{name}", revision="main", profile="vllm", priority=priority, state=state, detail=detail
            )
            for name, priority, state, detail in (
                ("big", 5, admin_pb2.LISTED_STATE_FAILING, "does not fit: \x1b[2J"),
                ("next", 0, admin_pb2.LISTED_STATE_WAITING, ""),
                ("now", 0, admin_pb2.LISTED_STATE_FETCHING, ""),
                ("there", -5, admin_pb2.LISTED_STATE_HELD, ""),
                ("new", -5, 99, ""),
            )
        ],
    )
    daemon.leases = [
        common_pb2.Lease(
            id=f"lease-{number}",
            kind=kind,
            holder="pod x",
            models=[common_pb2.LeasedModel(repo_id="org/name", commit=COMMIT, revision="main")],
        )
        for number, kind in enumerate((1, 2, 3, 4))
    ]
    daemon.leases[2].expires_at.FromDatetime(datetime(2126, 1, 2, tzinfo=UTC))
    daemon.detail = admin_pb2.DescribeModelResponse(
        model=used,
        files=[
            admin_pb2.ModelFile(path="\x1b[2Jconfig.json", size_bytes=600, digest="git-sha1:" + "1" * 40),
            admin_pb2.ModelFile(
                path="deep/" + "w" * 70 + ".safetensors",
                size_bytes=5_000_000_000,
                digest="sha256:" + "2" * 64,
                cached=True,
                verified=True,
                shared_with=[f"org/other@{COMMIT}"],
            ),
        ],
        selections=[admin_pb2.ModelSelection(profile="vllm", format="safetensors", paths=["a", "b"])],
        leases=[common_pb2.Lease(id="lease-1", kind=1, holder="pod x")],
        pins=[admin_pb2.ModelPin(revision="main", listed=True)],
        kept_by=["pinned as main of the model list"],
    )
    daemon.detail.files[1].verified_at.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    daemon.events = [
        admin_pb2.Event(id=number, kind=kind, model=f"org/name@{COMMIT}", reason="space", bytes=5_000, holder="pod x")
        for number, kind in ((9, admin_pb2.EVENT_KIND_EVICTED), (8, admin_pb2.EVENT_KIND_FETCHED), (7, 99))
    ]
    for event in daemon.events:
        event.at.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
        event.duration.FromSeconds(90)
    daemon.read = admin_pb2.VerifyDone(models=1, files=2, bytes=5_000)
    daemon.garbage = admin_pb2.CollectGarbageResponse(
        items=[
            admin_pb2.Garbage(kind=admin_pb2.GARBAGE_KIND_PARTIAL, name="3" * 64, bytes=1_000, in_use=True),
            admin_pb2.Garbage(kind=admin_pb2.GARBAGE_KIND_ORPHAN, name="4" * 64, bytes=5_000, repo_id="org/name"),
        ],
        bytes_freed=5_000,
    )
    daemon.config = admin_pb2.GetConfigResponse(
        config_file="/etc/modelcached/config.toml",
        settings=[
            admin_pb2.Setting(name="cache.budget", value='"500GB"', default_value='"80%"', reloadable=True),
            admin_pb2.Setting(name="transfer.models", value="4", default_value="4"),
        ],
    )
    daemon.evictable = admin_pb2.EvictModelsResponse(
        models=[admin_pb2.EvictedModel(repo_id="org/name", commit=COMMIT, bytes_freed=5_000)], bytes_freed=5_000
    )
    return daemon

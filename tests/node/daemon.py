"""One daemon process with its own directories, and the clients that talk to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from modelcache.admin import Admin
from modelcache.client import Client, reference
from prometheus_client.parser import text_string_to_metric_families

BIN = Path(sys.executable).parent
START_SECONDS = 20


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """Starts, kills and restarts a daemon over the same directories.

    ``settings`` are ``{"section": {"key": value}}`` in TOML's types; sizes and durations are strings.
    Directories lie below ``root``: cache/ (unless ``settings`` say where), run/, pods/.
    """

    def __init__(self, root: Path, endpoint: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.root = root
        self.pods_dir = root / "pods"
        self.pods_dir.mkdir(parents=True, exist_ok=True)
        self.cache_socket = root / "run" / "cache" / "cache.sock"
        self.admin_socket = root / "run" / "admin" / "admin.sock"
        self.config_file = root / "config.toml"
        self.log_file = root / "daemon.log"
        self.settings: dict[str, dict[str, Any]] = {
            "cache": {"dir": str(root / "cache"), "budget": "2GB", "min_free": "1MB", "high_watermark": "100%"},
            "hub": {"endpoints": [endpoint], "timeout": "5s"},
            "server": {"cache_socket": str(self.cache_socket), "admin_socket": str(self.admin_socket)},
            "metrics": {"address": "127.0.0.1:0"},
            "leases": {"kubelet_pods_dir": str(self.pods_dir)},
            "transfer": {"stall_timeout": "2s", "retry_timeout": "6s"},
            "log": {"format": "json", "level": "debug"},
        }
        for section, values in (settings or {}).items():
            self.settings.setdefault(section, {}).update(values)
        self.move_to(Path(self.settings["cache"]["dir"]))
        self.process: subprocess.Popen[bytes] | None = None
        self._log_begins = 0  # of this process
        self.environment: dict[str, str] = {}
        """Added to the daemon's environment at its next start."""
        self._clients: list[subprocess.Popen[str]] = []
        self.wrapper: list[str] = []
        """Put before the daemon's command at its next start (strace, unshare ...)."""
        self.program: list[str] = [str(BIN / "modelcached")]
        """The daemon's command, without its arguments; see ``announcing``."""

    def move_to(self, cache_dir: Path) -> None:
        """The cache directory from the next start on."""
        self.settings["cache"]["dir"] = str(cache_dir)
        self.cache_dir = cache_dir
        self.hub_dir = self.cache_dir / "hub"
        self.private = self.cache_dir / "modelcached"

    # The daemon

    def write_config(self, *, in_one_step: bool = False) -> None:
        """The settings as a TOML file; ``in_one_step`` as most editors do, so that nobody ever reads half of it."""
        lines = []
        for section, values in self.settings.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        written = self.config_file.with_suffix(".new") if in_one_step else self.config_file
        written.write_text("\n".join(lines) + "\n")
        if in_one_step:
            written.replace(self.config_file)

    def start(self, *, wait: bool = True) -> Node:
        """Starts the daemon; returns when it serves."""
        self.write_config()
        log = self.log_file.open("ab")
        self._log_begins = log.tell()
        self.process = subprocess.Popen(
            [*self.wrapper, *self.program, "--config", str(self.config_file)],
            stderr=log,
            stdout=log,
            env={**os.environ, **self.environment},
        )
        log.close()
        if wait:
            self.wait_until(self._serves, START_SECONDS, "the daemon serves")
        return self

    def _serves(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log_text()[-4000:]}")
        try:
            self.status(timeout=1)
        except Exception:  # noqa: BLE001 - not yet
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, and nothing of it is left."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 20) -> int:
        """SIGTERM; its exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout)

    def stop(self) -> None:
        """However it is, it ends, and its clients with it."""
        for client in self._clients:
            if client.poll() is None:
                client.kill()
                client.communicate()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def ps(self) -> psutil.Process:
        """The daemon's process."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    # What it says

    def log_text(self) -> str:
        """All that it has logged since the node was made."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log_lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Its log lines, of one event where given."""
        lines = []
        for line in self.log_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if event is None or entry.get("event") == event:
                lines.append(entry)
        return lines

    def wait_until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Until it is so; AssertionError that says what was waited for."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {what}\n{self.log_text()[-4000:]}")
            time.sleep(0.02)

    @property
    def metrics_port(self) -> int:
        """The kernel's choice at this start: one that was free a moment ago may have been taken by a neighbour."""
        ports: list[int] = []

        def told() -> bool:
            own = self.log_file.read_bytes()[self._log_begins :].decode(errors="replace")
            ports[:] = [json.loads(line)["metrics_port"] for line in own.splitlines() if '"event": "serving"' in line]
            return bool(ports)

        self.wait_until(told, START_SECONDS, "the daemon says where its metrics are")
        return ports[-1]

    def metric(self, name: str, **labels: str) -> float:
        """All samples of /metrics that have those labels, together; 0 where there is none."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(
            float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    # The clients

    @property
    def client_environment(self) -> dict[str, str]:
        """What makes the clients find this daemon."""
        return {
            **{k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "POD_UID", "HF_TOKEN")},
            "MODELCACHE_ADDRESS": f"unix://{self.cache_socket}",
            "MODELCACHE_ADMIN_ADDRESS": f"unix://{self.admin_socket}",
        }

    def popen(self, program: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """ensure-model or cachectl, running; ends with the node at the latest."""
        client = subprocess.Popen(
            [str(BIN / program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.client_environment, **(env or {})},
        )
        self._clients.append(client)
        return client

    def run(
        self, program: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """ensure-model or cachectl, to its end."""
        return subprocess.run(
            [str(BIN / program), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**self.client_environment, **(env or {})},
        )

    def ensure(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> list[dict[str, Any]]:
        """`ensure-model --json`, which must succeed; an object a repo."""
        done = self.run("ensure-model", "--json", *arguments, env=env, timeout=timeout)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}\n{self.log_text()[-3000:]}"
        return [json.loads(line) for line in done.stdout.splitlines()]

    def ctl(self, *arguments: str) -> Any:
        """`cachectl --json`, which must succeed; what it prints."""
        done = self.run("cachectl", "--json", *arguments)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def status(self, timeout: float = 10) -> Any:
        """AdminService.GetStatus through the client library (no process is started)."""
        del timeout
        with Admin(f"unix://{self.admin_socket}") as admin:
            return admin.status()

    @contextmanager
    def admin(self) -> Iterator[Admin]:
        """The operators' face, in this process."""
        with Admin(f"unix://{self.admin_socket}") as admin:
            yield admin

    @contextmanager
    def client(self) -> Iterator[Client]:
        """The workloads' face, in this process."""
        with Client(f"unix://{self.cache_socket}") as client:
            yield client

    def models(self) -> dict[str, dict[str, Any]]:
        """`cachectl ls --json` by "repo@commit"."""
        return {f"{m['repo_id']}@{m['commit']}": m for m in self.ctl("ls")}

    def release_all(self) -> None:
        """Ends every lease, so that only order decides what goes."""
        with self.admin() as admin:
            ids = [lease.id for lease in admin.leases()]
            if ids:
                admin.release(ids)

    # The disk

    def du(self) -> int:
        """Allocated bytes below cache.dir as du(1) sees them, each inode once."""
        done = subprocess.run(["du", "-sB1", str(self.cache_dir)], capture_output=True, text=True, check=True)
        return int(done.stdout.split()[0])

    def assert_disk_truth(self) -> None:
        """I8: at rest, what status shows is what du shows."""
        deadline = time.monotonic() + 5
        while True:
            shown, found = int(self.status().used_bytes), self.du()
            if shown == found:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"status shows {shown} bytes used, du {found}")
            time.sleep(0.1)

    def snapshot(self, repo_id: str, commit: str) -> Path:
        """The snapshot's directory, there or not."""
        return self.hub_dir / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit

    def visible(self, repo_id: str) -> list[str]:
        """The repository's commits that a reader sees."""
        directory = self.hub_dir / f"models--{repo_id.replace('/', '--')}" / "snapshots"
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:  # an eviction may take it at any moment
            return []


def in_threads(count: int, work: Callable[[int], Any]) -> Sequence[Any]:
    """Runs work(0..count-1) at once; their results, or the first error."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def one(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


__all__ = ["Node", "free_port", "in_threads", "reference"]

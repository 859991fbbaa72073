"""A Debian host of our own that is really booted: systemd as process 1 in a container, made anew for each run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "systemd.md"
CHECKOUT = "/root/modelcached"
WHEELS = "/wheels"
RELEASE = "bookworm"
_NEEDED_TO_BOOT = ("systemd", "systemd-sysv", "dbus")
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    # What pip would ask the network for was fetched before.
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": WHEELS,
}


def blocks(heading: str, document: Path = DOCUMENT) -> list[str]:
    """The documentation's `sh` blocks of one section."""
    sections = re.split(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    text = dict(zip(sections[1::2], sections[2::2], strict=True))[heading]
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def make_wheels(directory: Path) -> None:
    """Everything that `systemd/install` has pip install: of this checkout, its dependencies, and what builds it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(directory)]
    _must([*command, f"{ROOT}[daemon,cli]", "hatchling"])


def make_host(tree: Path) -> None:
    """A small Debian with the packages that the documentation names, and this checkout. ``tree``: on a filesystem that
    need not survive, so that nobody waits for a disk."""
    (packages,) = re.findall(r"^apt-get install -y (.+)$", blocks("Install")[0], re.MULTILINE)
    include = ",".join([*_NEEDED_TO_BOOT, *packages.split()])
    _must(["debootstrap", "--variant=minbase", f"--include={include}", RELEASE, str(tree)])
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, tree / CHECKOUT.lstrip("/"), ignore=ignored)


def _must(command: list[str]) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # debootstrap is root's
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}:\n{done.stdout[-4000:]}"


class Host:
    """Running while it is entered; ends with this process, however that ends."""

    def __init__(self, tree: Path, wheels: Path, console: Path) -> None:
        self.tree = tree
        self._wheels = wheels
        self._console = console
        self._container: subprocess.Popen[bytes] | None = None
        self._first = 0  # its process 1, as we number it

    def __enter__(self) -> Self:
        with self._console.open("wb") as console:
            self._container = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "systemd-nspawn", "--quiet", "--register=no", "--keep-unit"),
                    *("--boot", "--console=pipe", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
                    # The network is ours: the test Hub listens on loopback.
                    f"--directory={self.tree}",
                    f"--machine=modelcached-{self._console.parent.name}",
                    f"--bind-ro={self._wheels}:{WHEELS}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                # Control groups of version 2, as Debian 12 has them, whatever the machine round it has.
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
        self.wait_until(self._is_up, 60, "the host is up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._container is not None
        self._container.terminate()
        try:
            self._container.wait(20)
        except subprocess.TimeoutExpired:
            self._container.kill()
            self._container.wait()

    def _is_up(self) -> bool:
        assert self._container is not None
        assert self._container.poll() is None, f"the host has ended:\n{self._console.read_text(errors='replace')}"
        children = psutil.Process(self._container.pid).children()
        if len(children) != 1:
            return False
        self._first = children[0].pid
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

    # Commands

    def _command(self, command: tuple[str, ...], env: Mapping[str, str] | None) -> list[str]:
        namespaces = ("--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root")
        settings = (f"{name}={value}" for name, value in {**_ENVIRONMENT, **(env or {})}.items())
        return ["nsenter", "--target", str(self._first), *namespaces, "--", "env", "-i", *settings, *command]

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """As root on the host, to its end."""
        done = subprocess.run(
            self._command(command, env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.journal()}")
        return done

    def popen(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """As root on the host, running."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._command(command, env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def as_nobody(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """As a user without rights."""
        return self.run("runuser", "-u", "nobody", "--", *command, check=check)

    def script(self, text: str, env: Mapping[str, str] | None = None) -> str:
        """Shell lines of the documentation, in the checkout; what they print."""
        return self.run("sh", "-euc", f"cd {CHECKOUT}\n{text}", env=env, timeout=120).stdout

    def ctl(self, *arguments: str) -> Any:
        """`cachectl --json`; what it prints."""
        return json.loads(self.run("cachectl", "--json", *arguments).stdout)

    # The unit

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", "modelcached.service").stdout.strip()

    def journal(self, lines: int = 60) -> str:
        """The end of what the unit has logged."""
        return self.run(
            *("journalctl", "--unit=modelcached", "--output=cat", "--no-pager", f"--lines={lines}"), check=False
        ).stdout

    def configure(self, name: str, text: str) -> None:
        """A drop-in for the unit; empty takes it away. Restarts nothing."""
        file = self.tree / "etc/systemd/system/modelcached.service.d" / f"{name}.conf"
        if text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"[Service]\n{text}\n")
        else:
            file.unlink()
        self.run("systemctl", "daemon-reload")

    def systemctl(self, verb: str) -> None:
        """`systemctl VERB modelcached`."""
        self.run("systemctl", verb, "modelcached.service")

    def wait_until(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Until it is so; AssertionError that says what was waited for."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                shown = self.journal() if self._first else self._console.read_text(errors="replace")
                raise AssertionError(f"not within {seconds} s: {what}\n{shown[-6000:]}")
            time.sleep(0.1)

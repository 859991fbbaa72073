"""A pod of containers to the kernel: another user, the cache read-only, a home to write to, and nobody to talk to.

What a container runs are two installations with nothing in common, as in two images: ours (`ensure-model`) and vLLM's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.node import Node
from tests.node.pod import NOBODY

ROOT = Path(__file__).parents[2]
CONSUMER = ROOT / ".venv-vllm"
"""The virtual environment that `make system-vllm` fills."""
MODELS = "/mnt/models"
HOME = "/mnt/home"
END_SECONDS = 30

# Two virtual environments are rebuilt below /mnt, because where they lie nobody else may get (/root, 0700).
# `ip link set lo up`: a new network namespace has a loopback interface that is down, and no other.
_SETUP = """
set -eu
PATH=$PATH:/usr/sbin:/sbin
test -z "$OWN_NETWORK" || ip link set lo up
mount -t tmpfs -o mode=0755 pod /mnt
mkdir -p /mnt/models /mnt/home /mnt/daemon /mnt/python /mnt/bin /mnt/source
mount --bind "$BASE" /mnt/python
mount --bind "$SOURCE" /mnt/source
mount --bind "$POD_HOME" /mnt/home
mount --bind "$SOCKETS" /mnt/daemon
mount -o remount,bind,ro /mnt/daemon
if test -n "$HUB"; then
  mount --bind "$HUB" /mnt/models
  mount -o remount,bind,ro /mnt/models
  if refusal=$(LC_ALL=C touch /mnt/models/probe 2>&1); then echo "the mount can be written to" >&2; exit 99; fi
  case "$refusal" in *"Read-only file system"*) ;; *) echo "$refusal" >&2; exit 99 ;; esac
fi
for name in client consumer; do
  case $name in client) packages=$CLIENT ;; consumer) packages=$CONSUMER ;; esac
  mkdir -p "/mnt/$name/bin" "/mnt/$name/lib/$PYTHON/site-packages"
  printf 'home = /mnt/python/bin\\ninclude-system-site-packages = false\\n' > "/mnt/$name/pyvenv.cfg"
  ln -s "/mnt/python/bin/$PYTHON" "/mnt/$name/bin/python"
  mount --bind "$packages" "/mnt/$name/lib/$PYTHON/site-packages"
done
program() { printf '#!/bin/sh\\n%s exec %s "$@"\\n' "$2" "$3" > "/mnt/bin/$1"; }
program ensure-model PYTHONPATH=/mnt/source '/mnt/client/bin/python -m modelcache.ensure'
program vllm 'unset PYTHONPATH;' '/mnt/consumer/bin/python -m vllm.entrypoints.cli.main'
program python 'unset PYTHONPATH;' /mnt/consumer/bin/python
chmod 0755 /mnt/bin/*
mount -t tmpfs -o mode=1777 tmp /tmp
cd /mnt/home
exec setpriv --reuid "$NOBODY" --regid "$NOBODY" --clear-groups --no-new-privs "$@"
"""


@dataclass(frozen=True)
class Pod:
    """Runs containers; they share the home directory, and nothing else."""

    node: Node
    home: Path
    network: bool = False
    """The node's; without it every container has a loopback interface of its own and no other."""
    cache: bool = True
    """Whether hub/ is mounted; without it a container caches in its home, and may ask the Hub."""
    environment: Mapping[str, str] | None = None
    """Added to the containers'."""

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts a container's command; its process is the head of a process group. Output goes to the log."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self._command(command), env=self._outside(), stdout=output, stderr=output, start_new_session=True
            )

    def run(self, *command: str, timeout: float = 120) -> str:
        """Runs a container to its end, which must be a good one; what it printed."""
        done = subprocess.run(
            self._command(command), env=self._outside(), capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def python(self, script: str, *arguments: str, timeout: float = 180) -> Any:
        """Runs a script with the consumers' packages; the JSON value in its last line."""
        return json.loads(self.run("python", "-c", script, *arguments, timeout=timeout).splitlines()[-1])

    def _command(self, command: tuple[str, ...]) -> list[str]:
        spaces = ["--mount", "--propagation", "private", *([] if self.network else ["--net"])]
        inside = {
            "PATH": "/mnt/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": "/mnt/python/lib",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": HOME,
            "HF_HOME": f"{HOME}/huggingface",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default it takes what the machine has
            "MODELCACHE_ADDRESS": f"unix:///mnt/daemon/{self.node.cache_socket.name}",
            **({"HF_HUB_CACHE": MODELS, "HF_HUB_OFFLINE": "1"} if self.cache else {}),
            **(self.environment or {}),
        }
        variables = [f"{name}={value}" for name, value in inside.items()]
        return ["unshare", *spaces, "sh", "-c", _SETUP, "pod", "env", "-i", *variables, *command]

    def _outside(self) -> dict[str, str]:
        python = f"python{sysconfig.get_python_version()}"
        self.home.mkdir(parents=True, exist_ok=True)
        os.chown(self.home, NOBODY, NOBODY)
        return {
            "PATH": os.environ["PATH"],
            "NOBODY": str(NOBODY),
            "OWN_NETWORK": "" if self.network else "1",
            "BASE": str(Path(sys.base_prefix).resolve()),
            "SOURCE": str(ROOT / "client"),
            "POD_HOME": str(self.home),
            "SOCKETS": str(self.node.cache_socket.parent),
            "HUB": str(self.node.hub_dir) if self.cache else "",
            "CLIENT": sysconfig.get_path("purelib"),
            "CONSUMER": str(CONSUMER / "lib" / python / "site-packages"),
            "PYTHON": python,
        }


def end(container: subprocess.Popen[bytes], *, seconds: float = END_SECONDS) -> int:
    """SIGTERM to the container's first process, as a kubelet does; SIGKILL to what is left. Its exit status."""
    if container.poll() is None:
        container.terminate()
        try:
            container.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"not ended within {seconds} s of SIGTERM")
    with suppress(ProcessLookupError):
        os.killpg(container.pid, signal.SIGKILL)
    return container.wait()

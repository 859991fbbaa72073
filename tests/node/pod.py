"""What a workload's container is to the kernel: another user, other mounts, no network, the cache read-only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

NOBODY = 65534
MOUNT = Path("/mnt/models")
"""Where a pod finds hub/, whatever its path is on the node."""
HOME = Path("/mnt/home")
"""The only place that a pod may write to."""
_PYTHON, _PACKAGES = Path("/mnt/python"), Path("/mnt/packages")

# As root in mount and network namespaces of its own, so that nothing of it is seen or left outside. The interpreter
# and its packages come along by bind mounts: on the node they may lie where no other user gets (/root, 0700).
_SETUP = """
set -eu
mount -t tmpfs -o mode=0755 pod /mnt
mkdir /mnt/models /mnt/home /mnt/python /mnt/packages
chown "$NOBODY:$NOBODY" /mnt/home
mount --bind "$BASE" /mnt/python
mount --bind "$SITE" /mnt/packages
mount --bind "$HUB" /mnt/models
mount -o remount,bind,ro /mnt/models
if refusal=$(LC_ALL=C touch /mnt/models/probe 2>&1); then echo "the mount can be written to" >&2; exit 99; fi
case "$refusal" in *"Read-only file system"*) ;; *) echo "$refusal" >&2; exit 99 ;; esac
cd /mnt/home
exec setpriv --reuid "$NOBODY" --regid "$NOBODY" --clear-groups --no-new-privs "$@"
"""


def run_in_pod(hub_dir: Path, script: str, *arguments: str) -> Any:
    """Runs the script as uid 65534 over a bind mount of hub_dir that even root cannot write to.

    The script finds the cache in HF_HUB_CACHE, is offline in the library's eyes and in the kernel's, and
    prints one JSON value, which is returned. Raises AssertionError with its stderr where it fails.
    """
    base = Path(sys.base_prefix).resolve()
    # sys._base_executable: the interpreter behind the virtual environment.
    python = _PYTHON / Path(sys._base_executable).resolve().relative_to(base)  # type: ignore[attr-defined]
    environment = {
        "PATH": os.environ["PATH"],
        "NOBODY": str(NOBODY),
        "BASE": str(base),
        "SITE": sysconfig.get_path("purelib"),
        "HUB": str(hub_dir),
    }
    inside = {
        "PATH": "/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(_PYTHON / "lib"),
        "PYTHONHOME": str(_PYTHON),
        "PYTHONPATH": str(_PACKAGES),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(HOME),
        "HF_HOME": str(HOME / "huggingface"),
        "HF_HUB_CACHE": str(MOUNT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    variables = [f"{name}={value}" for name, value in inside.items()]
    command = ["env", "-i", *variables, str(python), "-c", script, *arguments]
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", _SETUP, "pod", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)

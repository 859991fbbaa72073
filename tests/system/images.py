"""Both images, built from deploy/Containerfile on a base of Debian's packages, with no registry and no index."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from modelcached import __version__

from tests.node.podman import Podman

REPOSITORY = Path(__file__).parents[2]
BASE = "localhost/base:1"
DAEMON = f"localhost/modelcached:{__version__}"
CLIENT = f"localhost/modelcached-client:{__version__}"
PYTHON = "3.11"
"""Debian 12's."""
SUITE = "bookworm"


@dataclass
class Images:
    """Built, and how long each stage took."""

    podman: Podman
    seconds: dict[str, float] = field(default_factory=dict)

    def build(self, scratch: Path) -> None:
        """All of it."""
        tree, wheels = scratch / "base.tar", scratch / "wheels"
        self._timed("base tree", lambda: _bootstrap(tree))
        self._timed("base image", lambda: self.podman.import_tree(tree, BASE))
        self._timed("wheels", lambda: _download(wheels))
        tree.unlink()
        for target, tag in (("daemon", DAEMON), ("client", CLIENT)):
            self._timed(f"image {target}", lambda target=target, tag=tag: self._build(target, tag, wheels))

    def _timed(self, stage: str, work: Callable[[], None]) -> None:
        begun = time.monotonic()
        work()
        self.seconds[stage] = time.monotonic() - begun

    def _build(self, target: str, tag: str, wheels: Path) -> None:
        arguments = {"BASE_IMAGE": BASE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "REVISION": "0" * 40}
        flags = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        self.podman.build(REPOSITORY, target, tag, *flags, "--volume", f"{wheels}:/wheels:ro")


def _bootstrap(tar: Path) -> None:
    """Debian with what a Python base has: the interpreter, its venv module, authorities, what C++ needs."""
    # fmt: off
    command = ["mmdebstrap", "--mode=root", "--variant=essential", "--include=ca-certificates,libstdc++6,python3-venv",
               "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
               "--dpkgopt=path-exclude=/usr/share/locale/*", "--quiet", SUITE, str(tar)]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def _download(wheels: Path) -> None:
    """As deploy/Containerfile says for where no index is reached; digests are checked here and in the build."""
    # fmt: off
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes",
               "--only-binary", ":all:", "--python-version", PYTHON, "--dest", str(wheels),
               "-r", "deploy/requirements-daemon.txt", "-r", "deploy/requirements-build.txt"]
    # fmt: on
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

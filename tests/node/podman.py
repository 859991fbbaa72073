"""podman and buildah (Debian: podman, buildah, runc, conmon, catatonit) with a store of their own, gone with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

# No ulimits: raising them may not be allowed here. No systemd to ask for control groups, no journal to write to.
_CONTAINERS_CONF = """\
[containers]
default_ulimits = []
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
# Nothing that a test names may be looked for anywhere else.
_REGISTRIES_CONF = 'unqualified-search-registries = []\nshort-name-mode = "disabled"\n'
_POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}\n'


class Podman:
    """Images and pods of this run alone."""

    def __init__(self) -> None:
        # Short, for sockets lie below it; not under pytest's directories, which are kept.
        self._directory = Path(tempfile.mkdtemp(prefix="mcp-"))
        files = {"containers.conf": _CONTAINERS_CONF, "registries.conf": _REGISTRIES_CONF, "policy.json": _POLICY}
        for name, content in files.items():
            (self._directory / name).write_text(content)
        self._environment = {
            **os.environ,
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "CONTAINERS_CONF": str(self._directory / "containers.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self._directory / "registries.conf"),
            "TMPDIR": str(self._directory),
        }
        store = ["--root", str(self._directory / "root"), "--runroot", str(self._directory / "run")]
        self._podman = ["podman", *store, "--tmpdir", str(self._directory / "tmp"), "--storage-driver", "overlay"]
        self._buildah = ["buildah", *store, "--storage-driver", "overlay"]

    def close(self) -> None:
        """Every pod ends, and what was mounted is unmounted."""
        for what in (["pod", "rm"], ["rm"]):
            self.attempt(*what, "--all", "--force", "--time", "1")
        overlays = str(self._directory / "root" / "overlay")
        subprocess.run(["umount", "--recursive", "--quiet", overlays], capture_output=True, check=False)
        shutil.rmtree(self._directory, ignore_errors=True)

    def command(self, *arguments: str) -> list[str]:
        """To be run by somebody else, in ``environment``."""
        return [*self._podman, *arguments]

    @property
    def environment(self) -> Mapping[str, str]:
        return self._environment

    def run(self, *arguments: str, timeout: float = 120) -> str:
        """Its stdout. AssertionError with what it said where it fails."""
        done = self.attempt(*arguments, timeout=timeout)
        assert done.returncode == 0, f"podman {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}{done.stdout}"
        return done.stdout

    def attempt(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """However it ends."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self._environment,
        )

    def build(self, context: Path, target: str, tag: str, *arguments: str) -> None:
        """A target of deploy/Containerfile, in Docker's format, which has health checks."""
        where = ["--file", str(context / "deploy" / "Containerfile"), "--target", target, "--tag", tag]
        how = ["--isolation", "chroot", "--format", "docker", "--layers"]
        trust = ["--signature-policy", str(self._directory / "policy.json")]
        done = subprocess.run(
            [*self._buildah, "bud", *how, *trust, *where, *arguments, str(context)],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=self._environment,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"

    def import_tree(self, tar: Path, tag: str) -> None:
        """A root filesystem as an image, as any base is."""
        self.run("import", "--quiet", str(tar), tag)

    def size_bytes(self, image: str) -> int:
        return int(self.run("image", "inspect", "--format", "{{.Size}}", image))

"""modelcached as a contender: a daemon with its defaults, and `ensure-model`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench import measure
from tests.bench.measure import ContenderError, MemoryWatch, Usage, run
from tests.bench.peers import Download, check_sizes
from tests.bench.server import Published
from tests.node.daemon import BIN, Node

OURS = "modelcached"


class Modelcached(Download):
    """`ensure-model` against a daemon that already runs, its cache empty. CPU: both; memory: the daemon's."""

    name = OURS
    origin = "hub"
    """Where its bytes are counted."""

    def environment(self, into: Path) -> dict[str, str]:
        """The daemon's; ``into`` is free for files of it."""
        del into
        return self.job.environment

    def fetch(self, into: Path) -> Usage:
        with daemon(into, self.job.endpoint, environment=self.environment(into)) as node:
            usage, self._said = ensure_measured(node, self.job.model, into)
            if not node.metric("modelcached_fetched_bytes_total", origin=self.origin):
                raise ContenderError(f"nothing came over {self.origin}")
            return usage

    def check(self, into: Path) -> None:
        check_ensured(self._said, self.job.model, into / "node" / "cache" / "hub")


class ModelcachedWithoutSplice(Modelcached):
    """As on a kernel that has no splice(2) for sockets: through its memory, as with TLS (`cold-tls`)."""

    name = f"{OURS}, without splice"

    def environment(self, into: Path) -> dict[str, str]:
        refuses = into / "refuses"
        refuses.mkdir()
        (refuses / "sitecustomize.py").write_text(
            "import errno, os\n"
            "def splice(*_args, **_options):\n"
            "    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))\n"
            "os.splice = splice\n"
        )
        return {**super().environment(into), "PYTHONPATH": str(refuses)}


class ModelcachedXet(Modelcached):
    """The same from a Hub that offers Xet."""

    name = f"{OURS} (Xet)"
    origin = "xet"


@contextmanager
def daemon(
    root: Path,
    endpoint: str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Node]:
    """A daemon with its defaults below ``root``/node, serving; killed at the end, for nothing of it is kept."""
    defaults = {
        "cache": {"budget": "100%"},
        "hub": {"timeout": "30s"},
        "transfer": {"stall_timeout": "30s", "retry_timeout": "10m"},
        "log": {"level": "info"},
        **(settings or {}),
    }
    node = Node(root / "node", endpoint, defaults)
    node.environment.update(environment or {})
    try:
        yield node.start()
    finally:
        if node.process is not None and node.process.poll() is None:
            node.kill()


def ensure_measured(node: Node, model: Published, directory: Path) -> tuple[Usage, str]:
    """One `ensure-model` as a process: the time is its, CPU its and the daemon's, memory the daemon's above idle."""
    assert node.process is not None
    argv = [str(BIN / "ensure-model"), "--json", "--quiet", "--profile", "full", model.repo_id]
    before = measure.tree_cpu_seconds(node.ps)
    with MemoryWatch(node.process.pid) as memory:
        client = run(argv, node.client_environment, directory)
    cpu = client.cpu_seconds + measure.tree_cpu_seconds(node.ps) - before
    return Usage(client.seconds, cpu, memory.above_idle_bytes), client.stdout


def check_ensured(said: str, model: Published, hub_dir: Path, outcome: str = "downloaded") -> None:
    """It says what it did, and every file is published under the digest that it was checked against."""
    answer = json.loads(said)
    if answer["outcome"] != outcome or answer["bytes_total"] != model.size_bytes:
        raise ContenderError(f"not {outcome} with {model.size_bytes} bytes: {answer}")
    snapshot = hub_dir / f"models--{model.repo_id.replace('/', '--')}" / "snapshots" / model.commit
    check_sizes(model, lambda path: snapshot / path)
    for path, file in model.files.items():
        if (snapshot / path).resolve().name != file.etag:
            raise ContenderError(f"{path} is not published as {file.etag}")

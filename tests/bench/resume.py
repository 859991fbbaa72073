"""SIGKILL in the middle: what is sent a second time, and how long until all is there."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bench import measure
from tests.bench.cases import MIB, Bench, Case, Column, upstream
from tests.bench.measure import ContenderError
from tests.bench.ours import OURS, check_ensured, daemon, ensure_measured
from tests.bench.peers import Aria2, Aria2Continue, Contender, Figures, Job, Snapshot, scratch
from tests.bench.server import Site
from tests.hub.models import paced_model
from tests.node.daemon import BIN

_HALF_SECONDS = 600.0
"""Until a contender has written the first half."""


class Resumed(Contender):
    """Killed when half is written, started again at once, and timed from the kill to the end of `sync -f`."""

    def __init__(self, job: Job, site: Site, name: str) -> None:
        self.job, self._site, self.name = job, site, name

    def break_off(self, into: Path) -> None:
        """Starts it and kills it half way."""
        raise NotImplementedError

    def go_on(self, into: Path) -> None:
        """Starts it again, to its end."""
        raise NotImplementedError

    def check(self, into: Path) -> None:
        """Raises ContenderError unless everything is there."""
        raise NotImplementedError

    def run(self) -> Figures:
        model = self.job.model
        large_bytes = sum(model.files[path].size for path in model.large)
        with scratch(self.job.work, model) as directory:
            before = self._site.sent_bytes()
            self.break_off(directory)
            began = time.perf_counter()
            self.go_on(directory)
            measure.sync(directory)
            seconds = time.perf_counter() - began
            self.check(directory)
        return {"seconds": seconds, "twice": (self._site.sent_bytes() - before - large_bytes) / MIB}

    def wait_for_half(self, writer: int, caller: subprocess.Popen[bytes]) -> None:
        """Until the writer's process tree has written half the model; ContenderError if the caller ends first."""
        before, half = measure.tree_written_bytes(writer), self.job.model.size_bytes // 2

        def written() -> bool:
            if caller.poll() is not None:
                raise ContenderError(f"{caller.args!r} ended with {caller.returncode} before it could be killed")
            return measure.tree_written_bytes(writer) - before >= half

        measure.wait_until(written, _HALF_SECONDS, "half is written")


class OursResumed(Resumed):
    """The daemon is killed, and its client; the time holds the daemon's start."""

    def break_off(self, into: Path) -> None:
        with daemon(into, self.job.endpoint) as node:
            argv = [str(BIN / "ensure-model"), "--quiet", "--profile", "full", self.job.model.repo_id]
            client = measure.start(argv, node.client_environment, into)
            try:
                self.wait_for_half(node.ps.pid, client)
                node.kill()
            finally:
                measure.kill_group(client)
                client.wait()

    def go_on(self, into: Path) -> None:
        with daemon(into, self.job.endpoint) as node:
            _, self._said = ensure_measured(node, self.job.model, into)

    def check(self, into: Path) -> None:
        check_ensured(self._said, self.job.model, into / "node" / "cache" / "hub")


class PeerResumed(Resumed):
    """A peer whose second call is its first one again."""

    def __init__(self, job: Job, site: Site, peer: Snapshot | Aria2) -> None:
        super().__init__(job, site, peer.name)
        self._peer = peer

    def break_off(self, into: Path) -> None:
        process = measure.start(self._peer.command(into), self._peer.environment(into), into)
        try:
            self.wait_for_half(process.pid, process)
        finally:
            measure.kill_group(process)
            process.wait()

    def go_on(self, into: Path) -> None:
        self._peer.fetch(into)

    def check(self, into: Path) -> None:
        self._peer.check(into)


@contextmanager
def _prepare(bench: Bench) -> Iterator[Sequence[Contender]]:
    with upstream(bench, "bench/resume", paced_model(bench.scale.kill_bytes, 4)) as (site, model):
        job = Job(model, site.endpoint, bench.directory)
        peers = [PeerResumed(job, site, Snapshot(job)), PeerResumed(job, site, Aria2Continue(job))]
        yield [OursResumed(job, site, OURS), *peers]


RESUME = Case(
    "resume",
    "Resumed after SIGKILL at 50 %, 4 shards",
    (Column("seconds", "s from kill to end, with sync"), Column("twice", "MiB sent twice", 1)),
    _prepare,
)

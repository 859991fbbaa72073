"""What must hold for a node whose disk fails, while it fails and when it is back."""

from __future__ import annotations

import hashlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from modelcache.v1 import cache_pb2, common_pb2

from tests.hub import MIB, Hub, Synthetic

from .asking import Asked, ask
from .daemon import Node, reference
from .pod import run_in_pod
from .reader import Reader

SIZE = 2 * MIB
"""Above what is fetched into memory."""
WEIGHTS = "model.safetensors"

_LOAD = """
import hashlib, json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
roots = {repo_id: Path(snapshot_download(repo_id)) for repo_id in sys.argv[1:]}
print(json.dumps({repo_id: {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                            for path in root.rglob("*") if path.is_file()} for repo_id, root in roots.items()}))
"""


class Standing:
    """A node and what it has cached. Every model is whole or absent in what readers see, all the time."""

    def __init__(self, node: Node, hub: Hub) -> None:
        self.node = node
        self.hub = hub
        self.contents: dict[str, dict[str, str]] = {}
        """What each published model holds: path to SHA-256."""
        self.commits: dict[str, str] = {}
        self.kept: list[str] = []
        """Models that were cached before the disk failed."""
        self.residue: set[str] = set()
        """What a disk that let nothing go has kept in the daemon's own directories; gone after a restart."""
        self._pid = 0

    # Before

    def publish(self, name: str, size_bytes: int = SIZE) -> str:
        """A model on the Hub, with weights of its own; its repository."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        weights = Synthetic(size_bytes, seed)
        small = {"config.json": json.dumps({"model_type": name}).encode(), "tokenizer.json": name.encode() * 99}
        repo_id = f"org/{name}"
        self.commits[repo_id] = self.hub.create_repo(repo_id).commit({**small, WEIGHTS: weights})
        self.contents[repo_id] = {path: hashlib.sha256(content).hexdigest() for path, content in small.items()}
        self.contents[repo_id][WEIGHTS] = weights.sha256()
        return repo_id

    def keep(self, *names: str, size_bytes: int = SIZE) -> None:
        """Caches these, leased."""
        for name in names:
            repo_id = self.publish(name, size_bytes)
            self.node.ensure(repo_id)
            self.kept.append(repo_id)
        self._pid = self.node.ps.pid

    def release(self, repo_id: str) -> None:
        """Nobody uses it any more."""
        with self.node.admin() as admin:
            admin.release(repo_id=repo_id)

    @contextmanager
    def watched(self, *repos: str) -> Iterator[None]:
        """Readers look at these all the while, and see each whole or not at all."""
        if not repos:
            yield
            return
        first, *others = repos
        # Without a pause it would be busier than the Hub, which is in this process too.
        reader = Reader(self.node.snapshot(first, self.commits[first]), self.contents[first], pause_seconds=0.02)
        with reader.looking(), self.watched(*others):
            yield

    def begin(self, repo_id: str, bytes_sent: int, *arguments: str) -> subprocess.Popen[str]:
        """ensure-model, so far that the Hub has sent that much of the weights."""
        caller = self.node.popen("ensure-model", repo_id, *arguments)
        far = self.hub.wait_until(lambda: self.hub.body_bytes(repo_id, WEIGHTS) >= bytes_sent, timedelta(seconds=30))
        assert far, self.node.log_text()[-3000:]
        return caller

    # While it fails

    def ask(self, repo_id: str, *arguments: str) -> Asked:
        return ask(self.node, repo_id, *arguments)

    def assert_refused(self, asked: Asked, reason: str, exit_status: int, *words: str) -> None:
        """By name, with the right exit status, in words that say what it was and what to do."""
        log = self.node.log_text()[-6000:]
        assert (asked.reason, asked.exit_status) == (reason, exit_status), f"{asked.text}\n{asked.stderr}\n{log}"
        for word in words:
            assert word in asked.text, asked.text
        assert "; " in asked.text, f"it says what to do: {asked.text}"

    def assert_ended(self, caller: subprocess.Popen[str], reason: str, exit_status: int, *words: str) -> None:
        """The same for a client that was running. Its last line names no reason, but its words are the daemon's."""
        _, stderr = caller.communicate(timeout=60)
        last = stderr.strip().splitlines()[-1]
        assert caller.returncode == exit_status, f"exit {caller.returncode}\n{stderr}\n{self.node.log_text()[-6000:]}"
        for word in words:
            assert word in last, last
        ended = [line for line in self.node.log_lines("ensured") if line["outcome"] == "error"]
        assert [line["reason"] for line in ended[-1:]] == [reason], ended

    def assert_alive(self) -> None:
        """It answers, it is the same process, and it still believes in all that it had."""
        assert self.node.status().models == len(states(self.node))
        url = f"http://127.0.0.1:{self.node.metrics_port}/healthz"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
        assert self.node.ps.pid == self._pid
        assert self.node.ps.is_running()
        found = states(self.node)
        assert {repo_id: found.get(repo_id) for repo_id in self.kept} == dict.fromkeys(self.kept, "ready")

    def leases(self) -> set[str]:
        return {lease["id"] for lease in self.node.ctl("leases")}

    def assert_a_hit_is_refused(self, repo_id: str, *words: str) -> None:
        """There is no proof of use without state.db; so there is no answer, and no lease in memory either."""
        before = self.leases()
        self.hub.reset_counters()
        self.assert_refused(self.ask(repo_id), "STORAGE_ERROR", 74, *words)
        assert self.leases() == before
        self.assert_nothing_fetched()

    # When the disk is back

    def assert_recovered(self, wanted: str | None = None, *, says: str = "") -> None:
        """Without a restart, and after one: nothing was lost, nothing is left behind, nothing is called wrong.

        ``says``: what is degraded for good on this disk.
        """
        assert self.node.ps.pid == self._pid, "it was never restarted"
        if wanted is not None:
            self.node.ensure(wanted)
            self.kept.append(wanted)
        self.assert_kept()
        self.assert_tidy(says)
        self.restart()
        self.assert_hits(*self.kept)
        self.assert_tidy(says)

    def restart(self) -> None:
        """After a kill."""
        self.node.kill()
        self.started_again()

    def started_again(self) -> None:
        """Over the same directories, with nothing left of what was unfinished and cannot go on."""
        self.residue = set()
        self.node.start()
        self._pid = self.node.ps.pid

    def assert_kept(self) -> None:
        """Every model is a hit, and whole in a pod's eyes."""
        self.assert_hits(*self.kept)
        self.assert_readable()

    def assert_hits(self, *repos: str) -> None:
        """Each is answered as it is: not a byte of it is fetched again."""
        self.hub.reset_counters()
        outcomes = {}
        with self.node.client() as client:
            for repo_id in repos:
                *_, ready = client.ensure(reference(repo_id))
                assert isinstance(ready, cache_pb2.Ready)
                outcomes[repo_id] = ready.models[0].outcome
        assert outcomes == dict.fromkeys(repos, common_pb2.OUTCOME_HIT)
        self.assert_nothing_fetched()

    def assert_nothing_fetched(self) -> None:
        """Of any model's content, since the counters began."""
        assert [request for request in self.hub.requests() if request.is_content] == []

    def assert_readable(self) -> None:
        """huggingface_hub loads each of them, offline, in a pod."""
        expected = {repo_id: self.contents[repo_id] for repo_id in self.kept}
        assert run_in_pod(self.node.hub_dir, _LOAD, *self.kept) == expected

    def assert_tidy(self, says: str = "") -> None:
        """Nothing is promised, unfinished or half removed; the account is the disk's; nothing is called wrong."""
        node = self.node
        node.wait_until(lambda: not node.status().transfers, 20, "nothing is under way")
        assert self._unfinished() <= self.residue
        assert node.status().reserved_bytes == 0
        node.assert_disk_truth()

        def wrong() -> list[str]:
            return [why for why in node.status().degraded if not says or says not in why]

        node.wait_until(lambda: not wrong(), 10, f"nothing is degraded: {wrong()}")

    def _unfinished(self) -> set[str]:
        private = self.node.private
        return {str(path) for name in ("staging", "trash", "partial") for path in (private / name).iterdir()}

    def note_residue(self) -> None:
        """What lies there now could not be removed."""
        self.residue = self._unfinished()


def states(node: Node) -> dict[str, Any]:
    """What `cachectl ls` says of each model."""
    return {model["repo_id"]: model["state"] for model in node.ctl("ls")}

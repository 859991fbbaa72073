"""One Hub, one daemon and one model for all rows of the fault matrix; and what must hold after each."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelcache.client import reference
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2

from tests.hub import MIB, Fault, Hub, Synthetic
from tests.hub.tls import Authority, TlsFront
from tests.integration.fault_matrix import AGAIN_BYTES, SETTINGS, SIZE, TRANSFER_SECONDS, Row, Where
from tests.node import Node

WHOLE, MANY = "org/whole", "org/many"
LARGE = "model.safetensors"
SHARD_BYTES = 4 * MIB
SHARDS = 32


@dataclass(frozen=True)
class Course:
    """What every row runs on."""

    hub: Hub
    node: Node
    untrusted: TlsFront

    def faults(self, row: Row, where: Where) -> tuple[Fault, ...]:
        return row.faults(where, row.dead_address.format(tls=self.untrusted.port))

    def run(self, row: Row, where: Where, repo_id: str) -> list[Fault]:
        """Asks for a model that is not cached, with the row's faults on; the right bytes must come, in time."""
        hub, node = self.hub, self.node
        hub.reset_counters()
        faults = [hub.faults.add(fault) for fault in self.faults(row, where)]
        try:
            self._judge(row, repo_id, faults)
        finally:  # the next row begins anew, whatever has become of this one
            hub.faults.clear()
            self.evict(repo_id)
            with node.admin() as admin:
                admin.garbage(remove=True)
        return faults

    def _judge(self, row: Row, repo_id: str, faults: list[Fault]) -> None:
        hub, node = self.hub, self.node
        began = time.monotonic()
        with node.client() as client:
            *_, ready = client.ensure(reference(repo_id, profile="full"))
        seconds = time.monotonic() - began
        hub.faults.clear()
        assert isinstance(ready, cache_pb2.Ready)
        files = hub.find_repo(repo_id).files()
        snapshot = node.snapshot(repo_id, ready.models[0].commit)
        for path, file in files.items():
            assert sha256(snapshot / path) == file.sha256
        happened = sum(fault.fired for fault in faults)
        sent = sum(hub.body_bytes(repo_id, path) for path in files)
        again = sent - sum(file.size for file in files.values())
        assert 0 <= again <= AGAIN_BYTES * happened
        assert seconds <= TRANSFER_SECONDS + row.seconds * happened

    def evict(self, repo_id: str) -> None:
        self.node.release_all()
        with self.node.admin() as admin, contextlib.suppress(ModelCacheError):  # it may never have come
            admin.evict([reference(repo_id)], dry_run=False)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def course(directory: Path, connections: int = 8) -> Iterator[Course]:
    """A Hub with the model in one file and in many, and a daemon that serves."""
    settings = {**SETTINGS, "transfer": {**SETTINGS["transfer"], "connections": connections}}
    authority = Authority()
    with Hub() as hub, TlsFront(authority.certificate("localhost"), 9) as untrusted:
        hub.create_repo(WHOLE).commit({LARGE: Synthetic(SIZE, seed=1)})
        shards = {f"model-{n:02}.safetensors": Synthetic(SHARD_BYTES, seed=10 + n) for n in range(SHARDS)}
        hub.create_repo(MANY).commit({LARGE: Synthetic(SIZE - SHARDS * SHARD_BYTES, seed=2), **shards})
        node = Node(directory, hub.endpoint, settings).start()
        try:
            yield Course(hub, node, untrusted)
        finally:
            node.stop()

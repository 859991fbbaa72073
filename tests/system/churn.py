"""Traffic for a cache that is much too small: who asks for what, how long they keep it, and what they find."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.duration_pb2 import Duration
from modelcache.client import Client
from modelcache.errors import ModelCacheError
from modelcache.v1 import cache_pb2

from tests.hub import MIB, Hub, Synthetic
from tests.node import Node
from tests.node.daemon import reference

MODELS = 200
CLIENTS = 32
FAMILY = 10
"""Models with the same tokenizer."""
LEAST, MOST = MIB // 16, 6 * MIB
"""Sizes of weights."""
HELD_SECONDS = 0.2
"""On the average."""
TTL_SECONDS = 10
SECONDS_A_MOVE = 0.25
EXPECTED = {"NO_SPACE_NOW", "IN_USE", "CANCELLED", "TRANSFER_CANCELLED", "MODEL_NOT_CACHED", "PIN_NOT_FOUND"}


@dataclass
class Models:
    """On the Hub: ``org/m-000`` and so on, of mixed sizes, the first ones asked for most; branches move."""

    hub: Hub
    sizes: list[int] = field(default_factory=list)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """By commit: path -> SHA-256 of what is there."""

    @staticmethod
    def repo_id(number: int) -> str:
        return f"org/m-{number:03}"

    def publish(self) -> None:
        """All of them."""
        sizes = random.Random(1)
        for number in range(MODELS):
            self.sizes.append(int(LEAST * (MOST / LEAST) ** sizes.random()))
            self.hub.create_repo(self.repo_id(number))
            self.commit(number, version=0)

    @property
    def mean_bytes(self) -> int:
        return sum(self.sizes) // len(self.sizes)

    def commit(self, number: int, version: int) -> None:
        """``main`` names another commit; one of two shards is as before."""
        repo = self.hub.find_repo(self.repo_id(number))
        assert repo is not None
        half = self.sizes[number] // 2
        files = {
            "config.json": json.dumps({"model_type": f"{number} {version}"}).encode(),
            "tokenizer/tokenizer.json": f"family {number // FAMILY}".encode() * 99,
            "model-00001-of-00002.safetensors": Synthetic(half, 1000 * number),
            "model-00002-of-00002.safetensors": Synthetic(half, 1000 * number + 1 + version),
        }
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
        sums = {
            path: hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content.sha256()
            for path, content in files.items()
        }
        self.files[repo.commit(files)] = sums


class Churn:
    """Thirty-two who come and go. An error that they did not expect ends them all, and is raised."""

    def __init__(self, node: Node, models: Models, seed: int) -> None:
        self.node = node
        self.models = models
        self.counts: Counter[str] = Counter()
        """What came of it."""
        self._seed = seed
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        self._weights = [1 / (number + 8) for number in range(MODELS)]

    def run(self, seconds: float) -> None:
        """For so long; returns when all have come to their end."""
        (self.node.pods_dir / "of-somebody-else").mkdir(exist_ok=True)  # a node without pods proves no pod gone
        work = [lambda number=number: self._ask(number) for number in range(CLIENTS)]
        threads = [
            threading.Thread(target=self._guarded, args=(one,))
            for one in [*work, self._keep_pinning, self._keep_evicting, self._keep_moving]
        ]
        for thread in threads:
            thread.start()
        self._over.wait(seconds)
        self._over.set()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by run
            self._errors.append(error)
            self._over.set()

    @contextmanager
    def _expecting(self) -> Iterator[None]:
        try:
            yield
        except ModelCacheError as error:
            if error.reason not in EXPECTED:
                raise
            self.counts[error.reason] += 1

    # Clients

    def _ask(self, number: int) -> None:
        dice = random.Random(self._seed * 1000 + number)
        with self.node.client() as client:
            while not self._over.is_set():
                with self._expecting():
                    self._ask_once(client, dice)

    def _ask_once(self, client: Client, dice: random.Random) -> None:
        (wanted,) = dice.choices(range(MODELS), self._weights)
        (kind,) = dice.choices(("ttl", "stream", "pod", "expires", "goes"), (12, 8, 1, 1, 2))
        pod = self.node.pods_dir / f"pod-{uuid.UUID(int=dice.getrandbits(128))}"
        lease = cache_pb2.LeaseRequest(ttl=Duration(seconds=TTL_SECONDS), stream=kind == "stream")
        if kind == "pod":
            pod.mkdir()
            lease.pod_uid = pod.name
        request = cache_pb2.EnsureModelRequest(model=reference(Models.repo_id(wanted)), lease=lease)
        request.wait_for_space.FromMilliseconds(dice.choice((0, 0, 2000)))
        try:
            with client.ensure_request(request) as events:
                for event in events:
                    if isinstance(event, cache_pb2.Ready):
                        self._hold(client, event, kind, dice)
                    elif kind == "goes" and event.phase >= cache_pb2.PHASE_DOWNLOADING:
                        self.counts["gone before its answer"] += 1
                        break
        finally:
            if kind == "pod":
                pod.rmdir()

    def _hold(self, client: Client, ready: cache_pb2.Ready, kind: str, dice: random.Random) -> None:
        """In use: whole all the time, to the last moment."""
        self.counts[f"held by {kind}"] += 1
        (model,) = ready.models
        path, until = (
            self.node.hub_dir / model.path,
            time.monotonic() + min(dice.expovariate(1 / HELD_SECONDS), TTL_SECONDS / 2),
        )
        if kind == "stream":
            with client.hold(ready.lease.id) as held:
                next(iter(held))
                self._use(path, model.commit, until, dice)
        else:
            self._use(path, model.commit, until, dice)
        if kind in ("ttl", "goes"):
            client.release(ready.lease.id)

    def _use(self, path: Path, commit: str, until: float, dice: random.Random) -> None:
        sums = self.models.files[commit]
        inodes = {name: (path / name).stat().st_ino for name in sums}
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
            assert {name: (path / name).stat().st_ino for name in sums} == inodes
        name = dice.choice(sorted(sums))
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == sums[name]
        self.counts["looks in use"] += 1

    # Operators, and the Hub

    def _cached(self, dice: random.Random) -> tuple[str, str] | None:
        """One that is there: repository and commit."""
        folders = sorted(name for name in os.listdir(self.node.hub_dir) if name.startswith("models--org--"))
        if not folders:
            return None
        repo_id = dice.choice(folders).removeprefix("models--").replace("--", "/")
        commits = self.node.visible(repo_id)
        return (repo_id, dice.choice(commits)) if commits else None

    def _keep_pinning(self) -> None:
        dice = random.Random(self._seed)
        with self.node.admin() as admin:
            while not self._over.wait(dice.uniform(0, 0.5)):
                if (one := self._cached(dice)) is None:
                    continue
                with self._expecting():
                    pinned = admin.pin(reference(*one))
                    self._over.wait(dice.uniform(0, 2))
                    for model in pinned:
                        assert self.node.snapshot(one[0], model.commit).is_dir(), f"{one} is pinned"
                        self.counts["looks while pinned"] += 1
                    admin.unpin(reference(*one))

    def _keep_evicting(self) -> None:
        dice = random.Random(self._seed + 1)
        with self.node.admin() as admin:
            while not self._over.wait(dice.uniform(0, 1)):
                if (one := self._cached(dice)) is not None:
                    with self._expecting():
                        admin.evict([reference(*one)], dry_run=False)
                        self.counts["evicted by an operator"] += 1

    def _keep_moving(self) -> None:
        dice = random.Random(self._seed + 2)
        version = 0
        while not self._over.wait(SECONDS_A_MOVE):
            version += 1
            self.models.commit(dice.choices(range(MODELS), self._weights)[0], version)
            self.counts["branches moved"] += 1

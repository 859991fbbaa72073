"""A cache with 2,000 snapshots and 100,000 files: how soon it is served, and how long looking at it takes.

``python -m tests.bench.scale CACHE_DIR`` chooses victims in one that no daemon has open.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelcached.cache import eviction
from modelcached.cache.core import Core
from modelcached.cache.recovery import recover
from modelcached.config import load
from modelcached.ledger import database as state
from modelcached.ledger.clock import Clock
from modelcached.ledger.space import Amount
from modelcached.ledger.use import UseLedger
from modelcached.pools import Pools
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout

from tests.bench import measure
from tests.bench.cases import MIB, Bench, Case, Column
from tests.bench.measure import ContenderError
from tests.bench.ours import OURS
from tests.bench.peers import Contender, Figures
from tests.node.daemon import BIN, Node
from tests.node.filling import Filling, fill
from tests.node.manager import Manager

FILLING = Filling()
_ROOT = str(Path(__file__).parents[2])
_TIMES = 20
_MANY_VICTIMS = 100
_LIMIT_SECONDS = 120.0


def _median_ms(work: Callable[[], object], times: int = _TIMES) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e3


def _page(node: Node) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/status.json", timeout=10) as answer:
        answer.read()


class Full(Contender):
    """A start on a warm disk, and what a client sees of it."""

    name = OURS

    def __init__(self, node: Node, environment: dict[str, str]) -> None:
        self._node, self._environment = node, environment

    def run(self) -> Figures:
        node, directory = self._node, self._node.root
        try:
            with Manager() as manager:
                seconds = manager.start(node, _LIMIT_SECONDS)
            with node.admin() as admin:
                if (models := admin.status().models) != FILLING.snapshots:
                    raise ContenderError(f"{models} models are served, not {FILLING.snapshots}")
                status_ms = _median_ms(admin.status)
                ls_ms = _median_ms(lambda: list(admin.cache.list_models()), 5)
                page_ms = _median_ms(lambda: _page(node), 1)  # those that come soon after share the answer
            verbs = {"cachectl_ls": ["ls"], "cachectl_status": ["status"], "cachectl_top": ["top", "--count", "1"]}
            processes = {
                name: measure.run([str(BIN / "cachectl"), *verb], node.client_environment, directory).seconds * 1e3
                for name, verb in verbs.items()
            }
            resident = measure.resident_bytes(node.ps.pid)
        except TimeoutError as error:
            raise ContenderError(f"not ready within {_LIMIT_SECONDS:g} s") from error
        finally:
            node.kill()
        argv = [sys.executable, "-m", "tests.bench.scale", str(node.cache_dir)]
        victims = json.loads(measure.run(argv, self._environment, directory).stdout.splitlines()[-1])
        return {
            "seconds": seconds,
            "status": status_ms,
            "ls": ls_ms,
            "page": page_ms,
            **processes,
            "mib": resident / MIB,
            **victims,
        }


@contextmanager
def _prepare(bench: Bench) -> Iterator[Sequence[Contender]]:
    node = Node(bench.directory / "node", "http://127.0.0.1:9", {"cache": {"budget": "100%"}, "log": {"level": "info"}})
    fill(node.cache_dir, FILLING)
    measure.sync(bench.directory)
    paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
    yield [Full(node, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))})]


SCALE = Case(
    "scale",
    f"{FILLING.snapshots} snapshots of {FILLING.files} files each",
    (
        Column("seconds", "s to READY"),
        Column("mib", "MiB resident", 0),
        Column("status", "status ms", 1),
        Column("ls", "list ms", 0),
        Column("page", "status page ms", 0),
        Column("cachectl_ls", "cachectl ls ms", 0),
        Column("cachectl_status", "cachectl status ms", 0),
        Column("cachectl_top", "cachectl top ms", 0),
        Column("one", "1 victim ms"),
        Column("many", f"{_MANY_VICTIMS} victims ms"),
        Column("all", "all victims ms", 0),
    ),
    _prepare,
)


async def _victims(cache_dir: str) -> dict[str, Any]:
    layout, pools, clock = Layout(cache_dir), Pools.start(1), Clock.system()
    connection = state.connect(layout.state_db)
    contents = state.contents(connection)
    database = state.Database(connection)
    use = UseLedger(database, contents, clock, reconnect_grace_seconds=60)
    config = load(None, {"cache": {"dir": cache_dir, "budget": "100%"}})
    core = Core(config, layout, Disk(), pools, database, use, clock, lambda _event: None)
    try:
        await recover(core, lost="")
        every, freed = eviction.plan(core, Amount(core.space.used_bytes))
        many = sum(victim.freed_bytes for victim in every[:_MANY_VICTIMS])
        return {
            "one": _median_ms(lambda: eviction.plan(core, Amount(1))),
            "many": _median_ms(lambda: eviction.plan(core, Amount(many))),
            "all": _median_ms(lambda: eviction.plan(core, freed), 5),
        }
    finally:
        pools.stop()
        database.close()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(_victims(sys.argv[1]))) + "\n")

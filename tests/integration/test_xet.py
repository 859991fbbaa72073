"""Files of the Hub's Xet store come through hf_xet in a process of its own, verified, or else over HTTP."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from modelcached.ledger.clock import Clock
from modelcached.model import Digest
from modelcached.store import journal

from tests.hub import KIB, MIB, Fault, FaultKind, Hub, Synthetic
from tests.hub.cas import CHUNK_BYTES, FULL_XORB_BYTES
from tests.node import Node

SIZE = 40 * MIB + 12_345
XORB = 1 * MIB
MODEL, WEIGHTS = "org/model", "model.safetensors"


def commit(hub: Hub, *, size: int = SIZE, xorb_bytes: int = XORB, seed: int = 7, name: str = MODEL) -> Digest:
    """A model whose weights are in the store; their digest."""
    hub.cas.xorb_bytes = xorb_bytes
    repo = hub.create_repo(name)
    repo.commit({"config.json": b"{}", WEIGHTS: Synthetic(size, seed)}, xet=True)
    digest = Digest.parse(repo.files()[WEIGHTS].etag)
    assert digest is not None
    return digest


def assert_right(ready: dict[str, Any], digest: Digest) -> None:
    """What readers see is what the digest says."""
    found = hashlib.sha256((Path(ready["path"]) / WEIGHTS).read_bytes())
    assert found.hexdigest() == digest.hex


def content_sent(hub: Hub, kind: str, name: str = MODEL) -> int:
    """Bytes of the weights sent in bodies of that kind."""
    sent = [r.bytes_sent for r in hub.requests() if r.kind == kind and r.repo == name and r.is_content]
    return sum(sent) * CHUNK_BYTES // (CHUNK_BYTES + 8) if kind == "xorb" else sum(sent)


def journalled(node: Node, digest: Digest) -> int:
    """How much of the weights a restart would keep."""
    try:
        content = (node.private / "partial" / f"{digest}.journal").read_bytes()
    except FileNotFoundError:
        return 0
    reading = journal.read(content, digest, Clock.system().boot_id)
    return reading.trusted.total if reading is not None else 0


def children(node: Node) -> list[psutil.Process]:
    """The daemon's processes that read from the store."""
    alive = []
    for child in node.ps.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                alive.append(child)
    return alive


def assert_no_process_stays(node: Node) -> None:
    """One that has nothing to do ends soon."""
    node.wait_until(lambda: children(node) == [], 6, "the process for Xet has ended")


@contextmanager
def under_way(
    hub: Hub, node: Node, digest: Digest, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[psutil.Process]:
    """A request some of whose weights are kept already, while the last hardly come in; the process that reads them.

    A rate would not do: hf_xet asks for xorbs in any order, so at times all is sent before it gives the first bytes.
    """
    rest = hub.faults.add(Fault(FaultKind.TRICKLE, where="xorb", from_xorb=SIZE // XORB, seconds_per_byte=0.1))
    with node.popen("ensure-model", "--json", MODEL, *arguments, env=env) as waiting:
        try:
            node.wait_until(lambda: journalled(node, digest) >= 4 * MIB, 20, "bytes of the weights are kept")
            (child,) = children(node)
            yield child
        finally:
            waiting.kill()
            hub.faults.remove(rest)


@pytest.mark.parametrize("xorb_bytes", [XORB, FULL_XORB_BYTES])
def test_weights_come_from_the_store_once(hub: Hub, node: Node, xorb_bytes: int) -> None:
    size = SIZE if xorb_bytes < SIZE else FULL_XORB_BYTES + SIZE
    digest = commit(hub, size=size, xorb_bytes=xorb_bytes)
    (ready,) = node.ensure(MODEL)
    assert_right(ready, digest)
    assert content_sent(hub, "xorb") == pytest.approx(size, abs=KIB)
    assert hub.request_count(kind="cdn") == 0
    assert hub.request_count(kind="token") == 1
    assert ready["bytes_fetched"] == size + 2
    assert node.metric("modelcached_fetched_bytes_total", origin="xet") == size
    assert_no_process_stays(node)
    node.assert_disk_truth()


def test_an_older_store_without_v2_serves_as_well(hub: Hub, node: Node) -> None:
    hub.cas.speaks_v2 = False
    digest = commit(hub)
    assert_right(node.ensure(MODEL)[0], digest)
    assert hub.request_count(kind="cdn") == 0


def test_small_files_and_nodes_without_xet_use_http(hub: Hub, make_node: Callable[..., Node]) -> None:
    commit(hub, size=MIB, name="org/small")
    digest = commit(hub)
    node = make_node(transfer={"xet": False}).start()
    assert_right(node.ensure(MODEL)[0], digest)
    node.settings["transfer"]["xet"] = True
    node.write_config()
    node.ps.send_signal(signal.SIGHUP)
    node.wait_until(lambda: "transfer.xet" in node.log_text(), 10, "the reload")
    node.ensure("org/small")
    assert hub.request_count(kind="token") == 0
    assert hub.request_count(kind="reconstruction") == 0


def fault(kind: FaultKind, where: Any, **more: Any) -> Callable[[], Fault]:
    return lambda: Fault(kind, where=where, **more)


# What goes wrong, and how the right bytes come all the same: over Xet, or over HTTP in the end.
FAULTS = {
    "token 401": (fault(FaultKind.STATUS, "token", status=401), "http"),
    "token 403": (fault(FaultKind.STATUS, "token", status=403), "http"),
    "token 404": (fault(FaultKind.STATUS, "token", status=404), "http"),
    "token 500": (fault(FaultKind.STATUS, "token", status=500), "http"),
    "token 500 once": (fault(FaultKind.STATUS, "token", status=500, times=1), "xet"),
    "token 429 once": (fault(FaultKind.STATUS, "token", status=429, retry_after=1, times=1), "xet"),
    "token silent": (fault(FaultKind.SILENT, "token"), "http"),
    "token trickles": (fault(FaultKind.TRICKLE, "token", seconds_per_byte=1.0), "http"),
    "reconstruction 401": (fault(FaultKind.STATUS, "reconstruction", status=401), "http"),
    "reconstruction 401 once": (fault(FaultKind.STATUS, "reconstruction", status=401, times=1), "xet"),
    "reconstruction 403": (fault(FaultKind.STATUS, "reconstruction", status=403), "http"),
    "reconstruction 404": (fault(FaultKind.STATUS, "reconstruction", status=404), "http"),
    "reconstruction 500": (fault(FaultKind.STATUS, "reconstruction", status=500), "http"),
    "reconstruction silent": (fault(FaultKind.SILENT, "reconstruction"), "http"),
    "reconstruction silent once": (fault(FaultKind.SILENT, "reconstruction", times=1), "xet"),
    "early clean end": (fault(FaultKind.SHORT_PLAN, "reconstruction"), "http"),
    "early clean end once": (fault(FaultKind.SHORT_PLAN, "reconstruction", times=1), "xet"),
    "xorb expired": (fault(FaultKind.EXPIRE_URL, "xorb", times=2), "xet"),
    "xorb 404": (fault(FaultKind.STATUS, "xorb", status=404), "http"),
    "xorb 429": (fault(FaultKind.STATUS, "xorb", status=429, retry_after=1), "http"),
    "xorb 500": (fault(FaultKind.STATUS, "xorb", status=500), "http"),
    "xorb 500 once": (fault(FaultKind.STATUS, "xorb", status=500, times=1), "xet"),
    "xorb reset": (fault(FaultKind.RESET, "xorb", at_fraction=0.5), "http"),
    "xorb reset once": (fault(FaultKind.RESET, "xorb", at_fraction=0.5, times=1), "xet"),
    "xorb clean close": (fault(FaultKind.CLOSE, "xorb", at_fraction=0.5), "http"),
    "xorb clean close once": (fault(FaultKind.CLOSE, "xorb", at_fraction=0.5, times=1), "xet"),
    "xorb stall": (fault(FaultKind.STALL, "xorb", at_fraction=0.5), "http"),
    "xorb stall once": (fault(FaultKind.STALL, "xorb", at_fraction=0.5, times=1), "xet"),
    "xorb flipped byte": (fault(FaultKind.FLIPPED_BYTE, "xorb", at_byte=1000, times=1), "http"),
}


@pytest.mark.deep
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_the_store_ends_in_the_right_bytes(hub: Hub, node: Node, name: str) -> None:
    make, way = FAULTS[name]
    digest = commit(hub)
    wrong = hub.faults.add(make())
    assert_right(node.ensure(MODEL)[0], digest)
    assert wrong.fired > 0
    assert (hub.request_count(kind="cdn") > 0) == (way == "http")
    assert_no_process_stays(node)


def test_http_goes_on_from_where_xet_failed(hub: Hub, node: Node) -> None:
    digest = commit(hub)
    with under_way(hub, node, digest) as child:
        hub.faults.add(Fault(FaultKind.STATUS, where="xorb", status=500))
        child.kill()
        assert_right(node.ensure(MODEL)[0], digest)
    (line,) = node.log_lines("going on from another origin")
    assert line["done_bytes"] >= XORB
    assert "Xet ended" in line["why"]
    assert content_sent(hub, "cdn") == SIZE - line["done_bytes"]
    assert node.metric("modelcached_fetched_bytes_total", origin="xet") == line["done_bytes"]


def test_a_store_that_fails_two_files_is_left_alone(hub: Hub, node: Node) -> None:
    names = [f"{number}.safetensors" for number in range(4)]
    hub.create_repo(MODEL).commit({name: Synthetic(SIZE, n) for n, name in enumerate(names)}, xet=True)
    hub.faults.add(Fault(FaultKind.STATUS, where="reconstruction", status=401))
    node.ensure(MODEL, "--profile", "full")
    tried = {record.file for record in hub.requests() if record.kind == "reconstruction"}
    assert len(tried) == 2
    assert len(node.log_lines("going on from another origin")) == 4


def test_after_a_cancel_no_traffic_goes_on(hub: Hub, node: Node) -> None:
    digest = commit(hub)
    with under_way(hub, node, digest) as child:
        with node.admin() as admin:
            admin.cancel_transfer(MODEL)
        child.wait(5)
        assert children(node) == []
        assert hub.wait_until(lambda: all(r.finished for r in hub.requests() if r.kind == "xorb"))
        asked, sent = len(hub.requests()), content_sent(hub, "xorb")
        # In a second ten bytes would come in by each connection.
        more = hub.wait_until(
            lambda: len(hub.requests()) > asked or content_sent(hub, "xorb") > sent, timedelta(seconds=1)
        )
        assert not more
        assert sent < SIZE


def test_it_goes_on_after_a_kill_of_the_daemon(hub: Hub, node: Node) -> None:
    digest = commit(hub)
    with under_way(hub, node, digest) as child:
        child.suspend()  # so that it cannot notice by itself
        node.kill()
        try:
            gone, left = psutil.wait_procs([child], timeout=5)
            assert (gone, left) == ([child], [])
        finally:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        done = journalled(node, digest)
        assert 4 * MIB <= done < SIZE
        hub.reset_counters()
        hub.faults.clear()
        node.start()
        assert_right(node.ensure(MODEL)[0], digest)
    assert done + content_sent(hub, "xorb") <= SIZE + CHUNK_BYTES
    assert hub.request_count(kind="cdn") == 0
    node.assert_disk_truth()


def test_a_process_that_hangs_is_killed_and_another_goes_on(hub: Hub, node: Node) -> None:
    digest = commit(hub)
    with under_way(hub, node, digest) as child:
        child.suspend()
        child.wait(10)
        hub.faults.clear()
        assert_right(node.ensure(MODEL)[0], digest)
    assert hub.request_count(kind="cdn") == 0


def test_a_process_that_dies_is_replaced(hub: Hub, node: Node) -> None:
    digest = commit(hub)
    with under_way(hub, node, digest) as child:
        child.kill()
        hub.faults.clear()
        assert_right(node.ensure(MODEL)[0], digest)
    assert "exit status -9" in node.log_text()
    assert hub.request_count(kind="cdn") == 0


def test_a_piece_that_takes_longer_than_the_stall_timeout_is_no_stall(hub: Hub, node: Node) -> None:
    digest = commit(hub, size=20 * MIB, xorb_bytes=20 * MIB)
    hub.rate = 5 * MIB  # four seconds for one piece; the stall timeout is two
    assert_right(node.ensure(MODEL)[0], digest)
    assert hub.request_count(kind="reconstruction") == 1
    assert hub.request_count(kind="cdn") == 0


def test_no_token_is_seen_where_others_can_look(hub: Hub, node: Node) -> None:
    secret = "hf_" + "s3cret" * 6
    hub.tokens.add(secret)
    digest = commit(hub)
    repo = hub.find_repo(MODEL)
    assert repo is not None
    repo.private = True
    repo.allow(secret)
    with under_way(hub, node, digest, "--pass-token", env={"HF_TOKEN": secret}) as child:
        seen = " ".join(child.cmdline()) + str(child.environ())
        own = {record.authorization for record in hub.requests() if record.kind == "reconstruction"}
        child.kill()  # so that there is something to say in the log
        node.wait_until(lambda: node.log_lines("retrying a range"), 10, "a retry is logged")
    (bearer,) = own
    assert bearer is not None
    assert bearer != f"Bearer {secret}"
    xet_token = bearer.removeprefix("Bearer ")
    for text in (seen, node.log_text()):
        assert secret not in text
        assert xet_token not in text
        assert "signature=" not in text
    for record in hub.requests():
        if record.kind in ("token", "reconstruction", "xorb"):
            expected = {"token": f"Bearer {secret}", "reconstruction": bearer, "xorb": None}[record.kind]
            assert record.authorization in (expected, *own)


def test_one_stream_at_a_time_and_nobody_else_waits_for_it(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(transfer={"stall_timeout": "30s"}).start()
    names = [f"{number}.safetensors" for number in range(3)]
    hub.create_repo(MODEL).commit({name: Synthetic(SIZE, n) for n, name in enumerate(names)}, xet=True)
    hub.create_repo("org/plain").commit({"model.safetensors": Synthetic(2 * MIB, 9)})
    hub.gate_bodies.close("?.safetensors")
    with node.popen("ensure-model", MODEL, "--profile", "full") as waiting:
        try:
            assert hub.gate_bodies.wait_for_waiting(1)
            node.ensure("org/plain", "--profile", "full")
            assert len(children(node)) == 1
            hub.gate_bodies.open()
            hub.rate = 100 * MIB
            most = 0
            while waiting.poll() is None:
                most = max(most, len(children(node)))
                time.sleep(0.01)
        except BaseException:
            waiting.kill()
            raise
    assert waiting.returncode == 0
    assert most == 1
    assert hub.request_count(kind="cdn", repo=MODEL) == 0


def test_one_process_reads_file_after_file_and_the_next_model_after_a_failure_gets_another(
    hub: Hub, node: Node
) -> None:
    names = [f"{number}.safetensors" for number in range(4)]
    hub.create_repo(MODEL).commit({name: Synthetic(SIZE, n) for n, name in enumerate(names)}, xet=True)
    hub.rate = 200 * MIB
    seen: set[int] = set()
    with node.popen("ensure-model", MODEL, "--profile", "full") as waiting:
        while waiting.poll() is None:
            seen |= {child.pid for child in children(node)}
            time.sleep(0.01)
    assert waiting.returncode == 0
    assert len(seen) == 1
    assert hub.request_count(kind="cdn") == 0
    digest = commit(hub, name="org/next", seed=9)
    once = hub.faults.add(Fault(FaultKind.STATUS, where="reconstruction", status=404, times=1))
    (ready,) = node.ensure("org/next")
    assert_right(ready, digest)
    assert once.fired == 1
    assert hub.request_count(kind="cdn") == 0, "its next try is over Xet again, from another process"
    assert_no_process_stays(node)


@pytest.mark.deep
def test_full_xorbs_stay_under_600_mib_with_the_process_counted(hub: Hub, node: Node) -> None:
    digest = commit(hub, size=12 * FULL_XORB_BYTES, xorb_bytes=FULL_XORB_BYTES)
    idle, most = node.ps.memory_info().rss, 0
    with node.popen("ensure-model", MODEL) as waiting:
        while waiting.poll() is None:
            most = max(most, sum(rss(process) for process in (node.ps, *children(node))))
            time.sleep(0.01)
    assert waiting.returncode == 0
    assert hub.request_count(kind="cdn") == 0
    print(f"peak above idle: {(most - idle) / MIB:.0f} MiB")
    assert 100 * MIB < most - idle < 600 * MIB
    assert_right(node.ensure(MODEL)[0], digest)


def rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0

"""What lies on the disk is read again: bits that rot are found, kept from new readers, and fetched anew."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import MIB, Hub, Synthetic
from tests.node.daemon import Node

SIZE = 4 * MIB
SECONDS = 30.0
EAGER = {"interval": "1s", "rate": "1GB"}
LATER = {"interval": "365d", "rate": "1GB"}


def rot(path: Path) -> None:
    """Another byte, the same size and times."""
    status = path.stat()
    os.chmod(path, 0o644)
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.chmod(path, 0o444)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class Model:
    """A cached model, and its weights on the disk."""

    def __init__(self, node: Node, hub: Hub, name: str, seed: int, size: int = SIZE) -> None:
        self.node, self.hub, self.name = node, hub, name
        self.content = Synthetic(size, seed)
        self.commit = hub.create_repo(f"org/{name}").commit(
            {"config.json": f'"{name}"'.encode(), "model.safetensors": self.content}
        )
        self.blob = node.hub_dir / f"models--org--{name}/blobs/{self.content.sha256()}"

    def ensure(self, *flags: str) -> str:
        done = self.node.run("ensure-model", f"org/{self.name}", *flags, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stderr

    @property
    def is_right(self) -> bool:
        weights = self.node.snapshot(f"org/{self.name}", self.commit) / "model.safetensors"
        try:
            return weights.read_bytes() == b"".join(self.content.blocks())
        except FileNotFoundError:
            return False

    def fetched(self) -> dict[str, int]:
        return {path: self.hub.body_bytes(f"org/{self.name}", path) for path in ("config.json", "model.safetensors")}


@pytest.fixture
def calm(make_node: Callable[..., Node]) -> Node:
    """A node that does not scrub yet."""
    return make_node(scrub=LATER).start()


def scrub(node: Node, **settings: str) -> None:
    node.settings["scrub"] = {**EAGER, **settings}
    node.write_config()
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)


def test_an_idle_model_goes_out_of_sight_and_only_its_bad_blob_is_fetched_again(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    other = Model(calm, hub, "two", 2)
    for one in (model, other):
        one.ensure()
    calm.release_all()
    hub.reset_counters()
    rot(model.blob)
    assert "hit" in model.ensure(), "a stat cannot see it"
    calm.release_all()
    scrub(calm)
    calm.wait_until(lambda: calm.metric("modelcached_scrub_failures_total") == 1, SECONDS, "it is found")
    calm.wait_until(lambda: model.is_right, SECONDS, "it is whole again")
    assert model.fetched() == {"config.json": 0, "model.safetensors": SIZE}
    assert other.fetched() == {"config.json": 0, "model.safetensors": 0}
    assert "hit" in model.ensure()
    (kept,) = (calm.private / "quarantine").iterdir()
    assert kept.name == model.content.sha256()
    assert not kept.samefile(model.blob)
    assert calm.metric("modelcached_blobs_condemned_total") == 1
    # The other model is read while the first is mended.
    calm.wait_until(lambda: calm.metric("modelcached_scrubbed_bytes_total") >= 2 * SIZE, SECONDS, "both are read")
    calm.assert_disk_truth()
    assert os.listdir(calm.private / "trash") == []


def test_a_leased_model_stays_in_sight_and_is_mended_beside(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    rot(model.blob)
    with model.blob.open("rb") as reader:
        before = os.fstat(reader.fileno()).st_ino
        hub.gate.close("model.safetensors")
        scrub(calm)
        calm.wait_until(lambda: calm.status().degraded, SECONDS, "it is said")
        (text,) = calm.status().degraded
        assert "org/one" in text
        assert "is in use and its blob" in text
        assert calm.visible("org/one") == [model.commit]
        assert model.blob.stat().st_ino == before, "a link that leads nowhere would help nobody"
        assert len(calm.ctl("leases")) == 1
        hub.gate.open()
        calm.wait_until(lambda: model.is_right, SECONDS, "the fresh one has taken its place")
        assert os.fstat(reader.fileno()).st_nlink == 1, "who has it open has it still, as quarantine does"
    calm.wait_until(lambda: not calm.status().degraded, SECONDS, "it is over")
    assert len(calm.ctl("leases")) == 1
    assert "hit" in model.ensure()
    calm.assert_disk_truth()


def test_a_pin_outlives_the_mending(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    calm.ctl("pin", "org/one")
    calm.release_all()
    rot(model.blob)
    scrub(calm)
    calm.wait_until(lambda: calm.metric("modelcached_scrub_failures_total") == 1, SECONDS, "it is found")
    calm.wait_until(lambda: model.is_right, SECONDS, "it is whole again")
    calm.wait_until(lambda: [m["pinned"] for m in calm.ctl("ls")] == [True], SECONDS, "the pin holds it")


def test_one_inode_under_two_names_is_mended_under_both(hub: Hub, calm: Node) -> None:
    model, twin = Model(calm, hub, "one", 1), Model(calm, hub, "twin", 1)
    model.ensure()
    twin.ensure()
    assert model.blob.samefile(twin.blob)
    calm.release_all()
    hub.reset_counters()
    rot(model.blob)
    scrub(calm)
    calm.wait_until(lambda: calm.metric("modelcached_scrub_failures_total") == 1, SECONDS, "it is found")
    calm.wait_until(lambda: model.is_right and twin.is_right, SECONDS, "both are whole again")
    assert model.fetched()["model.safetensors"] + twin.fetched()["model.safetensors"] <= 2 * SIZE
    assert "hit" in model.ensure()
    assert "hit" in twin.ensure()
    calm.assert_disk_truth()


def test_what_cannot_be_fetched_again_is_not_served(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1)
    model.ensure()
    calm.release_all()
    rot(model.blob)
    hub.refuse(True)
    scrub(calm)
    calm.wait_until(lambda: not calm.visible("org/one"), SECONDS, "nobody sees it any more")
    done = calm.run("ensure-model", f"org/one@{model.commit}", timeout=SECONDS)
    assert done.returncode != 0
    assert not model.blob.exists()
    calm.assert_disk_truth()
    hub.refuse(False)
    hub.reset_counters()
    model.ensure()
    assert model.is_right
    assert model.fetched() == {"config.json": 0, "model.safetensors": SIZE}


@pytest.mark.deep
def test_who_was_read_longest_ago_is_read_first_and_a_restart_does_not_begin_anew(hub: Hub, calm: Node) -> None:
    models = [Model(calm, hub, f"m{number}", number) for number in range(3)]
    for number, model in enumerate(models):
        model.ensure()
        age = 86_400 * (10 - number)
        os.utime(model.blob, (time.time() - age, time.time() - age))
        calm.run("ensure-model", f"org/{model.name}")  # hashed anew, for it looks different now
    scrub(calm, interval="7d")
    calm.wait_until(lambda: calm.metric("modelcached_scrubbed_bytes_total") == 3 * SIZE, SECONDS, "all that is due")
    read = [line["digest"] for line in calm.log_lines("read again")]
    assert read == [model.content.sha256() for model in models]
    calm.wait_until(lambda: calm.metric("modelcached_oldest_check_age_seconds") < 3600, SECONDS, "all were read")
    calm.kill()
    calm.start()
    calm.wait_until(lambda: "modelcached_oldest_check_age_seconds" in scraped(calm), SECONDS, "it has looked")
    assert calm.metric("modelcached_oldest_check_age_seconds") < 3600
    assert calm.metric("modelcached_scrubbed_bytes_total") == 0


def test_a_stop_does_not_wait_for_a_slow_reading(hub: Hub, calm: Node) -> None:
    model = Model(calm, hub, "one", 1, size=16 * MIB)  # the first 4 are read at once, and owed
    model.ensure()
    calm.release_all()
    scrub(calm, rate="100KB")
    calm.wait_until(lambda: has_open(calm, model.blob), SECONDS, "it reads")
    began = time.monotonic()
    calm.terminate()
    assert time.monotonic() - began < 10


def test_a_rate_of_nothing_turns_it_off(hub: Hub, make_node: Callable[..., Node]) -> None:
    node = make_node(scrub={"interval": "1s", "rate": "0B"}).start()
    model = Model(node, hub, "one", 1)
    model.ensure()
    rot(model.blob)
    node.wait_until(lambda: node.metric("modelcached_upkeep_runs_total", loop="scrub", outcome="ok") > 0, 60, "a turn")
    assert node.metric("modelcached_scrubbed_bytes_total") == 0
    assert not model.is_right


def has_open(node: Node, path: Path) -> bool:
    return any(
        os.readlink(link) == str(path) for link in Path(f"/proc/{node.ps.pid}/fd").iterdir() if link.is_symlink()
    )


def scraped(node: Node) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text

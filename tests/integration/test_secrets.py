"""A token goes to its own host and nowhere else: not to argv, logs, disk, metrics, status, nor another address."""

from __future__ import annotations

import os
import stat
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from modelcache.errors import ModelCacheError

from tests.hub import MIB, Fault, FaultKind, Hub, Synthetic
from tests.node.daemon import Node, reference

OWN_TOKEN = "hf_ownTokenOfTheDaemon0123456789"
PASSED_TOKEN = "hf_passedByTheClient9876543210xyz"
REFUSED_TOKEN = "hf_refusedByTheHubAndStillSecret0"
ALL = (OWN_TOKEN, PASSED_TOKEN, REFUSED_TOKEN)


@pytest.fixture
def mirror() -> Iterator[Hub]:
    """A second endpoint, asked when the first does not answer."""
    with Hub() as running:
        yield running


@pytest.fixture
def gated(hub: Hub) -> str:
    repo = hub.create_repo("org/gated", gated=True)
    repo.commit({"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 1)})
    hub.tokens |= {OWN_TOKEN, PASSED_TOKEN}
    repo.allow(OWN_TOKEN)
    repo.allow(PASSED_TOKEN)
    return "org/gated"


@pytest.fixture
def node_with_token(hub: Hub, make_node: Callable[..., Node], tmp_path: Path) -> Node:
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(f"{OWN_TOKEN}\n")
    return make_node(hub={"token_file": str(token_file)}).start()


def pass_token(node: Node, token: str, *arguments: str) -> int:
    return node.run("ensure-model", "--pass-token", *arguments, env={"HF_TOKEN": token}).returncode


def said_by(node: Node, *clients: str) -> str:
    """All that the daemon shows anybody."""
    status = str(node.status())
    listed = "".join(str(node.ctl(verb)) for verb in ("status", "ls", "leases"))
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert "modelcached_used_bytes" in metrics
    return "".join((node.log_text(), status, listed, metrics, *clients))


def files_that_hold(root: Path, secret: str) -> list[str]:
    found = []
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode) and secret.encode() in path.read_bytes():
                found.append(str(path))
    return found


def authorised(hub: Hub) -> set[tuple[str, str | None]]:
    return {(request.kind, request.authorization) for request in hub.requests()}


def test_the_token_opens_the_gate(hub: Hub, node_with_token: Node, gated: str) -> None:
    """Without this the others would prove nothing."""
    (answer,) = node_with_token.ensure(gated)
    assert answer["outcome"] == "downloaded"
    assert ("api", f"Bearer {OWN_TOKEN}") in authorised(hub)
    assert ("resolve", f"Bearer {OWN_TOKEN}") in authorised(hub)


def test_no_token_reaches_the_cdn(hub: Hub, node_with_token: Node, gated: str) -> None:
    node_with_token.ensure(gated)
    assert hub.request_count(kind="cdn") > 0
    assert {authorization for kind, authorization in authorised(hub) if kind == "cdn"} == {None}
    assert not [r for r in hub.requests() if r.kind == "cdn" and OWN_TOKEN in f"{r.path}?{r.query}{r.headers}"]


def test_a_passed_token_is_used_instead_of_the_daemons_and_only_for_that_request(
    hub: Hub, node_with_token: Node, gated: str
) -> None:
    assert pass_token(node_with_token, PASSED_TOKEN, gated) == 0
    sent = {authorization for _, authorization in authorised(hub)}
    assert sent == {f"Bearer {PASSED_TOKEN}", None}
    hub.reset_counters()
    hub.create_repo("org/open").commit({"config.json": b"[]", "model.safetensors": Synthetic(MIB, 2)})
    node_with_token.ensure("org/open")
    assert PASSED_TOKEN not in str(authorised(hub))


def test_anonymous_means_that_no_token_is_sent(hub: Hub, make_node: Callable[..., Node], tmp_path: Path) -> None:
    node = make_node()
    home = tmp_path / "hf-home"
    home.mkdir()
    (home / "token").write_text(OWN_TOKEN)
    node.environment = {"HF_TOKEN": OWN_TOKEN, "HF_HOME": str(home)}
    node.start()
    hub.create_repo("org/open").commit({"config.json": b"{}", "model.safetensors": Synthetic(MIB, 2)})
    node.ensure("org/open", env={"HF_TOKEN": PASSED_TOKEN})
    assert {authorization for _, authorization in authorised(hub)} == {None}, "not the machine's own, not the client's"


def test_no_token_reaches_a_mirror(
    hub: Hub, mirror: Hub, make_node: Callable[..., Node], tmp_path: Path, gated: str
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(OWN_TOKEN)
    endpoints = [hub.endpoint, mirror.endpoint]
    node = make_node(
        hub={"endpoints": endpoints, "token_file": str(token_file)}, transfer={"retry_timeout": "1s"}
    ).start()
    files = {"config.json": b"{}", "model.safetensors": Synthetic(2 * MIB, 3)}
    mirror.create_repo("org/mirrored").commit(files)
    hub.faults.add(Fault(FaultKind.STATUS, where="api", status=503))
    pass_token(node, PASSED_TOKEN, "org/mirrored")
    node.run("ensure-model", "org/mirrored", "--revision", mirror.find_repo("org/mirrored").resolve("main").sha)
    assert mirror.request_count(kind="api") > 1, "the mirror was asked, with the passed token and with our own"
    assert {authorization for _, authorization in authorised(mirror)} == {None}
    seen = "".join(f"{request.path}{request.query}{request.headers}" for request in mirror.requests())
    assert not [token for token in ALL if token in seen]


def test_a_next_page_on_another_host_is_not_asked_for(hub: Hub, mirror: Hub, node_with_token: Node, gated: str) -> None:
    """The token would go with it."""
    mirror.create_repo(gated).commit({"config.json": b"{}"})
    elsewhere = f"{mirror.endpoint}/api/models/{gated}/tree/main?cursor=2"
    link = {"Link": f'<{elsewhere}>; rel="next"', "Content-Type": "application/json"}
    hub.faults.add(Fault(FaultKind.STATUS, where="api", path="tree", status=200, headers=link, body=b"[]"))
    done = node_with_token.run("ensure-model", gated)
    assert (done.returncode, "next page to another host" in done.stderr) == (69, True), done.stderr
    assert hub.request_count(path_glob="tree") > 0
    assert mirror.requests() == []


def test_no_token_in_what_is_said_written_or_run(hub: Hub, node_with_token: Node, gated: str) -> None:
    """Log level debug; a hit, a refusal, errors from the API and in mid-body, and an unexpected one with traceback."""
    node, outputs = node_with_token, []
    hub.rate = 2 * MIB
    slow = node.popen("ensure-model", "--pass-token", gated, env={"HF_TOKEN": PASSED_TOKEN})
    assert hub.wait_until(lambda: hub.body_bytes(gated, "model.safetensors") > 0)
    arguments = [" ".join(process.cmdline()) for process in (node.ps, psutil.Process(slow.pid))]
    arguments += [" ".join(child.cmdline()) for child in node.ps.children(recursive=True)]
    assert len(arguments) >= 2
    assert not [token for token in ALL if token in "".join(arguments)]
    assert not [token for token in ALL if token in str(node.ps.environ())]
    hub.rate = None
    outputs += slow.communicate(timeout=30)
    assert slow.returncode == 0
    node.ensure(gated)

    done = node.run("ensure-model", "--pass-token", gated, env={"HF_TOKEN": REFUSED_TOKEN})
    assert done.returncode == 77
    outputs += [done.stdout, done.stderr]
    hub.create_repo("org/broken").commit({"config.json": b"[]", "model.safetensors": Synthetic(2 * MIB, 2)})
    for fault in (
        Fault(FaultKind.STATUS, where="api", status=401, times=2),
        Fault(FaultKind.STATUS, where="api", status=500, times=2),
        Fault(FaultKind.WRONG_BYTES, where="cdn", times=4),
        Fault(FaultKind.RESET, where="cdn", at_byte=1000, times=2),
    ):
        hub.faults.add(fault)
        done = node.run("ensure-model", "--pass-token", "org/broken", env={"HF_TOKEN": PASSED_TOKEN}, timeout=60)
        outputs += [done.stdout, done.stderr]
    hub.faults.clear()
    # An unexpected error, with its traceback, in the middle of a request that carries a token.
    hub.create_repo("org/denied").commit({"config.json": b"[1]"})
    (node.hub_dir / "models--org--denied").write_text("not a directory")
    done = node.run("ensure-model", "--pass-token", "org/denied", env={"HF_TOKEN": PASSED_TOKEN})
    assert done.returncode != 0
    outputs += [done.stdout, done.stderr]

    shown = said_by(node, *outputs)
    assert not [token for token in ALL if token in shown]
    node.terminate()
    for token in ALL:
        assert files_that_hold(node.cache_dir, token) == []
        assert files_that_hold(node.root, token) == []
    assert (node.private / "state.db").exists()


def test_a_refusal_does_not_quote_the_token(hub: Hub, node: Node) -> None:
    with node.client() as client, pytest.raises(ModelCacheError) as caught:
        list(client.ensure(reference("org/unknown"), token=PASSED_TOKEN))
    assert PASSED_TOKEN not in f"{caught.value.message}{caught.value.metadata}{caught.value!r}"


def test_a_token_that_could_not_be_a_header_is_refused_by_name_not_by_value(hub: Hub, node: Node) -> None:
    for bad in ("two\r\nlines: hf_secretPart", "snowman \u2603 hf_secretPart", "hf_secretPart " * 1000):
        with node.client() as client, pytest.raises(ModelCacheError) as caught:
            list(client.ensure(reference("org/open"), token=bad))
        assert caught.value.reason == "INVALID_REQUEST"
        assert "hf_secretPart" not in f"{caught.value.message}{caught.value.metadata}"
    assert "hf_secretPart" not in node.log_text()
    assert hub.request_count(kind="api") == 0


@pytest.mark.parametrize(
    "content", [b"hf_secretPart\nand a second line", b"hf_secretPart \xff\xfe", b"hf_secretPart\0"]
)
def test_a_token_file_that_holds_no_token_is_named_and_not_quoted(
    hub: Hub, make_node: Callable[..., Node], tmp_path: Path, content: bytes
) -> None:
    token_file = tmp_path / "token"
    token_file.write_bytes(content)
    node = make_node(hub={"token_file": str(token_file)}).start()
    hub.create_repo("org/closed", private=True).commit({"config.json": b"{}"})
    done = node.run("ensure-model", "org/closed")
    assert done.returncode == 77
    assert str(token_file) in done.stderr
    assert "hf_secretPart" not in done.stderr + node.log_text() + str(node.status())
    assert [request.authorization for request in hub.requests()] == [None], "asked as by anybody"

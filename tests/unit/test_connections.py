"""How one connection is made: through which proxy, by which certificate, and what is said where it is not."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modelcached.errors import Reason
from modelcached.model import Algorithm, Commit, Digest, FileEntry, RepoId
from modelcached.sources.abort import Abort
from modelcached.sources.connections import Connection
from modelcached.sources.faults import TransientError
from modelcached.sources.http import HttpSource, RemoteFile
from modelcached.sources.network import Network
from modelcached.sources.proxies import Proxies

from tests.hub import MIB, Hub, Synthetic
from tests.hub.proxy import HttpProxy
from tests.hub.tls import Authority, TlsFront

REPO, LARGE = RepoId("org/name"), "model.safetensors"
SIZE = 8 * MIB


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.create_repo(REPO).commit({LARGE: Synthetic(SIZE)})
        yield running


@pytest.fixture
def trusted(tmp_path: Path) -> tuple[Authority, Path]:
    authority = Authority()
    return authority, authority.write(tmp_path / "ca.pem")


def front(hub: Hub, authority: Authority, *names: str, cdn: bool = False) -> TlsFront:
    endpoint = hub.cdn_endpoint if cdn else hub.endpoint
    return TlsFront(authority.certificate(*names), int(endpoint.rpartition(":")[2]))


def remote(hub: Hub, endpoint: str) -> RemoteFile:
    repo = hub.find_repo(REPO)
    file = repo.files()[LARGE]
    entry = FileEntry(LARGE, file.size, Digest(Algorithm.SHA256, file.etag), file.git_sha1)
    return RemoteFile(endpoint, REPO, Commit(repo.resolve("main").sha), entry, None)


def fetch(network: Network, file: RemoteFile, sink: Callable[[memoryview, int], None], abort: Abort) -> None:
    source = HttpSource(network=network, stall_timeout_seconds=5.0, user_agent="test")
    try:
        source.fetch(file, 0, file.entry.size_bytes, sink, abort)
    finally:
        source.close()


def test_a_fetch_that_is_ended_over_tls_takes_no_ciphertext_for_content(
    hub: Hub, trusted: tuple[Authority, Path]
) -> None:
    authority, ca_file = trusted
    got, abort = bytearray(), Abort()

    def end_at_once(view: memoryview, offset: int) -> None:
        assert offset == len(got)
        got.extend(view)
        abort.stall()

    with front(hub, authority, "localhost", cdn=True) as cdn:
        hub.cdn_endpoint = cdn.endpoint
        with pytest.raises(TransientError) as caught:
            fetch(Network.of(ca_file, {}), remote(hub, hub.endpoint), end_at_once, abort)
    assert caught.value.reason is Reason.UPSTREAM_STALLED
    assert 0 < len(got) < SIZE
    assert got == b"".join(Synthetic(SIZE).blocks())[: len(got)]


def test_a_tunnel_to_an_address_of_version_6_is_asked_for_in_brackets(
    hub: Hub, trusted: tuple[Authority, Path]
) -> None:
    authority, ca_file = trusted
    with front(hub, authority, "::1") as there, HttpProxy({"::1": there.port}) as proxy:
        network = Network.of(ca_file, {"https_proxy": f"http://127.0.0.1:{proxy.port}"})
        connection = Connection("https", "[::1]:8443", network, 5.0)
        connection.get(f"/api/models/{REPO}", {})
        assert connection.getresponse().status == 200
        connection.close()
    assert [(asked.method, asked.target, asked.headers["host"]) for asked in proxy.asked] == [
        ("CONNECT", "[::1]:8443", "[::1]:8443")
    ]


def test_a_certificate_of_another_host_is_not_believed(hub: Hub, trusted: tuple[Authority, Path]) -> None:
    authority, ca_file = trusted
    with front(hub, authority, "other.example") as there:
        connection = Connection("https", f"localhost:{there.port}", Network.of(ca_file, {}), 5.0)
        with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch"):
            connection.connect()
    assert connection.sock is None


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [("refuses us", "407"), ("is not there", "Connection refused (the proxy http://127.0.0.1:9)")],
    ids=lambda value: value if " " in value else "",
)
def test_a_proxy_that_will_not_do_is_named_for_bytes_too(hub: Hub, scheme: str, wrong: str, says: str) -> None:
    with HttpProxy(credentials="one:two") as proxy:
        address = f"127.0.0.1:{proxy.port if wrong == 'refuses us' else 9}"
        network = Network.of(None, {f"{scheme}_proxy": f"http://eve:dropper@{address}"})
        with pytest.raises(TransientError) as caught:
            fetch(network, remote(hub, f"{scheme}://hub.test"), lambda _view, _offset: None, Abort())
    assert caught.value.reason is Reason.UPSTREAM_UNAVAILABLE
    assert says in caught.value.message
    assert "dropper" not in caught.value.message
    if (scheme, wrong) == ("https", "refuses us"):
        assert f"the proxy http://{address} does not let us to hub.test:443 (407" in caught.value.message


def test_a_host_that_does_not_answer_the_connect_is_given_up_in_time(hub: Hub) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):  # the queue is full: the next connect waits
            host, port = full.getsockname()
            connection = Connection("http", f"{host}:{port}", Network.of(None, {}), 0.3)
            with pytest.raises(OSError, match=rf"no connection to {host}:{port} within 0\.3 s"):
                connection.connect()


@pytest.mark.parametrize("netloc", ["", ":80", "host:port", "[::1"])
def test_an_address_that_is_none_is_a_value_error(netloc: str) -> None:
    with pytest.raises(ValueError):
        Connection("http", netloc, Network(ssl.create_default_context(), Proxies({})), 1.0)

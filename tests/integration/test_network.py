"""The ways to the Hub that sites have: a proxy, an authority of their own, IPv6. API questions and bytes take the same.

The names hub.test and cdn.test mean something to the proxy alone: what comes from there has come through it.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from modelcache.reasons import Reason

from tests.hub import MIB, Hub, Synthetic
from tests.hub.proxy import HttpProxy
from tests.hub.tls import Authority, TlsFront
from tests.node import Node
from tests.node.asking import ask

MODEL = "org/model"
CREDENTIALS = "wor:ker:s3cr3t"
IN_URL = "wor%3Aker:s3cr3t"
IN_HEADER = "Basic " + base64.b64encode(CREDENTIALS.encode()).decode()
TOKEN = "hf_own"


def commit(hub: Hub, **options: Any) -> None:
    files = {"config.json": b"{}", "model.safetensors": Synthetic(20 * MIB, 3)}
    hub.create_repo(MODEL, **options).commit(files)


def port(endpoint: str) -> int:
    return urlsplit(endpoint).port or 0


@pytest.fixture
def proxy(hub: Hub) -> Iterator[HttpProxy]:
    """Leads to hub.test and cdn.test over plain HTTP."""
    with HttpProxy({"hub.test": port(hub.endpoint), "cdn.test": port(hub.cdn_endpoint)}, CREDENTIALS) as made:
        hub.cdn_endpoint = "http://cdn.test"
        yield made


@pytest.fixture
def token_file(hub: Hub, tmp_path: Path) -> str:
    hub.tokens.add(TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    return str(tmp_path / "token")


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def behind_tls(hub: Hub, authority: Authority) -> Iterator[tuple[TlsFront, TlsFront]]:
    """The Hub's two addresses, over TLS only."""
    with (
        TlsFront(authority.certificate("localhost", "hub.test"), port(hub.endpoint)) as front,
        TlsFront(authority.certificate("localhost", "cdn.test"), port(hub.cdn_endpoint)) as cdn,
    ):
        hub.endpoint, hub.cdn_endpoint = front.endpoint, cdn.endpoint
        yield front, cdn


def kinds(hub: Hub) -> set[str]:
    return {request.kind for request in hub.requests()}


def test_http_goes_through_a_proxy_by_its_whole_address(
    hub: Hub, make_node: Callable[..., Node], proxy: HttpProxy, token_file: str
) -> None:
    commit(hub)
    node = make_node(hub={"endpoints": ["http://hub.test"], "token_file": token_file})
    node.environment = {"HTTP_PROXY": f"http://{IN_URL}@127.0.0.1:{proxy.port}"}
    node.start().ensure(MODEL)
    assert kinds(hub) == {"api", "resolve", "cdn"}
    assert len(proxy.asked) == len(hub.requests()) >= 5
    assert {urlsplit(asked.target).netloc for asked in proxy.asked} == {"hub.test", "cdn.test"}
    assert {asked.headers["host"] for asked in proxy.asked} == {"hub.test", "cdn.test"}
    assert {asked.headers.get("proxy-authorization") for asked in proxy.asked} == {IN_HEADER}
    to_cdn = [asked for asked in proxy.asked if asked.headers["host"] == "cdn.test"]
    assert {asked.headers.get("authorization") for asked in to_cdn} == {None}
    assert {r.authorization for r in hub.requests() if r.kind != "cdn"} == {f"Bearer {TOKEN}"}


def test_https_goes_through_a_tunnel_and_only_the_proxy_sees_its_credentials(
    hub: Hub,
    make_node: Callable[..., Node],
    authority: Authority,
    behind_tls: tuple[TlsFront, TlsFront],
    tmp_path: Path,
    token_file: str,
) -> None:
    commit(hub)
    front, cdn = behind_tls
    hub.endpoint, hub.cdn_endpoint = "https://hub.test", "https://cdn.test"
    with HttpProxy({"hub.test": front.port, "cdn.test": cdn.port}, CREDENTIALS) as proxy:
        node = make_node(
            hub={
                "endpoints": ["https://hub.test"],
                "ca_file": str(authority.write(tmp_path / "ca.pem")),
                "token_file": token_file,
            }
        )
        node.environment = {"HTTPS_PROXY": f"http://{IN_URL}@127.0.0.1:{proxy.port}"}
        node.start().ensure(MODEL)
    assert kinds(hub) == {"api", "resolve", "cdn"}
    assert {(asked.method, asked.target) for asked in proxy.asked} == {
        ("CONNECT", "hub.test:443"),
        ("CONNECT", "cdn.test:443"),
    }
    assert {asked.headers["proxy-authorization"] for asked in proxy.asked} == {IN_HEADER}
    assert all("authorization" not in asked.headers for asked in proxy.asked)
    assert all("proxy-authorization" not in request.headers for request in hub.requests())


@pytest.mark.parametrize(("exceptions", "used"), [("127.0.0.1", False), ("127.0.0.0/8", False), ("cdn.test", True)])
def test_no_proxy_is_for_questions_and_bytes_alike(
    hub: Hub, make_node: Callable[..., Node], exceptions: str, used: bool
) -> None:
    commit(hub)
    node = make_node()
    with HttpProxy() as proxy:
        node.environment = {"http_proxy": f"http://127.0.0.1:{proxy.port}", "no_proxy": exceptions}
        node.start().ensure(MODEL)
        assert len(proxy.asked) == (len(hub.requests()) if used else 0)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("wrong", ["refuses us", "is not there"])
def test_a_proxy_that_will_not_do_is_named_without_its_credentials(
    hub: Hub, make_node: Callable[..., Node], proxy: HttpProxy, scheme: str, wrong: str
) -> None:
    """For questions here; for bytes in test_connections.py."""
    address = proxy.port if wrong == "refuses us" else 9
    node = make_node(hub={"endpoints": [f"{scheme}://hub.test"], "timeout": "1s"})
    node.environment = {f"{scheme}_proxy": f"http://eve:dropper@127.0.0.1:{address}"}
    asked = ask(node.start(), MODEL)
    assert asked.reason == Reason.UPSTREAM_UNAVAILABLE
    assert "hub.test" in asked.text
    if wrong == "refuses us":
        assert "407" in asked.text
    else:
        assert f"the proxy http://127.0.0.1:{address}" in asked.text
    said = asked.text + asked.stderr + node.log_text()
    assert "dropper" not in said
    assert base64.b64encode(b"eve:dropper").decode() not in said


def test_what_is_no_proxy_is_told_before_anything_starts(make_node: Callable[..., Node]) -> None:
    node = make_node()
    node.environment = {"ALL_PROXY": "socks5://eve:dropper@127.0.0.1:1080"}
    node.start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 78
    assert "ALL_PROXY: does not name a proxy: write http://host:port" in node.log_text()
    assert "dropper" not in node.log_text()


@pytest.mark.parametrize("by", ["hub.ca_file", "SSL_CERT_FILE", None], ids=str)
def test_an_authority_of_the_site_is_believed_for_questions_and_bytes_alike(
    hub: Hub,
    make_node: Callable[..., Node],
    authority: Authority,
    behind_tls: tuple[TlsFront, TlsFront],
    tmp_path: Path,
    by: str | None,
) -> None:
    commit(hub)
    file = str(authority.write(tmp_path / "ca.pem"))
    node = make_node(hub={"ca_file": file} if by == "hub.ca_file" else {"timeout": "1s"})
    node.environment = {"SSL_CERT_FILE": file} if by == "SSL_CERT_FILE" else {}
    node.start()
    if by is None:
        asked = ask(node, MODEL)
        assert asked.reason == Reason.UPSTREAM_UNAVAILABLE
        assert hub.endpoint in asked.text
        assert "certificate verify failed" in asked.text
        assert hub.requests() == []
    else:
        node.ensure(MODEL)
        assert kinds(hub) == {"api", "resolve", "cdn"}


def test_the_xet_store_is_believed_by_the_same_authority(
    hub: Hub, make_node: Callable[..., Node], authority: Authority, tmp_path: Path
) -> None:
    files = {"config.json": b"{}", "model.safetensors": Synthetic(20 * MIB, 3)}
    hub.create_repo(MODEL).commit(files, xet=True)
    with TlsFront(authority.certificate("localhost"), port(hub.cas_endpoint)) as store:
        hub.cas_endpoint = store.endpoint
        node = make_node(hub={"ca_file": str(authority.write(tmp_path / "ca.pem"))}).start()
        node.ensure(MODEL)
    assert "xorb" in kinds(hub)
    assert "cdn" not in kinds(hub)


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["no file", "no certificate"])
def test_a_bad_ca_file_is_told_before_anything_starts(
    make_node: Callable[..., Node], tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    node = make_node(hub={"ca_file": str(file)}).start(wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 78
    assert f"hub.ca_file: {file}: " in node.log_text()


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_hub_on_ipv6(make_node: Callable[..., Node]) -> None:
    with Hub(host="::1") as there:
        commit(there)
        node = make_node(hub={"endpoints": [there.endpoint]}).start()
        node.ensure(MODEL)
        assert there.endpoint.startswith("http://[::1]:")
        assert kinds(there) == {"api", "resolve", "cdn"}

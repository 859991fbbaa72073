"""Which proxy leads where, as curl would have it; and that its credentials are for it alone."""

from __future__ import annotations

import base64

import pytest
from modelcached.config import ConfigError
from modelcached.sources.proxies import Proxies, Proxy

ALL = {"http_proxy": "http://a.example:1", "https_proxy": "http://b.example:2"}


def test_each_scheme_has_its_own_and_all_proxy_is_for_the_rest() -> None:
    proxies = Proxies.of({"HTTPS_PROXY": "http://b.example:2", "ALL_PROXY": "c.example"})
    assert proxies.to("https", "hub.example", 443) == Proxy("b.example", 2)
    assert proxies.to("http", "hub.example", 80) == Proxy("c.example", 80)
    assert Proxies.of({}).to("https", "hub.example", 443) is None
    assert Proxies.of({"HTTPS_PROXY": ""}).to("https", "hub.example", 443) is None


def test_the_lower_case_wins() -> None:
    proxies = Proxies.of({"https_proxy": "http://low.example", "HTTPS_PROXY": "http://high.example"})
    assert proxies.to("https", "hub.example", 443) == Proxy("low.example", 80)


def test_an_address_may_be_of_version_6() -> None:
    proxy = Proxies.of({"http_proxy": "http://[::1]:3128"}).to("http", "hub.example", 80)
    assert proxy == Proxy("::1", 3128)
    assert str(proxy) == "http://[::1]:3128"


def test_credentials_are_decoded_and_never_shown() -> None:
    proxy = Proxies.of({"http_proxy": "http://us%40er:pa%3Ass@a.example:1"}).to("http", "hub.example", 80)
    assert proxy is not None
    assert proxy.authorization == "Basic " + base64.b64encode(b"us@er:pa:ss").decode()
    assert str(proxy) == "http://a.example:1"
    for shown in (repr(proxy), str(proxy)):
        assert "pa" not in shown
        assert base64.b64encode(b"us@er:pa:ss").decode() not in shown


@pytest.mark.parametrize(
    "value", ["socks5://a.example:1", "https://a.example", "http://:80", "http://a:b@:80", "http://a.example:port"]
)
def test_what_is_no_http_proxy_is_refused_by_its_name_not_by_its_value(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^HTTPS_PROXY: does not name a proxy") as caught:
        Proxies.of({"HTTPS_PROXY": value})
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "host", "port", "covered"),
    [
        ("*", "hub.example", 80, True),
        ("hub.example", "hub.example", 80, True),
        ("hub.example", "HUB.example", 80, True),
        ("Hub.Example", "cdn.hub.example", 80, True),
        ("hub.example", "myhub.example", 80, False),
        (".hub.example", "cdn.hub.example", 80, True),
        ("*.hub.example", "cdn.hub.example", 80, True),
        ("hub.example", "hub.example.org", 80, False),
        ("other.example, hub.example", "hub.example", 80, True),
        ("hub.example:8080", "hub.example", 8080, True),
        ("hub.example:8080", "hub.example", 80, False),
        ("127.0.0.1", "127.0.0.1", 80, True),
        ("127.0.0.1", "127.0.0.11", 80, False),
        ("127.0.0.1:81", "127.0.0.1", 80, False),
        ("127.0.0.1:80", "127.0.0.1", 80, True),
        ("10.0.0.0/8", "10.1.2.3", 80, True),
        ("10.0.0.0/8", "11.1.2.3", 80, False),
        ("10.0.0.0/8", "hub.example", 80, False),
        ("::1", "::1", 80, True),
        ("[::1]", "::1", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("[::1]:81", "::1", 80, False),
        ("::1", "::2", 80, False),
        ("fd00::/8", "fd12::1", 80, True),
        ("10.0.0.0/8", "::1", 80, False),
        ("", "hub.example", 80, False),
        ("not/a/network", "hub.example", 80, False),
    ],
)
def test_no_proxy(entry: str, host: str, port: int, covered: bool) -> None:
    proxies = Proxies.of({**ALL, "NO_PROXY": entry})
    assert (proxies.to("http", host, port) is None) is covered
    assert (proxies.to("https", host, port) is None) is covered

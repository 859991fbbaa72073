"""Every field that the test Hub sends is read by the real client, where protocol.py says so."""

import http.client
import importlib
import inspect
import json
from collections.abc import Iterator
from functools import reduce
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http as hub_http

from tests.hub import Fault, FaultKind, Hub
from tests.hub.protocol import NATIVE_FIELDS, UNREAD_FIELDS, UNREAD_HEADERS, Reader, readers
from tests.hub_faithful.http_calls import call, cdn_url

READERS = readers()
LINK_PARSER = {"Link": "links"}  # the HTTP library parses it; the client reads the result


def spellings(field: str) -> list[str]:
    """How a field may be written where it is read: by itself, or by the constant that holds it."""
    holders = {**vars(constants), **vars(hub_http)}
    named = [name for name, value in holders.items() if isinstance(value, str) and value.lower() == field.lower()]
    return [
        f'"{field}"',
        f"'{field}'",
        f'"{field.lower()}"',
        f"repo_info.{field}",
        *named,
        LINK_PARSER.get(field, "\0"),
    ]


def source_of(reader: Reader) -> tuple[list[str], int]:
    module: Any = importlib.import_module(f"huggingface_hub.{reader.module}")
    function = reduce(getattr, reader.function.split("."), module)
    return inspect.getsourcelines(inspect.unwrap(function))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: f"{reader.field}-{reader.function}")
def test_the_client_reads_the_field_where_the_table_says(reader: Reader) -> None:
    lines, first = source_of(reader)
    wanted = spellings(reader.field)
    reading = [first + number for number, line in enumerate(lines) if any(spelt in line for spelt in wanted)]
    assert reading, f"{reader.function} does not name {reader.field}"
    if huggingface_hub.__version__ == "2.4.0":
        assert reader.line in reading


def test_the_table_is_not_empty() -> None:
    assert len([reader for reader in READERS if reader.kind == "header"]) > 15
    assert len([reader for reader in READERS if reader.kind == "field"]) > 30


@pytest.fixture
def urls(hub: Hub) -> list[str]:
    repo = hub.create_repo("org/model", gated=True)
    hub.tokens.add("hf_good")
    repo.allow("hf_good")
    sha = repo.commit({"a/config.json": b"{}", "b.txt": b"", "model.safetensors": b"weights"},
                      xet_hashes={"model.safetensors": "ab" * 32})  # fmt: skip
    repo.tag("v1", sha)
    repo.move("refs/pr/1", sha)
    hub.create_repo("org/xet").commit({"model.safetensors": b"weights"}, xet=True)
    api = f"{hub.endpoint}/api/models/org/model"
    return [
        api, f"{api}/revision/main?blobs=true", f"{api}/revision/nope", f"{api}/tree/main?recursive=true",
        f"{api}/tree/main?expand=true", f"{api}/refs?include_prs=1", f"{api}/commits/main",
        f"{hub.endpoint}/api/models/unknown", f"{hub.endpoint}/org/model/resolve/main/a/config.json",
        f"{hub.endpoint}/org/model/resolve/main/model.safetensors",
        f"{hub.endpoint}/org/xet/resolve/main/model.safetensors",
        f"{hub.endpoint}/api/models/org/xet/xet-read-token/main",
        cdn_url(hub.endpoint, "org/model", "model.safetensors", Authorization="Bearer hf_good"),
    ]  # fmt: skip


def field_names(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from field_names(inner)


def test_nothing_is_sent_that_nobody_reads(hub: Hub, urls: list[str]) -> None:
    known_headers = {reader.field.lower() for reader in READERS if reader.kind == "header"} | UNREAD_HEADERS
    known_fields = {reader.field for reader in READERS if reader.kind == "field"} | UNREAD_FIELDS | NATIVE_FIELDS
    seen_headers: set[str] = set()
    seen_fields: set[str] = set()
    for url in urls:
        for headers in ({}, {"Authorization": "Bearer hf_good", "Range": "bytes=0-0"}):
            reply = call(url, timeout=10.0, **headers)
            seen_headers |= reply.headers.keys()
            if reply.headers.get("content-type", "").startswith("application/json"):
                seen_fields |= set(field_names(json.loads(reply.body)))
    hub.faults.add(Fault(FaultKind.STATUS, status=429, retry_after=1, rate_limit_reset=1))
    seen_headers |= call(urls[0]).headers.keys()
    assert seen_headers <= known_headers
    assert seen_fields <= known_fields
    assert known_fields - seen_fields == set()
    assert known_headers - seen_headers <= {"connection"}


def test_http_versions_and_connections_are_those_of_a_real_server(hub: Hub, urls: list[str]) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
    connection.request("GET", "/api/models/org/model")
    response = connection.getresponse()
    assert (response.version, response.will_close) == (11, False)
    connection.close()

"""The real hf_xet, unchanged, downloads from the test Hub's store: alone, and through huggingface_hub."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

from tests.hub import MIB, Fault, FaultKind, Hub, HubFile, Synthetic
from tests.hub.cas import CHUNK_BYTES, FULL_XORB_BYTES
from tests.hub.faults import Where
from tests.hub_faithful.http_calls import call

SIZE = 10 * MIB + 12_345  # ends in the middle of a chunk
WEIGHTS = "model.safetensors"

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("org/model", cache_dir=sys.argv[1]))
"""
STREAM = """
import hashlib, json, sys
import hf_xet
wanted = json.loads(sys.stdin.read())
group = hf_xet.XetSession().new_download_stream_group(token_refresh_url=wanted["refresh"])
digest, size = hashlib.sha256(), 0
for piece in group.download_stream(hf_xet.XetFileInfo(wanted["hash"], wanted["size"]), wanted["start"], wanted["end"]):
    digest.update(piece)
    size += len(piece)
print(json.dumps([size, digest.hexdigest()]))
"""


@dataclass
class Client:
    """The real clients as processes of their own: in this one Xet is off."""

    hub: Hub
    home: Path

    def run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
        own = {
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_XET_TELEMETRY_ENABLED": "0",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
        }
        return subprocess.run(
            command, env=kept | own, input=stdin, capture_output=True, text=True, timeout=60, check=False
        )

    def snapshot(self) -> Path:
        done = self.run(sys.executable, "-c", DOWNLOAD, str(self.home / "cache"))
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def stream(self, file: HubFile, start: int, end: int) -> tuple[int, str]:
        """Length and SHA-256 of what the stream interface delivers."""
        refresh = f"{self.hub.endpoint}/api/models/org/model/xet-read-token/main"
        wanted = {"refresh": refresh, "hash": file.xet_hash, "size": file.size, "start": start, "end": end}
        done = self.run(sys.executable, "-c", STREAM, stdin=json.dumps(wanted))
        assert done.returncode == 0, done.stderr
        size, digest = json.loads(done.stdout)
        return size, digest


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def commit(hub: Hub, size: int = SIZE, xorb_bytes: int = 2 * MIB) -> tuple[HubFile, bytes]:
    """A model in the store, and the true bytes of its weights."""
    hub.cas.xorb_bytes = xorb_bytes
    source = Synthetic(size, seed=7)
    repo = hub.create_repo("org/model")
    repo.commit({"config.json": b"{}", WEIGHTS: source}, xet=True)
    return repo.files()[WEIGHTS], b"".join(source.blocks())


@pytest.mark.parametrize("xorb_bytes", [CHUNK_BYTES, 2 * MIB, FULL_XORB_BYTES])
@pytest.mark.parametrize("speaks_v2", [True, False])
def test_a_snapshot_over_xet_is_byte_identical(hub: Hub, client: Client, xorb_bytes: int, speaks_v2: bool) -> None:
    hub.cas.speaks_v2 = speaks_v2
    _, truth = commit(hub, SIZE if xorb_bytes < FULL_XORB_BYTES else FULL_XORB_BYTES + SIZE, xorb_bytes)
    assert (client.snapshot() / WEIGHTS).read_bytes() == truth
    assert hub.request_count(kind="cdn") == 0
    assert hub.request_count(kind="token") == 1
    versions = {record.path.split("/")[1] for record in hub.requests() if record.kind == "reconstruction"}
    assert versions == ({"v2"} if speaks_v2 else {"v2", "v1"})
    chunks = -(-len(truth) // CHUNK_BYTES)
    assert hub.body_bytes("org/model", WEIGHTS) == len(truth) + 8 * chunks


def test_the_command_line_client_downloads_over_xet(hub: Hub, client: Client, tmp_path: Path) -> None:
    _, truth = commit(hub)
    done = client.run(str(Path(sys.executable).with_name("hf")), "download", "org/model", "--local-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / WEIGHTS).read_bytes() == truth
    assert hub.request_count(kind="xorb", status=206) > 0
    assert hub.request_count(kind="cdn") == 0


@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (1, SIZE), (CHUNK_BYTES, 2 * MIB), (2 * MIB - 1, 2 * MIB + 1), (SIZE - 1, SIZE)]
)
def test_a_stream_starts_and_ends_at_any_byte(hub: Hub, client: Client, start: int, end: int) -> None:
    file, truth = commit(hub)
    assert client.stream(file, start, end) == (end - start, hashlib.sha256(truth[start:end]).hexdigest())


def test_a_head_names_hash_and_token_address(hub: Hub) -> None:
    file, _ = commit(hub, size=MIB)
    found = get_hf_file_metadata(hf_hub_url("org/model", WEIGHTS, endpoint=hub.endpoint))
    assert found.xet_file_data is not None
    assert found.xet_file_data.file_hash == file.xet_hash
    assert "/api/models/org/model/xet-read-token/" in found.xet_file_data.refresh_route
    listed = {entry.path: entry for entry in HfApi(hub.endpoint).list_repo_tree("org/model")}
    assert getattr(listed[WEIGHTS], "xet_hash", None) == file.xet_hash
    assert getattr(listed["config.json"], "xet_hash", None) is None


def test_nothing_speaks_of_xet_unless_it_is_switched_on(hub: Hub) -> None:
    repo = hub.create_repo("org/model")
    repo.commit({"a.safetensors": b"a", "b.safetensors": b"b"}, xet={"b.safetensors": True})
    assert repo.files()["a.safetensors"].xet_hash is None
    assert repo.files()["b.safetensors"].xet_hash is not None
    with Hub(xet=True) as other:
        everywhere = other.create_repo("org/model")
        everywhere.commit({"a.safetensors": b"a", "config.json": b"{}"})
        assert everywhere.files()["a.safetensors"].xet_hash is not None
        assert everywhere.files()["config.json"].xet_hash is None
    plain = call(f"{hub.endpoint}/org/model/resolve/main/a.safetensors", "HEAD")
    assert not {"x-xet-hash", "link"} & plain.headers.keys()


def test_a_xet_token_is_given_to_those_who_may_read(hub: Hub) -> None:
    repo = hub.create_repo("org/gated", gated=True)
    repo.commit({WEIGHTS: b"weights"}, xet=True)
    hub.tokens |= {"hf_good", "hf_other"}
    repo.allow("hf_good")
    url = f"{hub.endpoint}/api/models/org/gated/xet-read-token/main"
    asked = [call(url, **headers).status for headers in ({}, {"Authorization": "Bearer hf_other"})]
    assert asked == [401, 403]
    reply = call(url, Authorization="Bearer hf_good")
    given = json.loads(reply.body)
    assert reply.headers["x-xet-access-token"] == given["accessToken"]
    assert reply.headers["x-xet-cas-url"] == given["casUrl"]
    assert reply.headers["x-xet-token-expiration"] == str(given["exp"])


def test_the_store_wants_its_own_token_and_honest_ranges(hub: Hub) -> None:
    file, _ = commit(hub)
    url = f"{hub.cas_endpoint}/v2/reconstructions/{file.xet_hash}"
    token, _ = hub.cas.issue("org/model")
    good = {"Authorization": f"Bearer {token}"}
    assert call(url).status == 401
    assert call(url, Authorization="Bearer hf_good").status == 401
    assert call(f"{hub.cas_endpoint}/v2/reconstructions/{'0' * 64}", **good).status == 404
    assert call(url, Range=f"bytes={SIZE}-{SIZE + 1}", **good).status == 416
    plan = json.loads(call(url, Range=f"bytes={3 * MIB}-{3 * MIB}", **good).body)
    assert [term["range"] for term in plan["terms"]] == [{"start": 16, "end": 17}]
    (fetch,) = plan["xorbs"][plan["terms"][0]["hash"]]
    span = fetch["ranges"][0]["bytes"]
    got = call(fetch["url"], Range=f"bytes={span['start']}-{span['end']}")
    assert (got.status, len(got.body)) == (206, CHUNK_BYTES + 8)
    assert call(fetch["url"].partition("?")[0]).status == 403


@pytest.mark.parametrize(
    "fault",
    [
        Fault(FaultKind.RESET, where="xorb", at_fraction=0.5, times=1),
        Fault(FaultKind.CLOSE, where="xorb", at_fraction=0.5, times=1),
        Fault(FaultKind.STATUS, where="xorb", status=500, times=1),
        Fault(FaultKind.STATUS, where="xorb", status=429, retry_after=1, times=1),
        Fault(FaultKind.EXPIRE_URL, where="xorb", times=1),
        Fault(FaultKind.STATUS, where="reconstruction", status=500, times=1),
    ],
    ids=lambda fault: f"{fault.where}-{fault.kind.value}-{fault.status}",
)
def test_what_hf_xet_tries_again(hub: Hub, client: Client, fault: Fault) -> None:
    _, truth = commit(hub)
    hub.faults.add(fault)
    assert (client.snapshot() / WEIGHTS).read_bytes() == truth
    assert fault.fired == 1


@pytest.mark.parametrize(
    ("where", "status"), [("token", 401), ("token", 403), ("reconstruction", 401), ("reconstruction", 403),
                          ("reconstruction", 404), ("xorb", 404)]
)  # fmt: skip
def test_what_hf_xet_gives_up_at_once(hub: Hub, client: Client, where: Where, status: int) -> None:
    commit(hub)
    fault = hub.faults.add(Fault(FaultKind.STATUS, where=where, status=status))
    done = client.run(sys.executable, "-c", DOWNLOAD, str(client.home / "cache"))
    assert done.returncode != 0
    assert fault.fired > 0
    assert hub.request_count(kind="cdn") == 0


def test_a_stream_may_end_early_and_look_well(hub: Hub, client: Client) -> None:
    file, truth = commit(hub)
    hub.faults.add(Fault(FaultKind.SHORT_PLAN, where="reconstruction"))
    size, digest = client.stream(file, 0, file.size)
    assert 0 < size < file.size
    assert digest == hashlib.sha256(truth[:size]).hexdigest()


def test_hf_xet_delivers_a_flipped_byte(hub: Hub, client: Client) -> None:
    file, truth = commit(hub)
    fault = hub.faults.add(Fault(FaultKind.FLIPPED_BYTE, where="xorb", at_byte=1000, times=1))
    size, digest = client.stream(file, 0, file.size)
    assert (size, fault.fired) == (file.size, 1)
    assert digest != hashlib.sha256(truth).hexdigest()

"""I1, whole or absent: whatever upstream sends, nothing wrong becomes visible, and a reader sees whole sets only.

An upstream that breaks HTTP (200 for a 206, another range than the one asked, less than it announced)
is tried again for ``retry_timeout`` and then named: UPSTREAM_UNAVAILABLE. Content that is not what its
digest says is fetched anew once and then DIGEST_MISMATCH.
Where the bytes are right all the same (the whole file of one range, sent with 200; another ETag), they are taken.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from modelcache.reasons import TABLE, Reason

from tests.hub import MIB, Fault, FaultKind, Hub, HubFile, Synthetic
from tests.hub.models import kitchen_sink
from tests.node import Node
from tests.node.asking import ask
from tests.node.reader import Reader

LARGE, SMALL, MIDDLE = "model.safetensors", "config.json", "tokenizer.json"
SIZES = {LARGE: 24 * MIB, MIDDLE: 3 * MIB}
"""More than one part of 16 MiB; one part that has a journal. SMALL fits in memory and has a git SHA-1."""


@dataclass(frozen=True)
class Case:
    """A fault that lasts, the file it spoils, and the end it leads to."""

    fault: FaultKind
    file: str
    reason: Reason | None
    says: str
    at_byte: int | None = None


CASES = [
    Case(FaultKind.WRONG_BYTES, LARGE, Reason.DIGEST_MISMATCH, "content differs from", at_byte=5 * MIB),
    Case(FaultKind.WRONG_BYTES, MIDDLE, Reason.DIGEST_MISMATCH, "content differs from", at_byte=MIB),
    Case(FaultKind.WRONG_BYTES, SMALL, Reason.DIGEST_MISMATCH, "content differs from"),
    Case(FaultKind.SHORT_BODY, LARGE, Reason.UPSTREAM_UNAVAILABLE, "the connection ended 1 bytes early"),
    Case(FaultKind.SHORT_BODY, SMALL, Reason.UPSTREAM_UNAVAILABLE, "the connection ended 1 bytes early"),
    Case(FaultKind.LONG_BODY, LARGE, Reason.DIGEST_MISMATCH, "sends more than the"),
    Case(FaultKind.LONG_BODY, SMALL, Reason.DIGEST_MISMATCH, "sends more than the"),
    Case(FaultKind.FULL_FOR_RANGE, LARGE, Reason.UPSTREAM_UNAVAILABLE, "200 where a 206 was asked"),
    Case(FaultKind.FULL_FOR_RANGE, SMALL, None, ""),
    Case(FaultKind.WRONG_CONTENT_RANGE, LARGE, Reason.UPSTREAM_UNAVAILABLE, "upstream answered 'bytes "),
    Case(FaultKind.WRONG_CONTENT_RANGE, SMALL, Reason.UPSTREAM_UNAVAILABLE, "upstream answered 'bytes "),
    Case(FaultKind.ETAG_CHANGE, LARGE, None, "", at_byte=16 * MIB),
]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """One Hub for all cases, each of which has its own repository."""
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def node(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One daemon for all cases: what one of them broke would be seen in the next."""
    made = Node(tmp_path_factory.mktemp("node"), hub.endpoint, {"transfer": {"retry_timeout": "1500ms"}}).start()
    yield made
    made.stop()


def commit(hub: Hub, repo_id: str) -> str:
    """A repository of which no file is in another, so that nothing is linked instead of fetched."""
    files = {path: Synthetic(size, seed=zlib.crc32(repo_id.encode())) for path, size in SIZES.items()}
    config = json.dumps({"architectures": ["LlamaForCausalLM"], "name": repo_id}).encode()
    return hub.create_repo(repo_id).commit({**files, SMALL: config}, lfs={MIDDLE: True})


def content_hashes(files: dict[str, HubFile]) -> dict[str, str]:
    """What a reader must find."""
    return {
        path: file.sha256 or hashlib.sha256(file.body.read_at(0, file.size)).hexdigest() for path, file in files.items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fault.value}-{case.file}")
def test_what_is_wrong_is_never_seen_and_the_next_request_mends_it(hub: Hub, node: Node, case: Case) -> None:
    repo_id = f"org/{case.fault.value}-{case.file}"
    sha = commit(hub, repo_id)
    files = dict(hub.find_repo(repo_id).files(sha))
    reader = Reader(node.snapshot(repo_id, sha), content_hashes(files))
    fault = Fault(case.fault, path=case.file, repo=repo_id, at_byte=case.at_byte)
    with reader.looking():
        if case.reason is not None:
            reader.forbidden = frozenset({files[case.file].etag})
            hub.faults.add(fault)
            asked = ask(node, repo_id)
            reader.wait_for(None)
            assert reader.seen == [0]
            assert fault.fired > 0
            assert (asked.reason, asked.exit_status) == (case.reason, TABLE[case.reason].exit_status)
            assert case.says in asked.text
            assert f"{repo_id}@{sha[:12]}/{case.file}" in asked.text
            assert TABLE[case.reason].mend in asked.text
            if case.reason is Reason.DIGEST_MISMATCH:  # nothing of it is resumed from, nor kept on the disk
                assert not list((node.private / "partial").glob(f"{files[case.file].etag}*"))
            reader.forbidden = frozenset()
            hub.faults.remove(fault)
        else:
            hub.faults.add(fault)
        (ready,) = node.ensure(repo_id)
        reader.wait_for(0)
        assert (ready["commit"], ready["outcome"]) == (sha, "downloaded")
        assert fault.fired > 0
        hub.faults.clear()
    node.assert_disk_truth()


def test_another_etag_is_asked_about_once_and_costs_nothing_that_is_there(hub: Hub, node: Node) -> None:
    """A mirror's other replica, after a broken connection: whether its bytes are right is the digest's to say."""
    repo_id = "org/replica"
    sha = commit(hub, repo_id)
    size = SIZES[MIDDLE]
    broken = hub.faults.add(Fault(FaultKind.RESET, path=MIDDLE, repo=repo_id, where="cdn", times=1, at_fraction=0.5))
    changed = hub.faults.add(
        Fault(FaultKind.ETAG_CHANGE, path=MIDDLE, repo=repo_id, where="cdn", after_requests=1, times=None)
    )
    with Reader(node.snapshot(repo_id, sha), content_hashes(dict(hub.find_repo(repo_id).files(sha)))).looking() as it:
        node.ensure(repo_id)
        it.wait_for(0)
    hub.faults.clear()
    assert broken.fired == 1
    assert changed.fired == 2
    assert [r.range for r in hub.requests() if (r.repo, r.file, r.kind) == (repo_id, MIDDLE, "cdn")] == [
        f"bytes=0-{size - 1}",
        f"bytes={size // 2}-{size - 1}",
        f"bytes={size // 2}-{size - 1}",
    ]


def test_a_file_that_is_replaced_in_mid_transfer_is_fetched_anew(hub: Hub, node: Node) -> None:
    """The second half is another file's, by its ETag too, until the first try has ended."""
    repo_id = "org/replaced"
    sha = commit(hub, repo_id)
    size = SIZES[MIDDLE]
    for fault in (
        Fault(FaultKind.RESET, path=MIDDLE, repo=repo_id, where="cdn", times=1, at_fraction=0.5),
        Fault(FaultKind.ETAG_CHANGE, path=MIDDLE, repo=repo_id, where="cdn", after_requests=1, times=2),
        Fault(FaultKind.WRONG_BYTES, path=MIDDLE, repo=repo_id, where="cdn", after_requests=0, times=2),
    ):
        hub.faults.add(fault)
    with Reader(node.snapshot(repo_id, sha), content_hashes(dict(hub.find_repo(repo_id).files(sha)))).looking() as it:
        node.ensure(repo_id)
        it.wait_for(0)
    hub.faults.clear()
    assert [r.range for r in hub.requests() if (r.repo, r.file, r.kind) == (repo_id, MIDDLE, "cdn")] == [
        f"bytes=0-{size - 1}",
        f"bytes={size // 2}-{size - 1}",
        f"bytes={size // 2}-{size - 1}",
        f"bytes=0-{size - 1}",
    ]


def test_a_reader_sees_whole_sets_through_publication_growth_and_eviction(hub: Hub, node: Node) -> None:
    repo_id = "org/kitchen-sink"
    sha = hub.create_repo(repo_id).commit(kitchen_sink())
    files = dict(hub.find_repo(repo_id).files(sha))
    full = content_hashes(files)
    (first,) = node.ensure(repo_id)
    # What vllm selects is test_profiles.py's business; here it is whatever was published first.
    small = {path: digest for path, digest in full.items() if (node.snapshot(repo_id, sha) / path).exists()}
    assert first["commit"] == sha
    assert 5 < len(small) < len(full)
    evict(node, repo_id)
    with Reader(node.snapshot(repo_id, sha), small, full).looking() as reader:
        for _ in range(3):
            reader.wait_for(None)
            node.ensure(repo_id)
            reader.wait_for(0)
            node.ensure(repo_id, "--profile", "full")
            reader.wait_for(1)
            evict(node, repo_id)
    node.assert_disk_truth()


def evict(node: Node, repo_id: str) -> None:
    node.release_all()
    node.ctl("evict", repo_id, "--yes")

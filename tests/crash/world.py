"""The models that exist upstream, from memory; what of them a cache may show."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

from modelcached.model import (
    Algorithm,
    Commit,
    Digest,
    FileEntry,
    Manifest,
    Profile,
    RepoId,
    Revision,
    SnapshotId,
)
from modelcached.profiles import parse_profile
from modelcached.sources.abort import Abort
from modelcached.sources.hub import Resolved
from modelcached.sources.sink import Sink

ENDPOINT = "http://upstream.test"
SMALL_BYTES = 8 << 10
"""What goes through memory alone: flight.SMALL_BYTES, for these tests."""
LARGE_BYTES = (48 << 10) + 77
"""More than that: journalled, checkpointed, and in three parts and a bit."""
PART_BYTES = 16 << 10
PIECE_BYTES = 8 << 10
"""What arrives at a time."""

FULL = parse_profile("full", (), ())
PART = parse_profile("", ("config.json", "model.safetensors", "nested/*"), ())
PROFILES = {"full": FULL, "part": PART}


def large(seed: int) -> bytes:
    return random.Random(seed).randbytes(LARGE_BYTES)


@dataclass(frozen=True)
class Model:
    """One repository at one commit."""

    repo_id: RepoId
    commit: Commit
    contents: Mapping[str, bytes] = field(repr=False)

    @property
    def snapshot(self) -> SnapshotId:
        return SnapshotId(self.repo_id, self.commit)

    @cached_property
    def manifest(self) -> Manifest:
        files = [
            FileEntry(path, len(content), digest_of(path, content), digest_of(path, content).hex)
            for path, content in self.contents.items()
        ]
        return Manifest.of(self.repo_id, self.commit, files)

    def digest(self, path: str) -> Digest:
        return self.manifest.files[path].digest

    def paths(self, profile: str) -> frozenset[str]:
        """What the profile selects of it."""
        return frozenset(self.contents) - ({"extra/notes.txt"} if profile == "part" else set())


def digest_of(path: str, content: bytes) -> Digest:
    """As the Hub has it: SHA-256 for weights, git's for what is small."""
    if path.endswith(".safetensors"):
        return Digest(Algorithm.SHA256, hashlib.sha256(content).hexdigest())
    return Digest(Algorithm.GIT_SHA1, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def model(repo_id: str, commit: str, seed: int, config: Mapping[str, object], *, bare: bool = False) -> Model:
    contents = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": large(seed),
        "nested/deep/tokenizer.json": b'{"the same": "everywhere"}',
    }
    if not bare:
        contents["extra/notes.txt"] = b"not in every profile"
    return Model(RepoId(repo_id), Commit(commit * 40), contents)


FIRST = model("org/base", "1", 1, {"version": 1})
SECOND = model("org/base", "2", 2, {"version": 2})
"""What the branch has moved on to; the tokenizer is the same."""
OTHER = model("org/other", "3", 1, {"other": True}, bare=True)
"""The weights and the tokenizer of FIRST."""
MODELS = {"first": FIRST, "second": SECOND, "other": OTHER}
BLOBS = {digest_of(path, content).hex: content for each in MODELS.values() for path, content in each.contents.items()}
"""Everything that a cache may ever hold, by the name that it must have."""
BY_COMMIT = {each.commit: each for each in MODELS.values()}


@dataclass(eq=False)
class Source:
    """One blob, from memory."""

    digest: Digest
    upstream: FakeUpstream
    label: str = "hub"
    part_bytes: int = PART_BYTES
    at_once: int | None = None
    content_tries: int = 2

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        del abort
        self.upstream.fetched[self.digest.hex] = self.upstream.fetched.get(self.digest.hex, 0) + end - start
        content = memoryview(BLOBS[self.digest.hex])
        for position in range(start, end, PIECE_BYTES):
            sink(content[position : min(position + PIECE_BYTES, end)], position)

    def forget(self) -> None:
        pass


@dataclass
class FakeUpstream:
    """What the catalog and the assemblies ask."""

    branches: dict[Revision, Commit]
    fetched: dict[str, int] = field(default_factory=dict)
    """Bytes by digest."""
    endpoint: str = ENDPOINT

    def resolve(self, repo_id: RepoId, revision: Revision, token: str | None, timeout: timedelta) -> Resolved:
        del repo_id, token, timeout
        return Resolved(self.branches[revision], restricted=False)

    def manifest(
        self, repo_id: RepoId, commit: Commit, token: str | None, timeout: timedelta, *, restricted: bool
    ) -> Manifest:
        del repo_id, token, timeout, restricted
        return BY_COMMIT[commit].manifest

    def check_access(self, repo_id: RepoId, token: str | None, timeout: timedelta) -> None:
        raise AssertionError("nothing here is restricted")

    def origins(self, snapshot: SnapshotId, entry: FileEntry, token: str | None) -> list[Source]:
        del snapshot, token
        return [Source(entry.digest, self)]


def profile_of(name: str) -> Profile:
    return PROFILES[name]

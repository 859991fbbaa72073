"""What the upstream has: few repositories that share much, so that evicting and linking happen often."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelcached.cache.core import Core
from modelcached.catalog import Answer
from modelcached.errors import CacheError, Reason
from modelcached.model import (
    Algorithm,
    Commit,
    Digest,
    FileEntry,
    Manifest,
    Profile,
    RepoId,
    Revision,
    Selection,
    SnapshotId,
    as_commit,
)
from modelcached.profiles import index_file, select
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.origin import Origin, OriginFailedError
from modelcached.sources.sink import Sink
from modelcached.store.manifests import Record

KIB = 1 << 10
PART_BYTES = 48 * KIB
COMMITS = 3
BRANCHES = (Revision("main"), Revision("dev"))
PROFILES = (Profile("vllm"), Profile("full"), Profile("", ("*.json",)), Profile("transformers"))
MODELS = tuple(RepoId(name) for name in ("org/alpha", "org/alpha-copy", "org/beta", "org/gamma", "org/shards", "solo"))
ADAPTERS = tuple(RepoId(name) for name in ("org/lora-one", "org/lora-two"))
GIANT = RepoId("org/giant")
"""Larger than any budget here; its bytes are never made."""

CONTENT: dict[str, bytes] = {}
"""By the digest's hex."""


def _bytes(label: str, size: int) -> bytes:
    return random.Random(label).randbytes(size)


def digest_of(content: bytes, *, large: bool) -> Digest:
    """As the Hub lists it: SHA-256 for LFS files, git's SHA-1 for small ones."""
    if large:
        return Digest(Algorithm.SHA256, hashlib.sha256(content).hexdigest())
    return Digest(Algorithm.GIT_SHA1, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _entry(path: str, content: bytes) -> FileEntry:
    large = not path.endswith((".json", ".txt", ".md", ".py")) or len(content) > 30 * KIB
    digest = digest_of(content, large=large)
    CONTENT[digest.hex] = content
    return FileEntry(path, len(content), digest, digest.hex)


def _base_files(name: str, number: int) -> dict[str, bytes]:
    """A model of three commits: the second changes a document, the third the weights."""
    weights = f"{name} weights {number // 2}"
    family = "a" if name in ("org/alpha", "org/beta") else "b"
    files = {
        "config.json": json.dumps({"name": name, "commit": number}).encode(),
        "tokenizer.json": _bytes(f"tokenizer {family}", 56 * KIB),
        "vocab.txt": b"v",
        "__init__.py": b"",
        "README.md": f"{name} as of {number}".encode() * 40,
        "onnx/model.onnx": _bytes(f"{name} onnx", 90 * KIB + 1),
        "extra/deep/special.json": f'{{"special": {number % 2}}}'.encode(),
    }
    if name == "org/shards":
        shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        files |= {shard: _bytes(f"{weights} {shard}", 130 * KIB + 7) for shard in shards}
        index = {"weight_map": {f"t{n}": shard for n, shard in enumerate(shards)}}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    else:
        files["model.safetensors"] = _bytes(weights, {"org/beta": 400, "solo": 190}.get(name, 280) * KIB + 3)
    return files


def _adapter_files(name: str, number: int) -> dict[str, bytes]:
    return {
        "adapter_config.json": json.dumps({"adapter": name, "r": number}).encode(),
        "adapter_model.safetensors": _bytes(f"{name} {number}", 40 * KIB),
    }


def commit_of(name: str, number: int) -> Commit:
    """A duplicated repository has the same commits."""
    return Commit(hashlib.sha1(f"{name.removesuffix('-copy')} {number}".encode()).hexdigest())


def _manifests() -> dict[SnapshotId, Manifest]:
    made = {}
    for name, number in itertools.product((*MODELS, *ADAPTERS), range(COMMITS)):
        original = name.removesuffix("-copy")
        files = _adapter_files(name, number) if name in ADAPTERS else _base_files(original, number)
        commit = commit_of(name, number)
        entries = [_entry(path, content) for path, content in files.items()]
        made[SnapshotId(name, commit)] = Manifest.of(name, commit, entries)
    huge = FileEntry("model.safetensors", 64 << 20, Digest(Algorithm.SHA256, "ab" * 32), "ab" * 20)
    commit = commit_of(GIANT, 0)
    made[SnapshotId(GIANT, commit)] = Manifest.of(GIANT, commit, [huge])
    return made


MANIFESTS: Mapping[SnapshotId, Manifest] = _manifests()
SIZES = {entry.digest.hex: entry.size_bytes for manifest in MANIFESTS.values() for entry in manifest.files.values()}


@functools.cache
def selection_of(snapshot: SnapshotId, profile: Profile) -> Selection:
    """What the profile means there."""
    manifest = MANIFESTS[snapshot]
    index = index_file(profile, manifest)
    return select(profile, manifest, CONTENT[index.digest.hex] if index is not None else None)


def hexes_of(snapshot: SnapshotId, profile: Profile) -> frozenset[str]:
    """The blobs that a request for it needs, its index file too."""
    manifest = MANIFESTS[snapshot]
    paths = selection_of(snapshot, profile).paths
    index = index_file(profile, manifest)
    entries = [manifest.files[path] for path in paths] + ([index] if index is not None else [])
    return frozenset(entry.digest.hex for entry in entries)


@dataclass(eq=False)
class Hub:
    """The upstream at this moment."""

    tips: dict[tuple[RepoId, Revision], int] = field(default_factory=dict)
    """Which commit a branch points to; the first where nothing is said."""
    silent: bool = False
    dies_after_bytes: int | None = None
    """It delivers so many more, and then fails."""
    lies: bool = False
    """What it delivers is wrong in the last byte."""
    lied: bool = False
    """It has delivered a last byte since then."""
    served: Counter[str] = field(default_factory=Counter)
    """Bytes delivered, by digest."""

    def tip(self, repo_id: RepoId, revision: Revision) -> Commit:
        return as_commit(revision) or commit_of(repo_id, self.tips.get((repo_id, revision), 0))


@dataclass(eq=False)
class HubOrigin:
    """One blob of it."""

    hub: Hub
    digest: Digest
    label: str = "hub"
    part_bytes: int = PART_BYTES
    at_once: int | None = None
    content_tries: int = 1

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        content = CONTENT[self.digest.hex]
        for position in range(start, end, 16 * KIB):
            if abort.is_set:
                raise AbortedError
            if self.hub.silent:
                raise OriginFailedError("the Hub is silent")
            step = min(position + 16 * KIB, end)
            if self.hub.dies_after_bytes is not None:
                step = min(step, position + self.hub.dies_after_bytes)
                self.hub.dies_after_bytes -= step - position
            view = memoryview(content)[position:step]
            if self.hub.lies and step == len(content):
                view, self.hub.lied = memoryview(bytes([*view[:-1], view[-1] ^ 0xFF])), True
            if view:
                self.hub.served[self.digest.hex] += len(view)
                sink(view, position)
            if self.hub.dies_after_bytes == 0:
                raise OriginFailedError("the Hub died")

    def forget(self) -> None:
        pass

    def __str__(self) -> str:
        return f"hub:{self.digest.hex[:12]}"


class Upstream:
    """In the place of sources.Upstream."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def origins(self, snapshot: SnapshotId, entry: FileEntry, token: str | None) -> list[Origin]:
        return [HubOrigin(self._hub, entry.digest)]


class Catalog:
    """In the place of catalog.Catalog: the Hub's word, or where it is silent, what is cached."""

    def __init__(self, hub: Hub, core: Core) -> None:
        self._hub = hub
        self._core = core

    async def resolve(self, repo_id: RepoId, revision: Revision, token: str | None, cached: Commit | None) -> Answer:
        commit = as_commit(revision)
        if commit is not None:
            return Answer(commit, stale=False, restricted=None)
        if self._hub.silent:
            if cached is None:
                raise CacheError(Reason.UPSTREAM_UNAVAILABLE, "the Hub is silent")
            return Answer(cached, stale=True, restricted=None)
        return Answer(self._hub.tip(repo_id, revision), stale=False, restricted=False, told_at=time.monotonic())

    async def manifest(
        self, snapshot: SnapshotId, token: str | None, *, restricted: bool | None, local: Manifest | None = None
    ) -> Record:
        record = await self._core.pools.on_disk(self._core.manifests.read, snapshot.repo_id, snapshot.commit)
        if record is not None:
            return record
        if self._hub.silent:
            raise CacheError(Reason.UPSTREAM_UNAVAILABLE, "the Hub is silent")
        return Record(MANIFESTS[snapshot])

    async def check_access(self, repo_id: RepoId, token: str | None, *, known: bool) -> bool:
        raise AssertionError("nothing here is restricted")

    def expire(self, repo_id: RepoId) -> None:
        """Nothing is remembered."""

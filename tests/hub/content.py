"""What a file of the test Hub is made of: its bytes, and the names (hashes) the real Hub would give it.

A body lives in memory (small `bytes`) or in a file (a `Path`, or a `Synthetic` written once below the
Hub's own temporary directory), so that a 4 GiB model costs no memory.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LFS_THRESHOLD_BYTES = 10 * 1024 * 1024
"""Above this size the Hub refuses a plain git blob, whatever its suffix."""

LFS_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".ot", ".pb"}
    | {".tflite", ".mlmodel", ".pkl", ".pickle", ".npy", ".npz", ".parquet", ".arrow", ".model", ".zip", ".gz"}
    | {".tar", ".png", ".jpg", ".jpeg", ".gif", ".mp4"}
)
"""The weight types and binaries that the Hub's default .gitattributes sends to LFS."""

_PAGE_BYTES = 4096
_BLOCK_BYTES = 1024 * 1024
_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Synthetic:
    """Deterministic bytes made up cheaply: `size` bytes that only `seed` decides.

    Every 4 KiB page starts with its own number, so bytes delivered at a wrong offset never compare equal.
    `head` overwrites the first bytes, e.g. with the header of a real file format (at most 1 MiB).
    """

    size: int
    seed: int = 0
    head: bytes = b""

    def blocks(self) -> Iterator[bytes]:
        """The content in blocks of at most 1 MiB."""
        base = random.Random(self.seed).randbytes(_BLOCK_BYTES)
        for block_start in range(0, self.size, _BLOCK_BYTES):
            block = bytearray(base)
            for page in range(0, _BLOCK_BYTES, _PAGE_BYTES):
                struct.pack_into("<QQ", block, page, (block_start + page) // _PAGE_BYTES, self.seed & (2**64 - 1))
            if block_start == 0:
                block[: len(self.head)] = self.head
            yield bytes(block[: self.size - block_start])

    def sha256(self) -> str:
        """Hex SHA-256 of the content, computed anew on every call."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


FileSource = bytes | Path | Synthetic
"""What a commit accepts as the content of one file."""

CommitFiles = Mapping[str, FileSource | None]
"""Path to content; None removes the path of a base commit."""


class Body(Protocol):
    """Bytes that can be read at any offset; immutable while the Hub runs."""

    @property
    def size(self) -> int: ...

    @property
    def path(self) -> Path | None:
        """The file behind it, if the kernel may send it by itself (sendfile)."""

    def read_at(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class MemoryBody:
    data: bytes
    path: Path | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


@dataclass(frozen=True)
class FileBody:
    path: Path
    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)


@dataclass(frozen=True)
class HubFile:
    """One file of one commit.

    `git_sha1` is the git blob id: of the body for a small file, of the LFS pointer for an LFS file, as in
    the tree listing of the real Hub. `sha256` is None for small files, which have no LFS entry.
    """

    size: int
    sha256: str | None
    git_sha1: str
    lfs: bool
    body: Body
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        """The unquoted ETag, which is the blob's file name in every client's cache."""
        return self.sha256 if self.sha256 is not None else self.git_sha1

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.sha256, self.size)) if self.sha256 is not None else 0


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_blob_sha1(data: bytes) -> str:
    """The id git gives to a blob: SHA-1 over a header and the body."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs_by_default(path: str, size: int) -> bool:
    """Whether the Hub would keep this file in LFS, going by suffix and size (bytes)."""
    return size > LFS_THRESHOLD_BYTES or os.path.splitext(path)[1].lower() in LFS_SUFFIXES


class BodyStore:
    """Turns sources into hashed files, keeping each Synthetic once. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._synthetic: dict[Synthetic, tuple[FileBody, str]] = {}
        self._by_sha256: dict[str, HubFile] = {}

    def add(self, path: str, source: FileSource, *, lfs: bool | None = None) -> HubFile:
        """Hash a source (reads a Path once) and keep it addressable by its SHA-256 if it is LFS."""
        body, sha256 = self._materialise(source)
        as_lfs = is_lfs_by_default(path, body.size) if lfs is None else lfs
        if as_lfs:
            pointer_sha1 = git_blob_sha1(lfs_pointer(sha256, body.size))
            file = HubFile(body.size, sha256, pointer_sha1, True, body)
            with self._lock:
                self._by_sha256[sha256] = file
            return file
        return HubFile(body.size, None, git_blob_sha1(body.read_at(0, body.size)), False, body)

    def by_sha256(self, sha256: str) -> HubFile | None:
        with self._lock:
            return self._by_sha256.get(sha256)

    def _materialise(self, source: FileSource) -> tuple[Body, str]:
        if isinstance(source, bytes):
            return MemoryBody(source), hashlib.sha256(source).hexdigest()
        if isinstance(source, Path):
            return FileBody(source, source.stat().st_size), _sha256_of(source)
        with self._lock:
            known = self._synthetic.get(source)
            if known is None:
                known = self._synthetic[source] = self._write(source)
            return known

    def _write(self, source: Synthetic) -> tuple[FileBody, str]:
        target = self._directory / f"synthetic-{len(self._synthetic)}"
        digest = hashlib.sha256()
        with target.open("wb") as file:
            for block in source.blocks():
                file.write(block)
                digest.update(block)
        return FileBody(target, source.size), digest.hexdigest()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def package_repo(directory: Path, *, exclude_suffixes: tuple[str, ...] = (".pyc", ".py")) -> dict[str, FileSource]:
    """The files of a directory tree as a commit, e.g. the weights directory inside an installed package."""
    return {
        file.relative_to(directory).as_posix(): file
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.suffix not in exclude_suffixes and "__pycache__" not in file.parts
    }

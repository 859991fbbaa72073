"""The words of the field as values: repository, revision, commit, digest, manifest, selection.

Everything that comes from outside (a request, a Hub, a file) becomes one of
these through a ``parse_*`` function here, or is refused by name. Below this
floor nothing is checked again.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NewType

from modelcached.errors import CacheError, Reason

RepoId = NewType("RepoId", str)
"""``org/name``, or ``name``; valid by huggingface_hub's own rule (utils/_validators.py)."""
Revision = NewType("Revision", str)
"""A branch, a tag or a commit, as asked for."""
Commit = NewType("Commit", str)
"""40 lower-case hex digits."""

MAX_REPO_ID_PART_CHARACTERS = 96
MAX_REVISION_CHARACTERS = 255
MAX_TOKEN_CHARACTERS = 4096
MAX_PATH_BYTES = 1024
MAX_COMPONENT_BYTES = 255

_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_REPO_PART}/)?{_REPO_PART}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]+")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+@=-]*)*")
_PLAIN_PATHS = re.compile(r"[\w+=-][\w.+=-]*(?:[/\n][\w+=-][\w.+=-]*)*", re.ASCII)
"""Nearly all paths there are, a line each."""
_HEX = re.compile(r"[0-9a-f]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shown(text: str, limit: int = 100) -> str:
    """A stranger's text made safe for a log line or a terminal, and short."""
    cut = text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
    return ascii(cut).strip("'\"") if _CONTROL.search(cut) else cut


def parse_repo_id(text: str) -> RepoId:
    """Refuses (INVALID_REPO_ID) what the Hub would not name a repository."""
    valid = (
        len(text) <= 2 * MAX_REPO_ID_PART_CHARACTERS + 1
        and all(len(part) <= MAX_REPO_ID_PART_CHARACTERS for part in text.split("/"))
        and _REPO_ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )
    if not valid:
        raise CacheError(
            Reason.INVALID_REPO_ID, f"'{shown(text)}' is not a repository id", metadata={"repo_id": shown(text)}
        )
    return RepoId(text)


def parse_revision(text: str) -> Revision:
    """Empty means ``main``. Refuses (INVALID_REVISION) what could not be a file below ``refs/``."""
    if not text:
        return Revision("main")
    valid = (
        len(text) <= MAX_REVISION_CHARACTERS
        and _REVISION.fullmatch(text) is not None
        and ".." not in text
        and not any(part.endswith((".", ".lock")) for part in text.split("/"))
    )
    if not valid:
        raise CacheError(
            Reason.INVALID_REVISION, f"'{shown(text)}' is not a revision", metadata={"revision": shown(text)}
        )
    return Revision(text)


def is_token(text: str) -> bool:
    """Whether the text can be a bearer token: what cannot would be quoted by the error that refuses the header."""
    return len(text) <= MAX_TOKEN_CHARACTERS and _TOKEN.fullmatch(text) is not None


def as_commit(text: str) -> Commit | None:
    """The text as a commit if it is one: 40 lower-case hex digits."""
    return Commit(text) if _COMMIT.fullmatch(text) else None


class Algorithm(enum.StrEnum):
    """How a digest is computed."""

    SHA256 = "sha256"
    GIT_SHA1 = "git-sha1"


# Tuples, not dataclasses, for what there is one of for each of 100,000 files: the interpreter itself makes, hashes and
# compares them, which halves the start of a large cache.


made = tuple.__new__
"""``made(FileEntry, values)`` is ``FileEntry._make(values)`` without its Python; how many there are is not checked."""

_ALGORITHMS = {64: Algorithm.SHA256, 40: Algorithm.GIT_SHA1}
"""By how many hex digits a digest has."""


class Digest(NamedTuple):
    """The identity of a blob's content; its hex is the blob's file name."""

    algorithm: Algorithm
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest | None:
        """A digest from a blob's file name; None where it is none."""
        algorithm = _ALGORITHMS.get(len(text))
        return cls(algorithm, text) if algorithm is not None and _HEX.fullmatch(text) else None

    @classmethod
    def parse_all(cls, texts: Iterable[str]) -> dict[str, Digest]:
        """By their text; what is no digest is left out. One look for all of them, for nearly always all of them are."""
        texts = list(texts)
        if not _HEX.fullmatch("".join(texts)):
            texts = [text for text in texts if _HEX.fullmatch(text)]
        return {text: made(cls, (_ALGORITHMS[len(text)], text)) for text in texts if len(text) in _ALGORITHMS}

    def __str__(self) -> str:
        return self.hex


class FileEntry(NamedTuple):
    """One file of a commit."""

    path: str
    """Relative, with forward slashes; checked by ``parse_path``."""
    size_bytes: int
    digest: Digest
    blob_id: str
    """Git's own id of the entry: for a small file its digest, for an LFS file that of the pointer."""
    xet_hash: str | None = None


def parse_path(text: str) -> str:
    """Refuses (INVALID_MANIFEST) a file path that could leave the snapshot or cannot be a file name."""
    parts = text.split("/")
    valid = (
        0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_PATH_BYTES
        and "\\" not in text
        and _CONTROL.search(text) is None
        and all(part not in ("", ".", "..") for part in parts)
        and all(len(part.encode("utf-8", "surrogatepass")) <= MAX_COMPONENT_BYTES for part in parts)
    )
    if not valid:
        raise CacheError(
            Reason.INVALID_MANIFEST,
            f"upstream lists the file path '{shown(text)}', which cannot be stored safely",
            metadata={"path": shown(text)},
        )
    return text


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one repository holds at one commit."""

    repo_id: RepoId
    commit: Commit
    files: Mapping[str, FileEntry]
    restricted: bool = False
    """Gated or private: who may read it is the Hub's to say, per token."""
    local: bool = False
    """A directory of this machine told it, not the Hub: it may hold less than the commit does."""

    @classmethod
    def of(
        cls,
        repo_id: RepoId,
        commit: Commit,
        files: list[FileEntry],
        *,
        restricted: bool = False,
        local: bool = False,
    ) -> Manifest:
        """Checks that no path is listed twice or is both a file and a directory (INVALID_MANIFEST)."""
        by_path: dict[str, FileEntry] = {}
        plain = _are_plain([entry.path for entry in files])
        for entry in files:
            path = entry.path if plain else parse_path(entry.path)
            if by_path.setdefault(path, entry) is not entry:
                raise CacheError(Reason.INVALID_MANIFEST, f"upstream lists '{shown(entry.path)}' twice")
        for parent in _folders(by_path):
            if parent in by_path:
                raise CacheError(
                    Reason.INVALID_MANIFEST,
                    f"upstream lists '{shown(parent)}' both as a file and as a directory",
                )
        return cls(repo_id, commit, by_path, restricted, local)


def _are_plain(paths: list[str]) -> bool:
    """Whether none of them needs a look of its own; one look tells that of all, and nearly always it is so."""
    lines = "\n".join(paths)
    return (
        _PLAIN_PATHS.fullmatch(lines) is not None
        and lines.count("\n") == len(paths) - 1
        and max(map(len, paths)) <= MAX_COMPONENT_BYTES
    )


def _folders(paths: Iterable[str]) -> set[str]:
    """All directories that the paths lie in, the root apart."""
    folders: set[str] = set()
    for path in paths:
        while "/" in path and (path := path.rpartition("/")[0]) not in folders:
            folders.add(path)
    return folders


@dataclass(frozen=True, slots=True)
class Profile:
    """Which files of a manifest a runtime needs; see profiles.py for what each selects."""

    name: str = "vllm"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def canonical(self) -> str:
        """One text per meaning: ``vllm``, ``gguf:Q4_K_M``, ``include=*.json,exclude=a*``."""
        if not self.include and not self.exclude:
            return self.name
        parts = [f"include={pattern}" for pattern in sorted(set(self.include))]
        parts += [f"exclude={pattern}" for pattern in sorted(set(self.exclude))]
        return ",".join(parts)


@dataclass(frozen=True, slots=True)
class Selection:
    """A profile applied to a manifest: what "complete" means for a request."""

    profile: str
    """The profile's canonical name."""
    format: str
    """Which kind of weights was chosen: safetensors, consolidated, bin, pt, gguf, any, none."""
    paths: frozenset[str]


class SnapshotId(NamedTuple):
    """One repository at one commit."""

    repo_id: RepoId
    commit: Commit

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"


def repo_folder(repo_id: RepoId) -> str:
    """The repository's directory below ``hub/``, as huggingface_hub names it."""
    return "models--" + repo_id.replace("/", "--")


def repo_id_of_folder(name: str) -> RepoId | None:
    """The inverse of ``repo_folder``; None for any other name."""
    kind, _, rest = name.partition("--")
    if kind != "models" or not rest:
        return None
    text = rest.replace("--", "/")
    try:
        return parse_repo_id(text)
    except CacheError:
        return None

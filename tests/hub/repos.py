"""Repositories of the test Hub: commits named by their content, branches and tags that move."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from .cas import Cas
from .content import BodyStore, CommitFiles, FileSource, HubFile

Gated = Literal["auto", "manual"] | bool
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_FIRST_COMMIT_AT = datetime(2026, 1, 1, tzinfo=UTC)


class UnknownRevisionError(Exception):
    """No branch, tag or commit of that name."""


@dataclass(frozen=True)
class Commit:
    """One immutable tree. The id is derived from repo, parent and tree, so equal histories have equal ids."""

    sha: str
    parent: str | None
    title: str
    date: datetime
    files: Mapping[str, HubFile]


@dataclass(frozen=True)
class HostileEntry:
    """A tree entry no honest Hub would send: the path is passed on untouched, whatever it holds.

    `entry_type` is "file" or "directory"; `content` is what resolve would serve for it.
    """

    path: str
    content: bytes = b"hostile\n"
    entry_type: Literal["file", "directory"] = "file"
    lfs: bool = False


@dataclass
class _State:
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    allowed_tokens: set[str] = field(default_factory=set)
    hostile: tuple[tuple[HostileEntry, HubFile], ...] = ()


class Repo:
    """One model repository; every method is thread-safe."""

    def __init__(
        self, repo_id: str, bodies: BodyStore, cas: Cas, *, gated: Gated = False, private: bool = False, xet: bool
    ) -> None:
        self.repo_id = repo_id
        self.gated: Literal["auto", "manual", False] = "auto" if gated is True else gated
        self.private = private
        self._bodies = bodies
        self._cas = cas
        self._xet = xet
        self._lock = threading.RLock()
        self._state = _State()

    def commit(
        self,
        files: CommitFiles,
        *,
        branch: str = "main",
        base: str | None = None,
        lfs: Mapping[str, bool] | bool | None = None,
        title: str = "Upload files",
        xet: Mapping[str, bool] | bool | None = None,
        xet_hashes: Mapping[str, str] | None = None,
    ) -> str:
        """Add a commit, point `branch` at it (created if new; may be "refs/pr/1") and return its id.

        Without `base` the files are the whole tree; with it they are added to that revision's tree, and a
        None removes a path. `lfs` overrides the default choice, for all files or by path. `xet` puts LFS
        files into the Xet store too, all or by path (default: as the Hub was made). `xet_hashes` adds only
        the tree's xetHash field, for the paths given.
        """
        with self._lock:
            tree = dict(self.files(base)) if base is not None else {}
            for path, source in files.items():
                if source is None:
                    tree.pop(path, None)
                else:
                    tree[path] = self._add(path, source, _for(path, lfs), _for(path, xet), (xet_hashes or {}).get(path))
            parent = self._state.branches.get(branch)
            sha = _commit_id(self.repo_id, parent, title, tree)
            date = _FIRST_COMMIT_AT + timedelta(minutes=len(self._state.commits))
            self._state.commits[sha] = Commit(sha, parent, title, date, dict(sorted(tree.items())))
            self._state.branches[branch] = sha
            return sha

    def tag(self, name: str, revision: str) -> None:
        """Point a tag at a revision, moving it if it exists."""
        with self._lock:
            self._state.tags[name] = self.resolve(revision).sha

    def move(self, branch: str, revision: str) -> None:
        """Point a branch at any revision (a force push); creates the branch if it is new."""
        with self._lock:
            self._state.branches[branch] = self.resolve(revision).sha

    def delete_ref(self, name: str) -> None:
        """Delete a branch or tag; its commits stay reachable by id, as on the real Hub."""
        with self._lock:
            if self._state.branches.pop(name, None) is None and self._state.tags.pop(name, None) is None:
                raise UnknownRevisionError(name)

    def allow(self, token: str) -> None:
        """Let this token read the repo although it is gated or private."""
        with self._lock:
            self._state.allowed_tokens.add(token)

    def disallow(self, token: str) -> None:
        """Take that right back, as an owner who revokes access does."""
        with self._lock:
            self._state.allowed_tokens.discard(token)

    def is_allowed(self, token: str | None) -> bool:
        with self._lock:
            return token in self._state.allowed_tokens

    def hostile_entries(self, entries: Iterable[str | HostileEntry]) -> None:
        """Replace the entries that every listing of every commit carries on top of its true ones."""
        made = [HostileEntry(entry) if isinstance(entry, str) else entry for entry in entries]
        files = tuple((entry, self._bodies.add(entry.path, entry.content, lfs=entry.lfs)) for entry in made)
        with self._lock:
            self._state.hostile = files

    @property
    def hostile(self) -> tuple[tuple[HostileEntry, HubFile], ...]:
        with self._lock:
            return self._state.hostile

    @property
    def branches(self) -> Mapping[str, str]:
        with self._lock:
            return dict(self._state.branches)

    @property
    def tags(self) -> Mapping[str, str]:
        with self._lock:
            return dict(self._state.tags)

    def files(self, revision: str = "main") -> Mapping[str, HubFile]:
        """Path to file of a revision, sorted by path; without the hostile entries."""
        return self.resolve(revision).files

    def file_at(self, commit: Commit, path: str) -> HubFile | None:
        """The file a resolve URL names, hostile entries included."""
        found = commit.files.get(path)
        if found is not None:
            return found
        return next((file for entry, file in self.hostile if entry.path == path), None)

    def resolve(self, revision: str) -> Commit:
        """The commit a branch, tag, full ref or 40-hex id names; raises UnknownRevisionError."""
        with self._lock:
            state = self._state
            name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
            sha = state.branches.get(name) or state.tags.get(name)
            if sha is None and _COMMIT_HASH.fullmatch(revision):
                sha = revision
            commit = state.commits.get(sha) if sha is not None else None
            if commit is None:
                raise UnknownRevisionError(revision)
            return commit

    def history(self, revision: str) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        with self._lock:
            line = [self.resolve(revision)]
            while (parent := line[-1].parent) is not None:
                line.append(self._state.commits[parent])
            return line

    def _add(self, path: str, source: FileSource, lfs: bool | None, xet: bool | None, xet_hash: str | None) -> HubFile:
        file = self._bodies.add(path, source, lfs=lfs)
        if file.lfs and (self._xet if xet is None else xet):
            file = self._cas.add(self.repo_id, path, file)
        return file if xet_hash is None else replace(file, xet_hash=xet_hash)


def _for(path: str, choice: Mapping[str, bool] | bool | None) -> bool | None:
    return choice.get(path) if isinstance(choice, Mapping) else choice


def _commit_id(repo_id: str, parent: str | None, title: str, tree: Mapping[str, HubFile]) -> str:
    lines = [f"{repo_id}\n{parent}\n{title}"]
    lines += [f"{path}\0{file.git_sha1}\0{file.size}" for path, file in sorted(tree.items())]
    return hashlib.sha1("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

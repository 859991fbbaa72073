"""What the Hub said of branches and tags: which commit each is, and when it said so."""

from __future__ import annotations

from modelcached.cache.locks import Locks
from modelcached.model import Commit, RepoId, Revision

_COMMITS = 8
"""So many of one branch are told apart: more do not come within one download."""
_BRANCHES = 4096
"""Those that were spoken of last; more do not change within one download."""


class Branches:
    """The event loop's alone."""

    def __init__(self) -> None:
        self.pointing: Locks[tuple[RepoId, Revision]] = Locks()
        """One at a time moves a branch or tag."""
        self._told: dict[tuple[RepoId, Revision], dict[Commit, float]] = {}

    def heard(self, repo_id: RepoId, revision: Revision, commit: Commit, told_at: float) -> None:
        """The Hub said that the branch or tag is that commit, at that time (time.monotonic())."""
        told = self._told.pop((repo_id, revision), {})
        told[commit] = max(told_at, told.get(commit, 0.0))
        if len(told) > _COMMITS:
            del told[min(told, key=lambda old: told[old])]
        self._told[repo_id, revision] = told  # behind all others
        if len(self._told) > _BRANCHES:
            del self._told[next(iter(self._told))]

    def has_left(self, repo_id: RepoId, revision: Revision, commit: Commit, now: Commit) -> bool:
        """It has moved on from ``commit``: that it is ``now`` was said later."""
        told = self._told.get((repo_id, revision), {})
        return told.get(now, 0.0) > told.get(commit, 0.0)

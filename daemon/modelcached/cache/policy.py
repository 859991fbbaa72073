"""What this node may hold: globs over repository ids and file paths."""

from __future__ import annotations

import fnmatch

from modelcached.config import PolicySection
from modelcached.errors import CacheError, Reason
from modelcached.model import RepoId, Selection


def check_repository(policy: PolicySection, repo_id: RepoId) -> None:
    """Raises CacheError(POLICY) that names the rule."""
    for pattern in policy.deny:
        if fnmatch.fnmatchcase(repo_id, pattern):
            raise CacheError(
                Reason.POLICY, f"{repo_id} is denied by policy.deny {pattern!r}", metadata={"rule": pattern}
            )
    if policy.allow and not any(fnmatch.fnmatchcase(repo_id, pattern) for pattern in policy.allow):
        raise CacheError(
            Reason.POLICY,
            f"{repo_id} matches nothing in policy.allow ({', '.join(policy.allow)})",
            metadata={"rule": "allow"},
        )


def check_files(policy: PolicySection, repo_id: RepoId, selection: Selection) -> None:
    """Raises CacheError(POLICY) that names the file and the rule."""
    for pattern in policy.deny_files:
        for path in sorted(selection.paths):
            if fnmatch.fnmatchcase(path, pattern):
                raise CacheError(
                    Reason.POLICY,
                    f"{repo_id} needs {path}, which policy.deny_files {pattern!r} refuses",
                    metadata={"rule": pattern, "path": path},
                )

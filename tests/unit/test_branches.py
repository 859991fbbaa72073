"""What the Hub said of branches: the latest word counts, and memory has an end."""

from __future__ import annotations

import pytest
from modelcached.cache import branches
from modelcached.cache.branches import Branches
from modelcached.model import Commit, RepoId, Revision

REPO, MAIN = RepoId("org/name"), Revision("main")
FIRST, SECOND, THIRD = (Commit(digit * 40) for digit in "123")


def test_a_branch_has_left_what_it_was_before() -> None:
    heard = Branches()
    assert not heard.has_left(REPO, MAIN, FIRST, SECOND), "nothing was said of either"
    heard.heard(REPO, MAIN, FIRST, 1.0)
    heard.heard(REPO, MAIN, SECOND, 2.0)
    assert heard.has_left(REPO, MAIN, FIRST, SECOND)
    assert not heard.has_left(REPO, MAIN, SECOND, FIRST)
    heard.heard(REPO, MAIN, FIRST, 1.5)  # an answer that was on its way
    assert heard.has_left(REPO, MAIN, FIRST, SECOND)
    heard.heard(REPO, MAIN, FIRST, 3.0)  # moved back
    assert heard.has_left(REPO, MAIN, SECOND, FIRST)


def test_branches_and_repositories_are_apart() -> None:
    heard = Branches()
    heard.heard(REPO, Revision("dev"), SECOND, 2.0)
    heard.heard(RepoId("org/other"), MAIN, SECOND, 2.0)
    assert not heard.has_left(REPO, MAIN, FIRST, SECOND)


def test_what_was_spoken_of_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "_BRANCHES", 2)
    monkeypatch.setattr(branches, "_COMMITS", 2)
    heard = Branches()
    dev, next_one = Revision("dev"), Revision("next")
    for branch in (MAIN, dev):
        heard.heard(REPO, branch, SECOND, 2.0)
    heard.heard(REPO, MAIN, SECOND, 3.0)  # again
    heard.heard(REPO, next_one, SECOND, 4.0)
    assert [heard.has_left(REPO, branch, FIRST, SECOND) for branch in (MAIN, dev, next_one)] == [True, False, True]
    heard.heard(REPO, MAIN, THIRD, 5.0)
    heard.heard(REPO, MAIN, FIRST, 6.0)
    assert not heard.has_left(REPO, MAIN, FIRST, SECOND)
    assert heard.has_left(REPO, MAIN, THIRD, FIRST)
    assert not heard.has_left(REPO, MAIN, Commit("4" * 40), SECOND), "the oldest word of three"

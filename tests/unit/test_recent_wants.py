"""What was derived from a want is kept for the next request that means exactly the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
from modelcached.cache.assemblies import Assemblies
from modelcached.cache.core import Core
from modelcached.cache.want import Want
from modelcached.cache.wanting import _RECENT_WANTS, Wanting
from modelcached.catalog import Catalog
from modelcached.model import Commit, Manifest, RepoId, Revision, Selection
from modelcached.store.manifests import Record

SELECTION = Selection("full", "any", frozenset())
RECORD = Record(Manifest(RepoId("org/name"), Commit("a" * 40), {}))
WANT = Want(RECORD, SELECTION, Revision("main"), stale=False)


@pytest.fixture
def wanting() -> Wanting:
    return Wanting(cast("Core", None), cast("Catalog", None), cast("Assemblies", None))


@pytest.fixture
def known(wanting: Wanting) -> Callable[[Want], Want]:
    return lambda want: wanting._known(want.snapshot, want)


def test_the_same_is_the_same_object(known: Callable[[Want], Want]) -> None:
    assert known(WANT) is WANT
    assert known(replace(WANT)) is WANT


@pytest.mark.parametrize(
    "other",
    [
        replace(WANT, record=replace(RECORD, readers=("somebody",))),
        replace(WANT, record=replace(RECORD)),
        replace(WANT, selection=Selection("full", "any", frozenset({"config.json"}))),
        replace(WANT, revision=Revision("dev")),
        replace(WANT, stale=True),
    ],
    ids=["other readers", "a record read anew", "other files", "another revision", "stale"],
)
def test_anything_else_is_not(known: Callable[[Want], Want], other: Want) -> None:
    known(WANT)
    assert known(other) is other
    assert known(replace(other)) is other


def test_only_so_many_are_kept_and_the_one_that_was_asked_for_longest_ago_goes(
    wanting: Wanting, known: Callable[[Want], Want]
) -> None:
    wants = [replace(WANT, revision=Revision(f"r{number}")) for number in range(_RECENT_WANTS)]
    for want in wants:
        known(want)
    known(wants[0])
    known(WANT)
    assert len(wanting._recent) == _RECENT_WANTS
    assert known(replace(wants[0])) is wants[0]
    assert known(again := replace(wants[1])) is again

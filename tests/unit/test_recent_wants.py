"""What was derived from a want is kept for the next request that means exactly the same."""

from __future__ import annotations

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


def test_the_same_is_the_same_object(wanting: Wanting) -> None:
    assert wanting._known(WANT) is WANT
    assert wanting._known(replace(WANT)) is WANT


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
def test_anything_else_is_not(wanting: Wanting, other: Want) -> None:
    wanting._known(WANT)
    assert wanting._known(other) is other
    assert wanting._known(replace(other)) is other


def test_only_so_many_are_kept_and_the_one_that_was_asked_for_longest_ago_goes(wanting: Wanting) -> None:
    wants = [replace(WANT, revision=Revision(f"r{number}")) for number in range(_RECENT_WANTS)]
    for want in wants:
        wanting._known(want)
    wanting._known(wants[0])
    wanting._known(WANT)
    assert len(wanting._recent) == _RECENT_WANTS
    assert wanting._known(replace(wants[0])) is wants[0]
    assert wanting._known(again := replace(wants[1])) is again

"""A repository's directories go with its last blob, and with nothing that somebody may still need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from modelcached.cache import Core
from modelcached.cache.eviction import remove_if_bare
from modelcached.ledger.victims import Name
from modelcached.model import RepoId

from tests.node.core import a_core, digest_of, put_blob

REPO = RepoId("org/name")


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    with a_core(tmp_path, []) as made:
        yield made


def make(core: Core) -> Path:
    """As a transfer does that is about to publish."""
    directory = Path(core.layout.repo(REPO))
    (directory / "blobs").mkdir(parents=True)
    return directory


async def test_what_nobody_needs_goes(core: Core) -> None:
    directory = make(core)
    await remove_if_bare(core, REPO)
    assert not directory.exists()
    await remove_if_bare(core, REPO)


async def test_a_flight_that_publishes_there_keeps_them_whoever_waits_for_it(core: Core) -> None:
    directory = make(core)
    core.landing[Name(REPO, digest_of(b"x"))] += 1
    await remove_if_bare(core, REPO)
    assert (directory / "blobs").is_dir()


async def test_a_request_that_is_under_way_keeps_them(core: Core) -> None:
    directory = make(core)
    with core.use.hold([], frozenset({Name(REPO, digest_of(b"x"))})):
        await remove_if_bare(core, REPO)
    assert (directory / "blobs").is_dir()


async def test_what_somebody_else_has_put_there_meanwhile_stays(core: Core) -> None:
    blob = put_blob(core, REPO, b"theirs")
    await remove_if_bare(core, REPO)
    assert blob.read_bytes() == b"theirs"


async def test_nothing_is_removed_from_another_hub(core: Core) -> None:
    directory = make(core)
    core.hub_at = (0, 0)
    await remove_if_bare(core, REPO)
    assert (directory / "blobs").is_dir()

"""hub/ is the directory that it was, or nobody may have the old one: by leases, in this boot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelcached.cache import Core
from modelcached.cache.hub import HubKeeper, HubSight
from modelcached.errors import CacheError, Reason
from modelcached.ledger import database as state
from modelcached.ledger.leases import LeasedModel, LeaseKind
from modelcached.model import Commit, RepoId, SnapshotId

from tests.node.core import a_core

SNAPSHOT = SnapshotId(RepoId("org/name"), Commit("a" * 40))


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    with a_core(tmp_path, []) as core:
        yield core


def lease(core: Core) -> str:
    granted, _ = core.use.lease(LeaseKind.TTL, "somebody", (LeasedModel(SNAPSHOT),), ttl_seconds=60)
    return granted.id


async def remembered(core: Core) -> str:
    """What the next daemon will find."""
    await core.database.write(state.COMPLETE)  # after what was written later
    return state.contents(core.database._connection).hub


def another(core: Core) -> None:
    os.rename(core.layout.hub, f"{core.layout.cache_dir}/old")
    os.mkdir(core.layout.hub)


async def test_a_first_look_remembers_it(core: Core) -> None:
    keeper = HubKeeper(core, "")
    assert await keeper.look() is HubSight.OURS
    status = os.stat(core.layout.hub)
    assert core.hub_at == (status.st_dev, status.st_ino)
    assert (await remembered(core)).startswith(f"{core.clock.boot_id} {status.st_dev} {status.st_ino} ")
    core.check_hub()
    keeper.close()


async def test_the_next_daemon_knows_another_one_by_it(core: Core) -> None:
    first = HubKeeper(core, "")
    await first.look()
    first.close()
    known = await remembered(core)
    lease_id = lease(core)
    another(core)
    second = HubKeeper(core, known)
    assert await second.look() is HubSight.LOST
    assert await remembered(core) == known, "it is not taken by having been seen"
    with pytest.raises(CacheError) as caught:
        core.check_hub()
    assert caught.value.reason is Reason.STORAGE_ERROR
    assert lease_id in caught.value.text
    assert str(SNAPSHOT) in core.degraded["hub"]
    third = HubKeeper(core, known)
    assert await third.look() is HubSight.LOST
    core.use.drop(lease_id)
    assert await third.look() is HubSight.NEW
    assert await third.look() is HubSight.OURS
    assert (core.hub_trouble, core.degraded) == ("", {})
    assert await remembered(core) != known
    third.close()


async def test_a_request_under_way_believes_in_the_old_one(core: Core) -> None:
    keeper = HubKeeper(core, "")
    await keeper.look()
    with core.use.hold([SNAPSHOT], frozenset()):
        another(core)
        assert await keeper.look() is HubSight.LOST
        with pytest.raises(CacheError, match="another directory"):
            core.check_hub_on_disk()
    assert await keeper.look() is HubSight.NEW
    keeper.close()


async def test_after_another_boot_nobody_has_the_old_one(core: Core) -> None:
    first = HubKeeper(core, "")
    await first.look()
    first.close()
    lease(core)
    _, _, identity = (await remembered(core)).partition(" ")
    another(core)
    second = HubKeeper(core, f"earlier-boot {identity}")
    assert await second.look() is HubSight.OURS
    second.close()


async def test_a_copy_at_another_path_is_no_other_than_it_was(core: Core) -> None:
    """Its old readers have the old one."""
    first = HubKeeper(core, "")
    await first.look()
    first.close()
    lease(core)
    known = await remembered(core)
    another(core)
    second = HubKeeper(core, known.replace(core.layout.hub, "/elsewhere/hub"))
    assert await second.look() is HubSight.OURS
    second.close()


async def test_one_that_is_missing_is_waited_for_with_or_without_a_lease(core: Core) -> None:
    keeper = HubKeeper(core, "")
    await keeper.look()
    os.rename(core.layout.hub, f"{core.layout.cache_dir}/old")
    assert await keeper.look() is HubSight.LOST
    assert "hub" not in os.listdir(core.layout.cache_dir)
    assert "is missing" in core.degraded["hub"]
    os.symlink(f"{core.layout.cache_dir}/old", core.layout.hub)
    assert await keeper.look() is HubSight.LOST, "a link is no directory"
    os.unlink(core.layout.hub)
    os.rename(f"{core.layout.cache_dir}/old", core.layout.hub)
    assert await keeper.look() is HubSight.NEW
    core.check_hub()
    keeper.close()


async def test_the_moment_before_it_is_noticed_is_covered(core: Core) -> None:
    """What asks the disk itself needs no look of the keeper."""
    keeper = HubKeeper(core, "")
    await keeper.look()
    core.check_hub_on_disk()
    another(core)
    core.check_hub()
    with pytest.raises(CacheError, match="another directory"):
        core.check_hub_on_disk()
    os.rmdir(core.layout.hub)
    with pytest.raises(CacheError, match="is missing"):
        core.check_hub_on_disk()
    keeper.close()

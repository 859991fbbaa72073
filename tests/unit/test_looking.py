"""Looks at the disk are shared by requests, and none is older than the request that it is for."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from modelcached.cache.core import Core
from modelcached.cache.looking import Looking, Sight
from modelcached.cache.want import Want
from modelcached.model import Commit, Manifest, RepoId, Revision, Selection
from modelcached.store.manifests import Record


class Watched(Looking):
    """Looks end when they are told to."""

    def __init__(self) -> None:
        super().__init__(cast("Core", None))
        self.begun: list[asyncio.Future[Sight]] = []
        self.wanted: list[Want] = []

    async def _see(self, want: Want) -> Sight:
        self.wanted.append(want)
        self.begun.append(asyncio.get_running_loop().create_future())
        return await self.begun[-1]


def want(repo: str = "org/name", revision: str = "main", profile: str = "full") -> Want:
    manifest = Manifest(RepoId(repo), Commit("a" * 40), {})
    return Want(Record(manifest), Selection(profile, "any", frozenset()), Revision(revision), stale=False)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


WHOLE, GONE = Sight(whole=True, named=True), Sight(whole=False, named=False)


async def test_who_asks_while_a_look_runs_gets_the_next_one_and_shares_it() -> None:
    looking = Watched()
    first = asyncio.create_task(looking.look(want()))
    await turns()
    later = [asyncio.create_task(looking.look(want())) for _ in range(3)]
    await turns()
    assert len(looking.begun) == 1
    looking.begun[0].set_result(WHOLE)
    await turns()
    assert first.result() is WHOLE
    assert not any(task.done() for task in later), "what the first look saw may have changed before they asked"
    looking.begun[1].set_result(GONE)
    assert await asyncio.gather(*later) == [GONE] * 3
    assert len(looking.begun) == 2


async def test_a_look_goes_by_what_was_known_when_it_was_asked_for() -> None:
    """The same files of the same commit, but another record: the Hub's list, say, where a folder's stood in."""
    looking, old, new = Watched(), want(), want()
    asked = [asyncio.create_task(looking.look(one)) for one in (old, new)]
    await turns()
    looking.begun[0].set_result(GONE)
    await turns()
    looking.begun[1].set_result(WHOLE)
    assert await asyncio.gather(*asked) == [GONE, WHOLE]
    assert looking.wanted[0] is old
    assert looking.wanted[1] is new


async def test_each_look_is_for_what_is_asked() -> None:
    looking = Watched()
    wants = (want(), want(revision="dev"), want(profile="vllm"), want(repo="org/other"))
    asked = [asyncio.create_task(looking.look(one)) for one in wants]
    await turns()
    assert len(looking.begun) == 4
    for number, look in enumerate(looking.begun):
        look.set_result(Sight(whole=number % 2 == 0, named=False))
    assert [sight.whole for sight in await asyncio.gather(*asked)] == [True, False, True, False]


async def test_a_request_that_gives_up_takes_nobody_with_it() -> None:
    looking = Watched()
    asked: list[asyncio.Task[Any]] = [asyncio.create_task(looking.look(want())) for _ in range(3)]
    await turns()
    asked[0].cancel()
    await turns()
    assert len(looking.begun) == 2, "the next begins although the first has not come to its end"
    asked[1].cancel()
    await turns()
    looking.begun[1].set_result(WHOLE)
    assert await asked[2] is WHOLE
    assert len(looking.begun) == 2


async def test_nobody_is_left_of_a_look_that_all_have_given_up() -> None:
    looking = Watched()
    asked = [asyncio.create_task(looking.look(want())) for _ in range(3)]
    await turns()
    for task in asked:
        task.cancel()
    await turns()
    looking.begun[1].set_result(GONE)
    await turns()
    again = asyncio.create_task(looking.look(want()))
    await turns()
    looking.begun[2].set_result(WHOLE)
    assert await again is WHOLE


async def test_a_look_that_fails_tells_all_that_share_it_and_the_next_is_a_new_one() -> None:
    looking = Watched()
    asked = [asyncio.create_task(looking.look(want())) for _ in range(3)]
    await turns()
    looking.begun[0].set_exception(OSError("disk"))
    await turns()
    looking.begun[1].set_exception(OSError("again"))
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert [str(end) for end in ends] == ["disk", "again", "again"]
    again = asyncio.create_task(looking.look(want()))
    await turns()
    looking.begun[2].set_result(WHOLE)
    assert await again is WHOLE

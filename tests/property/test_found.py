"""What the state machine has found, in as few steps as show it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from modelcached.cache import Core, linking, verification
from modelcached.cache.assemblies import Watch
from modelcached.cache.requests import EnsureRequest, LeaseWish, ModelRequest, Ready
from modelcached.errors import CacheError
from modelcached.model import Digest, Profile, RepoId, Revision, SnapshotId
from modelcached.store.index import Blob, Index
from modelcached.store.manifests import BlobStamp
from modelcached.store.scan import regular_status

from tests.property import universe
from tests.property.machine import CacheMachine
from tests.property.universe import MODELS

VLLM, JSON = Profile("vllm"), Profile("", ("*.json",))
ALPHA, COPY, BETA = MODELS[:3]


@pytest.fixture
def state(errors: list[str]) -> Iterator[CacheMachine]:
    """Each step of it checks all invariants."""
    machine = CacheMachine()
    machine.begin(seed=0, room=2400)
    yield machine
    machine.teardown()


def file_of(repo_id: RepoId, path: str) -> Digest:
    return universe.MANIFESTS[SnapshotId(repo_id, universe.commit_of(repo_id, 0))].files[path].digest


def test_a_file_that_looks_changed_is_not_taken_from_under_a_reader_by_another_ones_request(
    state: CacheMachine,
) -> None:
    state.ensure(model=(ALPHA, 0, VLLM), kind="pod", number=0)
    digest = file_of(ALPHA, "model.safetensors")
    os.utime(state.life.layout.blob(ALPHA, digest), ns=(1, 1))
    state.be_killed(another_boot=False)
    state.ensure(model=(ALPHA, 0, JSON), kind="pod", number=1)
    (links,) = state.truth.snapshots.values()
    assert "model.safetensors" in links


def test_a_repository_that_lost_a_blob_hides_no_other_one_that_has_it(state: CacheMachine) -> None:
    for repo_id in (ALPHA, BETA):
        state.ensure(model=(repo_id, 0, JSON), kind="ttl", number=0)
    digest = file_of(ALPHA, "tokenizer.json")
    os.unlink(state.life.layout.blob(ALPHA, digest))
    state.damaged.add((ALPHA, digest.hex))
    state.disturbed = True
    state.hub.served.clear()
    state.ensure(model=(COPY, 0, JSON), kind="ttl", number=0)
    assert digest.hex not in state.hub.served


def test_a_blob_that_another_repository_brings_while_a_request_waits_for_space_is_not_fetched_again(
    state: CacheMachine,
) -> None:
    several = [(repo_id, 0, JSON) for repo_id in (ALPHA, COPY, BETA)]
    for seed in range(20):
        state.random.seed(seed)
        state.ensure_together(several=several, kind="ttl", same=False)
        state.release(number=0, count=12)
        for repo_id in (ALPHA, COPY, BETA):
            state.evict(number=[s.repo_id for s in sorted(state.plain.known)].index(repo_id))


def test_names_that_are_about_to_go_are_not_counted() -> None:
    """A link is made while another name of the inode is condemned: stat still sees that one."""
    index, digest = Index(), file_of(ALPHA, "tokenizer.json")
    stamp = BlobStamp(7, 100, 1)
    index.add_link(ALPHA, digest, Blob(stamp, 4096, 1, verified=True))
    index.add_link(BETA, digest, Blob(stamp, 4096, 2, verified=True))
    index.drop_link(ALPHA, digest)
    index.add_link(COPY, digest, Blob(stamp, 4096, 3, verified=True))
    assert [index.repo(repo_id).blobs[digest].link_count for repo_id in (BETA, COPY)] == [2, 2]


def test_a_name_that_is_hashed_anew_while_another_one_goes_is_counted_right(state: CacheMachine) -> None:
    for number in range(1, 80, 2):
        for repo_id in (ALPHA, BETA):
            state.ensure(model=(repo_id, 0, JSON), kind="ttl", number=0)
        state.release(number=0, count=12)
        os.utime(state.life.layout.blob(ALPHA, file_of(ALPHA, "tokenizer.json")), ns=(number, number))
        state.be_killed(another_boot=False)
        state.ensure_amid_an_eviction(model=(ALPHA, 0, JSON), number=number, own=False)


def test_a_request_that_is_cancelled_leaves_no_byte_in_the_account_that_is_gone(state: CacheMachine) -> None:
    for turns in range(0, 60, 3):
        state.lose_the_database(how="garbage", another_boot=False, known=True)  # leaves something in quarantine
        state.others_take_space(room=100)
        state.ensure_and_give_up(model=(BETA, Revision("main"), VLLM), turns=turns, how="an operator")


def test_what_lands_after_its_request_has_failed_is_in_the_account(state: CacheMachine) -> None:
    for after in range(60, 240, 3):
        state.random.seed(after)
        state.ensure_from_a_bad_hub(model=(RepoId("org/shards"), after % 3, Profile("full")), after=after, how="dies")
        state.sweep_leftovers(old=True)


def test_a_kill_between_two_evictions_of_a_repository_shows_no_snapshot_without_its_blobs(state: CacheMachine) -> None:
    for calls in range(1, 40):
        for number in (0, 1):
            state.ensure(model=(ALPHA, number, VLLM), kind="ttl", number=0)
        state.release(number=0, count=12)
        state.be_killed_at_work(model=(ALPHA, 0, VLLM), number=0, calls=calls, what="evict", another_boot=False)


def test_a_request_that_comes_to_nothing_leaves_no_empty_directory_of_what_went_for_it(errors: list[str]) -> None:
    """What it had linked at an earlier try goes for itself, at the next."""
    state = CacheMachine()
    state.begin(seed=852, room=-200)
    main, gamma = Revision("main"), RepoId("org/gamma")
    one, two = ((RepoId(f"org/lora-{name}"), main, VLLM) for name in ("one", "two"))
    state.ensure_adapters(base=(ALPHA, main, VLLM), kind="ttl", more=[one, two])
    state.ensure_something()
    state.a_branch_moves_on(kind="ttl", number=0)
    state.a_branch_moves_on(kind="ttl", number=0)
    state.ensure_something()
    state.ensure_adapters(base=(gamma, main, Profile("full")), kind="ttl", more=[one])
    for _ in range(3):
        state.ensure_something()
    state.ensure_adapters(base=(ALPHA, main, VLLM), kind="ttl", more=[one])
    for _ in range(2):
        state.ensure_something()
    state.teardown()


def test_a_hit_by_a_new_name_that_is_given_up_leaves_the_name_as_it_is_believed(state: CacheMachine) -> None:
    """No branch is believed that is not on the disk, and none is there whose block is not in the account."""
    for turns in range(1, 80):
        state.ensure(model=(ALPHA, 0, JSON), kind="ttl", number=0)
        state.ensure_and_give_up(model=(ALPHA, Revision("main"), JSON), turns=turns, how="the caller")
        state.release(number=0, count=12)
        state.evict(number=0)


def test_a_link_that_is_made_while_its_request_is_cancelled_is_known(state: CacheMachine) -> None:
    for turns in range(1, 80):
        state.ensure(model=(ALPHA, 0, JSON), kind="ttl", number=0)
        state.ensure_and_give_up(model=(COPY, 0, JSON), turns=turns, how="an operator")
        state.release(number=0, count=12)
        for _ in sorted(state.plain.known):
            state.evict(number=0)


def test_what_lands_between_a_look_and_its_answer_is_not_taken_for_missing(
    state: CacheMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = file_of(ALPHA, "tokenizer.json")

    def look(path: str) -> os.stat_result | None:
        core, seen = state.life.core, regular_status(path)
        if seen is None:
            landed = core.snapshots.link_blob(digest, ALPHA, COPY)
            core.index.add_link(COPY, digest, Blob.verified_now(landed))
        return seen

    async def verify_while_it_lands() -> None:
        core = state.life.core
        await verification._verify_one(core, COPY, digest, 0, lambda _: None)
        await core.measure_after(COPY)
        assert core.index.blob(COPY, digest) is not None

    state.ensure(model=(ALPHA, 0, JSON), kind="ttl", number=0)
    monkeypatch.setattr(verification, "regular_status", look)
    state.step("verify", verify_while_it_lands())


def test_a_donor_that_is_hashed_anew_meanwhile_is_still_one(state: CacheMachine) -> None:
    digest = file_of(ALPHA, "tokenizer.json")

    async def link_while_it_is_hashed() -> None:
        core = state.life.core
        task = asyncio.create_task(linking._link_from(core, ALPHA, digest, COPY))
        await asyncio.sleep(0)
        before = core.index.blob(ALPHA, digest)
        assert before is not None
        core.index.add_link(ALPHA, digest, replace(before))
        assert await task

    state.ensure(model=(ALPHA, 0, JSON), kind="ttl", number=0)
    state.step("link", link_while_it_is_hashed())


def test_who_asks_while_a_refused_request_counts_what_it_leaves_waits_for_space_as_long_as_it_wants(
    state: CacheMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, later = Core.measure_after, list[asyncio.Task[Ready]]()

    def ask(patience: timedelta) -> asyncio.Task[Ready]:
        model, wish = ModelRequest(ALPHA, Revision("main"), VLLM), LeaseWish(holder="a test")
        request = EnsureRequest((model,), wish, wait_for_space=patience)
        return asyncio.create_task(state.life.cache.ensure(request, Watch(), state.life.pods.seen))

    async def measure_after(core: Core, *repos: RepoId) -> None:
        if not later:
            later.append(ask(timedelta(seconds=30)))
            for _ in range(50):
                await asyncio.sleep(0)
        await original(core, *repos)

    async def both() -> None:
        await state._leave_room(100)
        monkeypatch.setattr(Core, "measure_after", measure_after)
        with pytest.raises(CacheError, match="more"):
            await ask(timedelta(0))
        await state._leave_room(2400)
        state.life.core.room.tell()
        assert (await later[0]).models[0].snapshot.repo_id == ALPHA

    state._run(both())

"""What can happen to a cache, in any order, and what must hold after each of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from modelcached.cache.assemblies import Watch
from modelcached.cache.core import SET_ASIDE_BYTES
from modelcached.cache.leftovers import orphans
from modelcached.cache.requests import EnsureRequest, LeaseWish, ModelRequest, Phase, Ready
from modelcached.config import LEAST_BUDGET_BYTES, Config
from modelcached.errors import CacheError, Reason
from modelcached.events import BlobCondemned, Event, SnapshotEvicted
from modelcached.ledger.leases import Lease, LeaseKind
from modelcached.model import Commit, Digest, Profile, RepoId, Revision, SnapshotId, as_commit, repo_folder
from modelcached.store.index import SnapshotState
from modelcached.store.manifests import BlobStamp
from modelcached.upkeep import loops

from tests.property import universe
from tests.property.life import OWN_POD, Hands, Life
from tests.property.plain import Kept, Plain, PlainLease, Shelf, plain_lru
from tests.property.truth import Memory, Name, Truth, look
from tests.property.universe import ADAPTERS, BRANCHES, COMMITS, CONTENT, GIANT, KIB, MODELS, PROFILES, SIZES

SHARED_MEMORY = "/dev/shm"
SMALL_FILES_BYTES = 64 * KIB
"""Refs, records and the like that are written without a promise of their own; far less than any weights."""
HIGH, LOW = 0.45, 0.35
PODS = tuple(f"pod-{number}" for number in range(4))

RULES: list[str] = []
"""The names of all."""

Model = tuple[RepoId, Revision, Profile]


@dataclass(eq=False)
class Tally:
    """What a run did."""

    fired: Counter[str] = field(default_factory=Counter)
    """Steps, by rule; one that found nothing to do is none."""
    seen: Counter[str] = field(default_factory=Counter)
    """What came of them."""

    @property
    def steps(self) -> int:
        return self.fired.total()


@dataclass(eq=False)
class Asked:
    """A request under way."""

    models: tuple[Model, ...]
    snapshots: tuple[SnapshotId | None, ...]
    names: frozenset[Name]
    watch: Watch = field(default_factory=Watch)

    @property
    def holds(self) -> bool:
        """What was condemned before it came has gone by now: from here on nothing of it may go, until it has failed."""
        assembly = self.watch._assembly
        if assembly is None or assembly.phase not in (Phase.DOWNLOADING, Phase.PUBLISHING, Phase.READY):
            return False
        return assembly.phase is Phase.READY or assembly._work is None or not assembly._work.done()


def happens(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., Awaitable[bool | None]]], Any]:
    """A rule: a step of the machine, everything checked behind it. One that returns False found nothing to do."""

    def decorate(act: Callable[..., Awaitable[bool | None]]) -> Any:
        def step(self: CacheMachine, **values: Any) -> None:
            self.step(act.__name__, act(self, **values))

        step.__name__, step.__doc__ = act.__name__, act.__doc__
        RULES.append(act.__name__)
        return precondition(lambda self: not self.only or act.__name__ in self.only)(rule(**drawn)(step))

    return decorate


anything = st.integers(0, 1 << 16)
"""Which one, of however many there are."""
revisions = st.one_of(st.sampled_from(BRANCHES), st.integers(0, COMMITS - 1))
models = st.tuples(st.sampled_from(MODELS), revisions, st.sampled_from(PROFILES))
adapters = st.tuples(st.sampled_from(ADAPTERS), revisions, st.just(PROFILES[0]))
kinds = st.sampled_from(("ttl", "pod", "stream"))
rooms = st.sampled_from((1400, 2000, 1000, 1700, -200, 2400))
"""KiB."""


class CacheMachine(RuleBasedStateMachine):
    """One cache directory, from empty; and the model beside it."""

    tally = Tally()
    errors: ClassVar[list[str]] = []
    """What the daemon has logged as an error in this step."""
    only: frozenset[str] = frozenset()
    """The rules of a run; empty: all."""

    def __init__(self) -> None:
        super().__init__()
        where = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None  # fsync is dear elsewhere
        self.base = Path(tempfile.mkdtemp(prefix="modelcached-property-", dir=where))
        self.root = str(self.base / "cache")
        self.pods_dir = self.base / "pods"
        (self.pods_dir / OWN_POD).mkdir(parents=True)
        self.config = Config(
            cache={
                "dir": self.root,
                "budget": f"{LEAST_BUDGET_BYTES}B",
                "min_free": 0,
                "high_watermark": f"{HIGH:.0%}",
                "low_watermark": f"{LOW:.0%}",
            },
            leases={"kubelet_pods_dir": str(self.pods_dir)},
        )  # type: ignore[arg-type]
        self.loop = asyncio.new_event_loop()
        self.memory, self.plain, self.hub, self.hands = Memory(), Plain(), universe.Hub(), Hands()
        self.random = random.Random(0)
        self.asked: list[Asked] = []
        self.streams: dict[str, list[contextlib.AsyncExitStack]] = {}
        # What somebody else did, that the daemon cannot know or must leave alone:
        self.damaged: set[Name] = set()
        self.flips = 0
        self.torn: set[SnapshotId] = set()
        self.half: set[SnapshotId] = set()
        """A kill came when what was damaged had been taken out of the snapshot, and not yet out of its record."""
        self.doubtful: set[str] = set()
        """Digests of which a lie may be kept, unfinished."""
        self.foreign: set[Name] = set()
        self.foreign_refs: set[tuple[RepoId, Revision]] = set()
        self.robbed: set[str] = set()
        """Folders of repositories from which somebody took something since the last start."""
        self.strangers: set[str] = set()
        self.quarantine: set[str] = set()
        self.disturbed = False
        """The disk is not what the daemon believes: until the next start it cannot reckon exactly."""
        # Of the step that runs:
        self.wrong: list[str] = []
        self.evicted: list[SnapshotId] = []
        self.withdrawn: set[SnapshotId] = set()
        self.loose: set[SnapshotId] = set()
        """Snapshots of which the model does not say exactly what they hold."""
        self.unlinked: Counter[str] = Counter()
        self.committed_bytes = self.database_bytes = 0
        self.truth = Truth(self.root)

    # The frame

    @initialize(seed=st.integers(0, 1 << 32), room=rooms)
    def begin(self, seed: int, room: int) -> None:
        """An empty directory."""
        self.random.seed(seed)
        self.life = self._life()
        self._run(self.life.start())
        self._run(self._leave_room(max(room, 500)))
        self._run(self._check())

    def teardown(self) -> None:
        """Whatever state it is in."""
        try:
            if hasattr(self, "life"):
                self.life.die()
                self._run(self.life.bury())
        finally:
            self.loop.close()
            shutil.rmtree(self.base, ignore_errors=True)

    def _life(self) -> Life:
        return Life(
            self.root, self.pods_dir, self.config, self.hub, self.hands, self.random, self._before_call, self._observe
        )

    def _run(self, work: Awaitable[Any]) -> Any:
        async def within() -> Any:
            async with asyncio.timeout(60):
                return await work

        return self.loop.run_until_complete(within())

    def step(self, name: str, work: Awaitable[bool | None]) -> None:
        """One of the rules."""
        self.wrong.clear()
        self.evicted.clear()
        self.withdrawn.clear()
        self.loose.clear()
        self.unlinked.clear()
        self.errors.clear()
        self.hub.served.clear()
        self.life.space.seen, self.life.space.admitted = [], []
        if self._run(work) is not False:
            self.tally.fired[name] += 1
        self._run(self._check())

    def _observe(self, event: Event) -> None:
        """Told in the step in which a snapshot is gone."""
        if isinstance(event, BlobCondemned):  # what is in quarantine has a name that no repository's books have
            self.disturbed = True
        if not isinstance(event, SnapshotEvicted):
            return
        snapshot = SnapshotId(RepoId(event.repo_id), Commit(event.commit))
        if keepers := self.plain.keepers(snapshot):
            self.wrong.append(f"I3: {snapshot} was evicted for {event.reason}, but is kept by {keepers}")
        if any(asked.holds and snapshot in asked.snapshots for asked in self.asked):
            self.wrong.append(f"I3: {snapshot} was evicted for {event.reason} under a request for it")
        self.plain.gone([snapshot])
        if event.reason == "bad":  # withdrawn, not for space: no victim, and no candidate any more
            self.withdrawn.add(snapshot)
            self.tally.seen["bad snapshots withdrawn"] += 1
            return
        self.evicted.append(snapshot)
        self.tally.seen["snapshots evicted"] += 1

    def _before_call(self, operation: str, path: str) -> None:
        """Told of each disk call before it is made."""
        if operation == "unlink" and "/blobs/" in path and path.startswith(f"{self.root}/hub/"):
            folder, _, name = path.removeprefix(f"{self.root}/hub/").partition("/blobs/")
            self.unlinked[name] += 1
            # One that somebody damaged is shown anew without what is wrong, and without what was to go with that.
            sound = [s for s in self.plain.known if s not in self.loose and s not in self.torn and self._is_sound(s)]
            protected = self.plain.protected_names(sound)
            for (repo_id, kept), keepers in protected.items():
                if kept == name and repo_folder(repo_id) == folder:
                    self.wrong.append(f"I3: {path} is unlinked, but is kept by {keepers}")
            for asked in self.asked:
                if asked.holds and any(repo_folder(r) == folder and n == name for r, n in asked.names):
                    self.wrong.append(f"I3: {path} is unlinked under a request that needs it")
        if self.random.random() < 0.005 and os.path.isdir(self.root):
            self.tally.seen["looks at du in the middle of a step"] += 1
            truth = look(self.root, self.memory)
            if truth.used_bytes - truth.database_bytes > self._most() + SMALL_FILES_BYTES:
                self.wrong.append(f"I4: du says {truth.used_bytes} before {operation} of {path}")

    def _most(self) -> int:
        """What may be used and promised, the database apart: the limit, or what others made of it."""
        return max(self.committed_bytes, LEAST_BUDGET_BYTES - SET_ASIDE_BYTES - self.database_bytes)

    # Requests

    def _model(self, drawn: tuple[RepoId, Revision | int, Profile]) -> Model:
        repo_id, revision, profile = drawn
        return (
            repo_id,
            Revision(universe.commit_of(repo_id, revision)) if isinstance(revision, int) else revision,
            profile,
        )

    def _meant(self, repo_id: RepoId, revision: Revision) -> SnapshotId | None:
        """What the revision means now; None where nobody says."""
        commit: Commit | None = self.hub.tip(repo_id, revision)
        if self.hub.silent and as_commit(revision) is None:
            commit = self.plain.refs.get((repo_id, revision))
            if commit is not None and SnapshotId(repo_id, commit) not in self.plain.known:
                commit = None
        return None if commit is None else SnapshotId(repo_id, commit)

    async def _ask(self, wanted: Sequence[Model], wish: LeaseWish) -> Ready | CacheError:
        """A request, and what the model makes of its answer."""
        meant = tuple(self._meant(repo_id, revision) for repo_id, revision, _ in wanted)
        names = frozenset(
            (snapshot.repo_id, name)
            for snapshot, (_, _, profile) in zip(meant, wanted, strict=True)
            if snapshot is not None
            for name in universe.hexes_of(snapshot, profile)
        )
        asked = Asked(tuple(wanted), meant, names)
        self.asked.append(asked)
        request = EnsureRequest(tuple(ModelRequest(*model) for model in wanted), wish)
        try:
            ready = await self.life.cache.ensure(request, asked.watch, self.life.pods.seen)
        except CacheError as error:
            self.tally.seen[f"requests refused: {error.reason.value}"] += 1
            return error
        finally:
            self.asked.remove(asked)
        self._answered(asked, ready)
        return ready

    def _answered(self, asked: Asked, ready: Ready) -> None:
        plain = self.plain
        leased = []
        for answer, (repo_id, revision, profile), snapshot in zip(
            ready.models, asked.models, asked.snapshots, strict=True
        ):
            assert answer.snapshot == snapshot
            selection = universe.selection_of(snapshot, profile)
            assert answer.selection.paths == selection.paths
            files = universe.MANIFESTS[snapshot].files
            chosen = {path: files[path].digest.hex for path in selection.paths}
            self._read(snapshot, chosen)
            kept = plain.known.get(snapshot)
            before = kept.paths if kept is not None else {}
            if kept is not None and (
                not kept.ours
                or snapshot in self.torn
                or any((repo_id, n) in self.damaged for n in before.values())
                or self.truth.records.get(snapshot) != before
            ):
                self.loose.add(snapshot)
            plain.known[snapshot] = Kept(before | chosen, (kept.profiles if kept else set()) | {profile.canonical})
            is_branch = as_commit(revision) is None
            if is_branch and not answer.stale:
                known = plain.refs.get((repo_id, revision)) == snapshot.commit
                if not (known and self.truth.refs.get((repo_id, revision)) == snapshot.commit):
                    plain.point(repo_id, revision, snapshot.commit)
                self.foreign_refs.discard((repo_id, revision))
            leased.append((snapshot, revision if is_branch else ""))
            self.tally.seen[f"answers: {answer.outcome.value}"] += 1
        for snapshot, _ in leased:
            plain.touch(snapshot)
        plain.supersede({snapshot for snapshot, _ in leased})
        assert [(model.snapshot, model.revision) for model in ready.lease.models] == leased
        plain.leases[ready.lease.id] = self._lease(ready.lease)

    def _lease(self, lease: Lease) -> PlainLease:
        """One that was granted in this step."""
        now = self.hands.seconds
        leased = tuple((model.snapshot, model.revision) for model in lease.models)
        gone = now if lease.kind is LeaseKind.STREAM else None
        return PlainLease(lease.kind, leased, lease.ttl_seconds, now, lease.pod_uid, gone=gone)

    def _read(self, snapshot: SnapshotId, chosen: dict[str, str]) -> None:
        """As the workload does when it has its answer (I1)."""
        folder = f"{self.root}/hub/{repo_folder(snapshot.repo_id)}/snapshots/{snapshot.commit}"
        for path, name in chosen.items():
            target = os.path.realpath(f"{folder}/{path}")
            assert os.path.basename(target) == name, f"I1: {path} of {snapshot} leads to {target}"
            assert self.memory.is_right(target, os.stat(target), name), f"I1: {path} of {snapshot} has wrong bytes"

    def _wish(self, kind: str, number: int) -> LeaseWish:
        if kind == "pod":
            uid = PODS[number % len(PODS)]
            (self.pods_dir / uid).mkdir(exist_ok=True)
            return LeaseWish(pod_uid=uid)
        if kind == "stream":
            return LeaseWish(stream=True, holder="a program")
        return LeaseWish(ttl=timedelta(seconds=20 + number % 180), holder="a script")

    def _sound(self, name: Name) -> bool:
        """The cache has the blob for that repository, so that not one byte of it need be fetched (I2)."""
        alike = [other for other in self.truth.blobs if other[1] == name[1] and self._is_right(other)]
        return name in alike or any(map(self._is_believed, alike))

    def _is_believed(self, name: Name) -> bool:
        """The daemon has verified it, and nobody else can have changed it since: it may be linked."""
        digest = Digest.parse(name[1])
        blob = self.life.core.index.blob(name[0], digest) if digest else None
        right = blob is not None and blob.verified and not blob.foreign
        # Two flips of the same bit make it right again, and leave a time that nobody believes in.
        return right and blob is not None and blob.stamp == BlobStamp.of(self.truth.blobs[name])

    def _is_right(self, name: Name) -> bool:
        repo_id, digest = name
        path = f"{self.root}/hub/{repo_folder(repo_id)}/blobs/{digest}"
        return self.memory.is_right(path, self.truth.blobs[name], digest)

    def _left_bytes(self, needed: set[Name]) -> int:
        """What nobody uses and the request does not need: unfinished, bad, or without a snapshot."""
        private = f"{self.root}/modelcached"
        hexes = {hex_digest for _, hex_digest in needed}
        paths = [f"{private}/quarantine/{name}" for name in self._names("quarantine")]
        paths += [f"{private}/partial/{n}" for n in self._names("partial") if n.removesuffix(".journal") not in hexes]
        paths += [f"{self.root}/hub/{repo_folder(repo_id)}/blobs/{name}" for repo_id, name in self._orphans() - needed]
        found = [os.lstat(path) for path in paths if os.path.lexists(path)]
        return sum({status.st_ino: status.st_blocks * 512 for status in found}.values())

    async def _ask_alone(self, wanted: Sequence[Model], wish: LeaseWish) -> Ready | CacheError:
        """One request, nothing beside it: what is fetched and who goes for it are known beforehand."""
        before, truth = self.plain.copy(), self.truth
        meant = [self._meant(repo_id, revision) for repo_id, revision, _ in wanted]
        needed: set[Name] = set()
        for snapshot, (_, _, profile) in zip(meant, wanted, strict=True):
            needed |= {(snapshot.repo_id, n) for n in universe.hexes_of(snapshot, profile)} if snapshot else set()
        lacking = {name for name in needed if not self._sound(name)}
        digests = {name for _, name in lacking}
        left = {d: self.life.core.partials.done_bytes(parsed) for d in digests if (parsed := Digest.parse(d))}
        exact = self._exact(wanted, meant, needed)
        troubled = self.hub.silent or self.hub.dies_after_bytes is not None or self.hub.lies
        result = await self._ask(wanted, wish)
        await self.life.rest()
        served = self.hub.served
        for digest, size in served.items():
            # Where an index has to be read first, that makes room before the request holds anything.
            assert digest in digests or self.unlinked[digest], f"I2: {digest} is in the cache and was fetched"
            # What was kept from before a lie is blamed for it once, and costs no try.
            twice = digest in self.doubtful or (self.hub.lies and left.get(digest, 0) > 0)
            most = SIZES[digest] * (2 if twice else 1) - left.get(digest, 0)
            assert size <= most, f"I2: {digest} was fetched more than once, or again"
        if isinstance(result, Ready):
            for digest in digests - self.doubtful:
                assert served[digest] == SIZES[digest] - left[digest], f"I2, I5: {digest} was fetched again"
        elif result.reason is Reason.NO_SPACE_NOW:
            told = {key: int(value) for key, value in result.metadata.items() if key.endswith("_bytes")}
            short = told["need_bytes"] - (told["budget_bytes"] - SET_ASIDE_BYTES - told["used_bytes"])
            left_bytes = self._left_bytes(needed)
            assert not left_bytes or told["evictable_bytes"] + left_bytes < short, (
                "what was left would have been enough"
            )
        else:
            assert troubled, f"refused, and nobody knows why: {result}"
        if exact is not None and self._counted(truth):
            self._compare_victims(before, exact, meant, needed, result)
        else:
            self._check_prefix(before, meant)
        return result

    def _names(self, folder: str) -> list[str]:
        return os.listdir(f"{self.root}/modelcached/{folder}")

    def _orphans(self) -> set[Name]:
        """Finished blobs that no snapshot links to; the next sweep that is old enough takes them."""
        return {(repo_id, digest.hex) for repo_id, digest in orphans(self.life.core)}

    def _counted(self, truth: Truth) -> bool:
        """No blob went that was no snapshot's: what the model counted with was there all the time."""
        return not any(
            not os.path.lexists(f"{self.root}/hub/{repo_folder(repo_id)}/blobs/{name}")
            for repo_id, name in truth.blobs.keys() - _linked(truth)
        )

    def _exact(self, wanted: Sequence[Model], meant: list[SnapshotId | None], needed: set[Name]) -> Shelf | None:
        """The inodes as they are when the request looks for space; None where they cannot be known beforehand."""
        bad = {name for _, name in needed} & {name for _, name in self.damaged}
        if bad or self.disturbed or self.torn or self.half or self.truth.private["quarantine"]:
            return None
        also: dict[Name, Name] = {}
        for snapshot, (_, _, profile) in zip(meant, wanted, strict=True):
            if snapshot is None:
                return None
            kept = self.plain.known.get(snapshot)
            known = kept is not None and kept.ours and profile.canonical in kept.profiles
            # An index is fetched by a request of its own, before this one holds anything.
            if (snapshot.repo_id == "org/shards" and not known) or (kept is not None and not kept.ours):
                return None
        for name in needed - self.truth.blobs.keys():
            donors = [n for n in self.truth.blobs if n[1] == name[1]]
            if len({self.truth.blobs[n].st_ino for n in donors}) > 1 or any(n in self.foreign for n in donors):
                return None
            if donors:
                also[name] = donors[0]
        return Shelf.of(self.truth, also)

    def _compare_victims(
        self,
        before: Plain,
        shelf: Shelf,
        meant: list[SnapshotId | None],
        needed: set[Name],
        result: Ready | CacheError,
    ) -> None:
        """Exactly those that a plain LRU picks, for each look of each admission."""
        held, names = frozenset(s for s in meant if s is not None), frozenset(needed)
        gone: list[SnapshotId] = []
        admitted = list(self.life.space.admitted)
        refused = isinstance(result, CacheError) and result.reason is Reason.NO_SPACE_NOW
        if refused:
            assert isinstance(result, CacheError)
            admitted.append((int(result.metadata["need_bytes"]), self.life.space.seen))
        for wanted, looks in admitted:
            short = 0
            for room in looks:
                short = wanted - room
                if short <= 0:
                    break
                chosen, given = plain_lru(before, shelf, gone, short, held, names)
                if given >= short:
                    gone += chosen
            if refused and (wanted, looks) == admitted[-1]:
                assert plain_lru(before, shelf, gone, short, held, names)[1] < short, f"refused with space: {result}"
        assert sorted(self.evicted) == sorted(gone), f"victims {self.evicted}, a plain LRU picks {gone}"
        self.tally.seen["victims compared"] += len(gone)
        self.tally.seen["victims that a branch had left"] += sum(map(before.left_behind, gone))
        self.tally.seen["admissions compared"] += len(admitted)

    def _check_prefix(self, before: Plain, meant: Iterable[SnapshotId | None]) -> None:
        """Where bytes cannot be known beforehand: nobody went before one that was unused for longer."""
        order = before.candidates(frozenset(s for s in meant if s is not None))
        order = [snapshot for snapshot in order if snapshot not in self.withdrawn]
        assert sorted(self.evicted) == sorted(order[: len(self.evicted)]), f"{self.evicted} went before {order}"

    # Rules: requests

    @happens()
    async def ensure_something(self) -> None:
        """An ordinary day: time passes, leases end, somebody asks for a model. What is drawn least is this."""
        self.hands.seconds += self.random.randrange(60)
        with contextlib.suppress(FileNotFoundError):
            (self.pods_dir / self.random.choice(PODS)).rmdir()
        await self._keep_leases()
        repo_id, profile = self.random.choice(MODELS), self.random.choice(PROFILES)
        revision = Revision(universe.commit_of(repo_id, self.random.randrange(COMMITS)))
        if self.random.random() < 0.3:
            revision = self.random.choice(BRANCHES)
        await self._ask_alone([(repo_id, revision, profile)], self._wish("ttl", self.random.randrange(1000)))

    @happens(model=models, kind=kinds, number=anything)
    async def ensure(self, model: Any, kind: str, number: int) -> None:
        """A workload asks for a model."""
        await self._ask_alone([self._model(model)], self._wish(kind, number))

    @happens(model=models, kind=kinds, number=anything)
    async def ensure_again(self, model: Any, kind: str, number: int) -> bool | None:
        """What is whole is answered from the disk."""
        whole = [s for s in sorted(self.plain.known) if self.plain.known[s].ours and self._is_whole(s)]
        if not whole:
            return False
        snapshot = whole[number % len(whole)]
        canonical = self.random.choice(sorted(self.plain.known[snapshot].profiles))
        profile = next(profile for profile in PROFILES if profile.canonical == canonical)
        result = await self._ask_alone(
            [(snapshot.repo_id, Revision(snapshot.commit), profile)], self._wish(kind, number)
        )
        assert isinstance(result, Ready), result
        state = self.life.core.index.snapshot(snapshot)
        assert state is not None
        assert state.state is SnapshotState.READY
        assert not self.hub.served
        assert not self.evicted
        return None

    def _is_whole(self, snapshot: SnapshotId) -> bool:
        names = {(snapshot.repo_id, name) for name in self.plain.known[snapshot].names}
        there = snapshot not in self.torn and snapshot not in self.half and self._is_sound(snapshot)
        return there and names <= self.truth.blobs.keys()

    def _is_sound(self, snapshot: SnapshotId) -> bool:
        """Nobody has damaged a blob of it."""
        return not any((snapshot.repo_id, name) in self.damaged for name in self.plain.known[snapshot].names)

    @happens(number=anything, profile=st.sampled_from(PROFILES), kind=kinds)
    async def grow(self, number: int, profile: Profile, kind: str) -> bool | None:
        """Another runtime asks for a model that is there for one."""
        small = [s for s in sorted(self.plain.known) if profile.canonical not in self.plain.known[s].profiles]
        small = [s for s in small if s.repo_id in MODELS]
        if not small:
            return False
        snapshot = small[number % len(small)]
        await self._ask_alone([(snapshot.repo_id, Revision(snapshot.commit), profile)], self._wish(kind, number))
        return None

    @happens(base=models, more=st.lists(adapters, min_size=1, max_size=2, unique_by=lambda a: a[0]), kind=kinds)
    async def ensure_adapters(self, base: Any, more: list[Any], kind: str) -> None:
        """A model and its adapters are one request."""
        await self._ask_alone([self._model(base), *map(self._model, more)], self._wish(kind, len(more)))

    @happens(model=models, after=st.integers(0, 300), how=st.sampled_from(("dies", "lies")))
    async def ensure_from_a_bad_hub(self, model: Any, after: int, how: str) -> None:
        """The transfer breaks off, or brings what it should not."""
        self.hub.dies_after_bytes = after * KIB if how == "dies" else None
        self.hub.lies, self.hub.lied = how == "lies", False
        try:
            result = await self._ask_alone([self._model(model)], LeaseWish(holder="unlucky"))
        finally:
            self.hub.dies_after_bytes, self.hub.lies = None, False
            if how == "lies":  # what was broken off there is proven wrong when it is whole, and fetched again
                self.doubtful |= set(self._names("partial"))
        if self.hub.lied:
            assert isinstance(result, CacheError)
            assert result.reason in (Reason.DIGEST_MISMATCH, Reason.NO_SPACE_NOW)

    @happens(model=models)
    async def ensure_without_the_hub(self, model: Any) -> None:
        """What is cached stands in, and only that."""
        self.hub.silent = True
        try:
            repo_id, revision, profile = self._model(model)
            snapshot = self._meant(repo_id, revision)
            names = set() if snapshot is None else {(repo_id, n) for n in universe.hexes_of(snapshot, profile)}
            asked_for = {name for name in names if SIZES[name[1]]}  # an empty file can be made without anybody
            there = bool(names) and all(map(self._sound, asked_for)) and snapshot in self.truth.records
            result = await self._ask_alone([(repo_id, revision, profile)], LeaseWish(holder="alone"))
        finally:
            self.hub.silent = False
        reason = None if isinstance(result, Ready) else result.reason
        if there:
            assert reason in (None, Reason.NO_SPACE_NOW), result
        else:
            assert reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.NO_SPACE_NOW), result

    @happens(kind=kinds)
    async def ensure_what_never_fits(self, kind: str) -> None:
        """Told at once, and nothing goes for it."""
        request = EnsureRequest((ModelRequest(GIANT, Revision("main"), PROFILES[0]),), self._wish(kind, 0))
        try:
            await self.life.cache.ensure(request, Watch(), self.life.pods.seen)
        except CacheError as error:
            assert error.reason is Reason.OVER_BUDGET, error  # noqa: PT017
        else:
            raise AssertionError("64 MiB fit into 8 MiB")
        assert not self.evicted

    # Rules: several at once

    @happens(several=st.lists(models, min_size=2, max_size=4), kind=kinds, same=st.booleans())
    async def ensure_together(self, several: list[Any], kind: str, same: bool) -> None:
        """Requests beside each other, for the same or for what shares much with it."""
        wanted = [self._model(model) for model in (several[:1] * len(several) if same else several)]
        asked = [self._ask([model], self._wish(kind, number)) for number, model in enumerate(wanted)]
        await self._together(wanted, *asked)

    @happens(model=models, number=anything, own=st.booleans())
    async def ensure_amid_an_eviction(self, model: Any, number: int, own: bool) -> None:
        """An operator evicts while a request runs, perhaps what it asks for."""
        wanted = self._model(model)
        meant = self._meant(*wanted[:2])
        known = sorted(self.life.core.index.snapshots(), key=lambda snapshot: snapshot.id)
        victims = [meant] if own else [s.id for s in known][number % max(1, len(known)) :][:1]

        async def evict() -> None:
            for _ in range(number % 40):
                await asyncio.sleep(0)
            with contextlib.suppress(CacheError):
                await self.life.cache.evict([v for v in victims if v is not None], dry_run=False)

        await self._together([wanted], self._ask([wanted], self._wish("ttl", number)), evict())

    @happens(model=models, number=anything)
    async def ensure_amid_upkeep(self, model: Any, number: int) -> None:
        """Watermarks and leftovers are looked after meanwhile."""
        wanted = self._model(model)

        async def upkeep() -> None:
            for _ in range(number % 30):
                await asyncio.sleep(0)
            await loops.keep_watermarks(self.life.core)
            await loops.sweep_leftovers(self.life.core)

        await self._together([wanted], self._ask([wanted], self._wish("ttl", number)), upkeep())

    @happens(model=models, turns=st.integers(0, 120), how=st.sampled_from(("the caller", "an operator")))
    async def ensure_and_give_up(self, model: Any, turns: int, how: str) -> None:
        """A caller goes, and the work goes on; or an operator ends it, and what there is is kept."""
        wanted = self._model(model)
        meant = self._meant(*wanted[:2])
        task = asyncio.create_task(self._ask([wanted], LeaseWish(holder="impatient")))

        async def give_up() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            if how == "an operator" and meant is not None:
                self.life.cache.cancel(meant.repo_id, None)
            elif how == "the caller":
                task.cancel()

        async def asked() -> None:
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()

        await self._together([wanted], asked(), give_up())

    async def _together(self, wanted: Sequence[Model], *work: Awaitable[Any]) -> None:
        """What comes of it cannot be known beforehand: it is looked at, and must be one of the things it may be."""
        before = self.plain.copy()
        there = {name[1] for name in self.truth.blobs if self._is_believed(name) and self._is_right(name)}
        ends = await asyncio.gather(*work)
        await self.life.rest()
        for end in ends:
            if isinstance(end, CacheError):
                assert end.reason in (Reason.NO_SPACE_NOW, Reason.TRANSFER_CANCELLED), end
        meant = {snapshot for repo_id, revision, _ in wanted if (snapshot := self._meant(repo_id, revision))}
        for digest, size in self.hub.served.items():
            times = 1 + self.unlinked[digest] + (digest in self.doubtful)
            assert size <= SIZES[digest] * times, f"I2: {digest} was fetched {size} bytes"
            assert self.unlinked[digest] or digest not in there, f"I2: {digest} is in the cache and was fetched"
        await self._adopt(meant, before)

    async def _adopt(self, meant: set[SnapshotId], before: Plain) -> None:
        """The model takes over what requests that ran beside each other may have made of their own models."""
        core, plain = self.life.core, self.plain
        self.truth = look(self.root, self.memory)
        for snapshot in core.index.snapshots():
            if snapshot.id in meant and snapshot.id in self.truth.snapshots and snapshot.record is not None:
                kept = plain.known.get(snapshot.id)
                links = self.truth.snapshots[snapshot.id]
                now = {p: n for p in links if (n := self.truth.blob_of(snapshot.id, p))}
                if kept is not None and kept.ours and snapshot.id not in self.loose and self._is_whole(snapshot.id):
                    assert kept.paths.items() <= now.items(), f"{snapshot.id} lost files"
                names = {profile.canonical for profile in PROFILES} & snapshot.record.selections.keys()
                plain.known[snapshot.id] = Kept(now, names)
        self._adopt_books(meant, before)

    def _adopt_books(self, meant: set[SnapshotId], before: Plain) -> None:
        """Order and branches; of those that nobody asked for nothing may have changed."""
        core, plain = self.life.core, self.plain
        order = core.use.order(plain.known)
        others = [snapshot for snapshot in order if snapshot not in meant]
        assert others == [s for s in before.order(plain.known) if s not in meant]
        self._take_over_times(order)
        for lease in core.use.leases.values():
            if lease.id not in plain.leases:  # its caller went before the answer came
                assert {model.snapshot for model in lease.models} <= meant
                plain.leases[lease.id] = self._lease(lease)
        plain.refs = {(repo_id, r): c for repo_id, repo in core.index.repos.items() for r, c in repo.refs.items()}

    def _take_over_times(self, snapshots: Iterable[SnapshotId]) -> None:
        use = self.life.core.use
        self.plain.take_over(
            {snapshot: use.usage[snapshot].tick for snapshot in snapshots if snapshot in use.usage},
            {(repo_id, ref): history for repo_id, refs in use._named.items() for ref, history in refs.items()},
        )

    # Rules: operators

    @happens(number=anything)
    async def evict(self, number: int) -> bool | None:
        """What nobody keeps goes; what somebody keeps stays, and the operator is told by whom."""
        there = sorted(self.plain.known)
        if not there:
            return False
        free = self.plain.candidates()
        pick = free if free and number % 3 else there
        await self._evict([sorted(pick)[number % len(pick)]], dry_run=False)
        return None

    @happens(number=anything)
    async def evict_a_repository(self, number: int) -> bool | None:
        """All its commits or none."""
        repos = sorted({snapshot.repo_id for snapshot in self.plain.known})
        if not repos:
            return False
        several = [r for r in repos if sum(s.repo_id == r for s in self.plain.known) > 1]
        pick = several or repos
        await self._evict(self.life.cache.shelf.named(pick[number % len(pick)], None), dry_run=False)
        return None

    @happens(number=anything)
    async def ask_what_would_go(self, number: int) -> bool | None:
        """A dry run changes nothing."""
        there = sorted(self.plain.known)
        if not there:
            return False
        await self._evict(there[number % len(there) :][:3], dry_run=True)
        return None

    async def _evict(self, snapshots: list[SnapshotId], *, dry_run: bool) -> None:
        kept = [snapshot for snapshot in snapshots if self.plain.keepers(snapshot)]
        try:
            evicted = await self.life.cache.evict(snapshots, dry_run=dry_run)
        except CacheError as error:
            assert error.reason is Reason.IN_USE, error  # noqa: PT017
            assert kept
            assert not self.evicted
            self.tally.seen["evictions refused"] += 1
        else:
            assert not kept, f"I3: {kept} went"
            assert sorted(e.snapshot for e in evicted) == sorted(snapshots)
            assert sorted(self.evicted) == ([] if dry_run else sorted(snapshots))

    @happens(number=anything, by_commit=st.booleans())
    async def pin(self, number: int, by_commit: bool) -> bool | None:
        """By branch it follows the branch."""
        there = sorted(self.plain.known)
        if not there:
            return False
        snapshot = there[number % len(there)]
        named = sorted(r for (repo_id, r), c in self.plain.refs.items() if (repo_id, c) == _pair(snapshot))
        revision = Revision(snapshot.commit) if by_commit or not named else named[0]
        if len(self.plain.pins) > 2:  # else all is pinned before long
            repo_id, old = min(self.plain.pins)
            await self.life.cache.unpin(repo_id, old)
            self.plain.pins.remove((repo_id, old))
        await self.life.cache.pin(snapshot.repo_id, revision)
        self.plain.pins.add((snapshot.repo_id, revision))
        return None

    @happens(number=anything)
    async def unpin(self, number: int) -> bool | None:
        """It may go again."""
        if not self.plain.pins and self.plain.known:
            snapshot = sorted(self.plain.known)[number % len(self.plain.known)]
            await self.life.cache.pin(snapshot.repo_id, Revision(snapshot.commit))
            self.plain.pins.add((snapshot.repo_id, Revision(snapshot.commit)))
            await self._check()
        if not self.plain.pins:
            return False
        pin = sorted(self.plain.pins)[number % len(self.plain.pins)]
        await self.life.cache.unpin(*pin)
        self.plain.pins.remove(pin)
        return None

    @happens(number=anything, count=st.integers(1, 12))
    async def release(self, number: int, count: int) -> bool | None:
        """Proofs of use end."""
        there = list(self.plain.leases)
        chosen = [there[(number + i) % len(there)] for i in range(min(count, len(there)))]
        if not chosen:
            return False
        assert sorted(await self.life.cache.leasing.release(chosen)) == sorted(chosen)
        for lease_id in chosen:
            del self.plain.leases[lease_id]
        return None

    @happens(number=anything)
    async def renew(self, number: int) -> bool | None:
        """Its time begins anew."""
        if not self.plain.leases:
            return False
        lease_id = list(self.plain.leases)[number % len(self.plain.leases)]
        await self.life.cache.leasing.renew(lease_id)
        self.plain.leases[lease_id].since = self.hands.seconds
        return None

    # Rules: time, pods, streams

    @happens(seconds=st.sampled_from((200, 61, 20, 700)))
    async def time_passes(self, seconds: int) -> None:
        """Leases end by themselves."""
        self.hands.seconds += seconds
        await self._keep_leases()

    @happens(model=models, number=anything, looks=st.integers(1, 3))
    async def a_pod_goes(self, model: Any, number: int, looks: int) -> bool | None:
        """Its lease ends when it was missed twice."""
        if not any(lease.kind is LeaseKind.POD for lease in self.plain.leases.values()):
            await self._ask_alone([self._model(model)], self._wish("pod", number))
        there = [uid for uid in PODS if (self.pods_dir / uid).is_dir()]
        if not there:
            return False
        (self.pods_dir / there[number % len(there)]).rmdir()
        for _ in range(looks):
            await self._keep_leases()
        return None

    async def _keep_leases(self) -> None:
        await self.life.keeper.look()
        over = self.plain.look(self.hands.seconds, frozenset(os.listdir(self.pods_dir)))
        self.tally.seen["leases ended by themselves"] += len(over)

    @happens(model=models, number=anything)
    async def a_stream_comes_or_goes(self, model: Any, number: int) -> bool | None:
        """HoldModel: its lease lives as long, and a while longer."""
        if not any(lease.kind is LeaseKind.STREAM for lease in self.plain.leases.values()):
            await self._ask_alone([self._model(model)], self._wish("stream", number))
        there = [i for i, lease in self.plain.leases.items() if lease.kind is LeaseKind.STREAM]
        if not there:
            return False
        lease_id = there[number % len(there)]
        lease = self.plain.leases[lease_id]
        if lease.streams:
            await self.streams[lease_id].pop().aclose()
            lease.streams -= 1
            lease.gone = None if lease.streams else self.hands.seconds
        else:
            stack = contextlib.AsyncExitStack()
            await stack.enter_async_context(self.life.cache.leasing.held(lease_id))
            self.streams.setdefault(lease_id, []).append(stack)
            lease.streams += 1
            lease.gone = None
        return None

    # Rules: upkeep

    @happens(room=rooms)
    async def keep_watermarks(self, room: int) -> None:
        """Above the high one those go that were not used for longest, down to the low one."""
        if self.life.space.used_bytes < LEAST_BUDGET_BYTES * HIGH:
            await self._leave_room(room)  # of others; else it is seldom above
        core, before, evictable = self.life.core, self.plain.copy(), self.plain.candidates()
        over = core.space.used_bytes - int(LEAST_BUDGET_BYTES * HIGH)
        wanted = over + int(LEAST_BUDGET_BYTES * (HIGH - LOW)) if over > 0 else 0
        shelf = Shelf.of(self.truth, {})
        await loops.keep_watermarks(core)
        await self.life.rest()
        if wanted == 0:
            assert not self.evicted
        elif self.disturbed or self.torn or self.truth.private["quarantine"]:
            assert sorted(self.evicted) == sorted(evictable[: len(self.evicted)])
        else:
            chosen, _ = plain_lru(before, shelf, [], wanted, frozenset(), frozenset())
            assert sorted(self.evicted) == sorted(chosen), f"victims {self.evicted}, a plain LRU picks {chosen}"
            self.tally.seen["victims compared"] += len(chosen)
            self.tally.seen["victims that a branch had left"] += sum(map(before.left_behind, chosen))

    @happens(old=st.booleans())
    async def sweep_leftovers(self, old: bool) -> None:
        """What nobody asked for within ``partial_ttl`` goes, what is younger stays."""
        core = self.life.core
        before = set(self._names("partial"))
        if old:
            section = self.config.cache.model_copy(update={"partial_ttl": timedelta(0)})
            core.config = self.config.model_copy(update={"cache": section})
        try:
            await loops.sweep_leftovers(core)
        finally:
            core.config = self.config
        if old:
            assert not self._names("partial")
            assert not self._orphans()
        else:
            assert set(self._names("partial")) == before
        self.tally.seen["unfinished blobs swept"] += len(before) if old else 0

    # Rules: upstream and others

    @happens(repo_id=st.sampled_from((*MODELS, *ADAPTERS)), branch=st.sampled_from(BRANCHES), tip=st.integers(0, 2))
    async def a_branch_moves(self, repo_id: RepoId, branch: Revision, tip: int) -> bool | None:
        """On the Hub; here at the next request."""
        if self.hub.tips.get((repo_id, branch), 0) == tip:
            tip = (tip + 1) % COMMITS
        self.hub.tips[repo_id, branch] = tip
        return None

    @happens(number=anything, kind=kinds)
    async def a_branch_moves_on(self, number: int, kind: str) -> bool | None:
        """And somebody asks for it by its name: what it meant here before is left behind."""
        if not self.plain.refs:
            return False
        repo_id, branch = sorted(self.plain.refs)[number % len(self.plain.refs)]
        tips = self.hub.tips
        tips[repo_id, branch] = (tips.get((repo_id, branch), 0) + 1) % COMMITS
        await self._ask_alone([(repo_id, branch, PROFILES[0])], self._wish(kind, number))
        return None

    @happens(room=rooms)
    async def others_take_space(self, room: int) -> None:
        """Somebody keeps a file beside the cache's own, and it grows or shrinks."""
        await self._leave_room(room)

    async def _leave_room(self, room: int) -> None:
        path = f"{self.root}/not-ours"
        core = self.life.core
        now = LEAST_BUDGET_BYTES - SET_ASIDE_BYTES - core.space.used_bytes
        size = os.lstat(path).st_blocks * 512 if os.path.lexists(path) else 0
        wanted = max(0, size + now - room * KIB) // 4096 * 4096
        with open(path, "wb") as file:
            if wanted:
                os.posix_fallocate(file.fileno(), 0, wanted)
        self.strangers.add(path)
        await self._others_wrote(disturbed=False)

    async def _others_wrote(self, *, disturbed: bool = True) -> None:
        """The account sees it when somebody looks: the next start does, and so will whoever watches the disk."""
        self.disturbed |= disturbed
        core = self.life.core
        names = os.listdir(core.layout.hub)
        gone = {"hub", *names, *core.areas()}
        for name in [area for area in core.space.areas() if area not in gone and not area.startswith("flight ")]:
            core.space.set_area(name, {})
        await core.measure(*names, "root")
        await core.measure_hub_alone()
        self.truth = look(self.root, self.memory)
        self.committed_bytes = self.truth.used_bytes - self.truth.database_bytes

    @happens(number=anything, where=st.sampled_from(("hub", "folder", "repository", "blobs", "refs")))
    async def a_stranger_appears(self, number: int, where: str) -> bool | None:
        """Files of others stay where they are."""
        repos = sorted({repo_folder(repo_id) for repo_id, _ in self.truth.blobs})
        name = f"stranger-{number % 4}"
        if where in ("repository", "blobs", "refs") and not repos:
            return False
        folder = f"{self.root}/hub/{repos[number % len(repos)]}" if repos else ""
        path = {
            "hub": f"{self.root}/hub/{name}.txt",
            "folder": f"{self.root}/hub/datasets--{name}",
            "repository": f"{folder}/{name}",
            "blobs": f"{folder}/blobs/{name}.incomplete",
            "refs": f"{folder}/.no_exist/{name}",
        }[where]
        if where == "folder":
            os.makedirs(path, exist_ok=True)
            self.strangers.add(path)
            path += "/data"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).write_bytes(b"not yours")
        self.strangers.add(path)
        await self._others_wrote(disturbed=False)
        return None

    @happens(
        repo_id=st.sampled_from((*MODELS, *ADAPTERS)),
        number=st.integers(0, COMMITS - 1),
        profile=st.sampled_from(PROFILES),
        state=st.sampled_from(("right", "writable", "cut off")),
        branch=st.sampled_from(BRANCHES),
    )
    async def a_foreign_snapshot_appears(
        self, repo_id: RepoId, number: int, profile: Profile, state: str, branch: Revision
    ) -> bool | None:
        """huggingface_hub wrote it, in its own way."""
        snapshot = SnapshotId(repo_id, universe.commit_of(repo_id, number))
        if snapshot in self.truth.snapshots or snapshot in self.plain.known:
            return False
        folder = f"{self.root}/hub/{repo_folder(repo_id)}"
        files = universe.MANIFESTS[snapshot].files
        paths = sorted(universe.selection_of(snapshot, profile).paths)
        for path in paths:
            name = files[path].digest.hex
            blob = Path(folder, "blobs", name)
            blob.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(blob):
                content = CONTENT[name]
                if state == "cut off" and path == paths[-1] and content:
                    content = content[:-1]
                    self.damaged.add((repo_id, name))
                blob.write_bytes(content)
                blob.chmod(0o666 if state == "writable" else 0o644)
                self.foreign.add((repo_id, name))
            link = Path(folder, "snapshots", snapshot.commit, path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to("../" * (path.count("/") + 2) + f"blobs/{name}")
        ref = Path(folder, "refs", branch)
        if not os.path.lexists(ref) and (repo_id, branch) not in self.plain.refs:
            ref.parent.mkdir(exist_ok=True)
            ref.write_text(snapshot.commit)
            self.foreign_refs.add((repo_id, branch))
        await self._others_wrote()
        return None

    @happens(number=anything)
    async def a_blob_is_removed_by_hand(self, number: int) -> bool | None:
        """The next answer for it heals it."""
        if not self.truth.blobs:
            return False
        repo_id, name = sorted(self.truth.blobs)[number % len(self.truth.blobs)]
        os.unlink(f"{self.root}/hub/{repo_folder(repo_id)}/blobs/{name}")
        self.damaged.add((repo_id, name))
        self.robbed.add(repo_folder(repo_id))
        await self._others_wrote()
        return None

    @happens(number=anything)
    async def a_byte_is_flipped(self, number: int) -> bool | None:
        """Whoever did it left a time behind."""
        there = sorted(name for name, status in self.truth.blobs.items() if status.st_size)
        if not there:
            return False
        repo_id, name = there[number % len(there)]
        path = f"{self.root}/hub/{repo_folder(repo_id)}/blobs/{name}"
        status = os.lstat(path)
        with open(path, "r+b") as file:
            position = number % status.st_size
            byte = os.pread(file.fileno(), 1, position)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0x10]), position)
        # Odd: the kernel's own times come in steps of milliseconds, and inodes again, so that a whole second's
        # difference is now and then that of another file.
        self.flips += 1
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 1_000_000_000 - 2 * self.flips - 1))
        self.damaged |= {n for n, s in self.truth.blobs.items() if s.st_ino == status.st_ino}
        await self._others_wrote()
        return None

    @happens(number=anything, whole_repository=st.booleans())
    async def a_folder_is_removed_by_hand(self, number: int, whole_repository: bool) -> bool | None:
        """Somebody ran rm -rf."""
        there = sorted(self.truth.snapshots)
        if not there:
            return False
        snapshot = there[number % len(there)]
        folder = f"{self.root}/hub/{repo_folder(snapshot.repo_id)}"
        self.robbed.add(repo_folder(snapshot.repo_id))
        if whole_repository:
            shutil.rmtree(folder)
            self.strangers = {path for path in self.strangers if not path.startswith(f"{folder}/")}
            self.torn |= {s for s in self.plain.known if s.repo_id == snapshot.repo_id}
        else:
            shutil.rmtree(f"{folder}/snapshots/{snapshot.commit}")
            self.torn |= {snapshot} & self.plain.known.keys()
            self.foreign |= {n for n in self.truth.blobs if n[0] == snapshot.repo_id}
        await self._others_wrote()
        return None

    # Rules: ends and beginnings

    @happens(another_boot=st.booleans())
    async def stop_and_start(self, another_boot: bool) -> None:
        """A clean end."""
        await self._leave_streams()
        await self.life.stop()
        await self._start(another_boot=another_boot)

    @happens(another_boot=st.booleans())
    async def be_killed(self, another_boot: bool) -> None:
        """At rest."""
        self.life.database.write_waiting()
        self.life.die()
        await self._start(another_boot=another_boot)

    @happens(
        model=models,
        number=anything,
        calls=st.integers(1, 60),
        what=st.sampled_from(("ensure", "two requests", "evict", "start")),
        another_boot=st.booleans(),
    )
    async def be_killed_at_work(self, model: Any, number: int, calls: int, what: str, another_boot: bool) -> None:
        """Before any disk call of a request, of an eviction, or of a start."""
        wanted = [self._model(model), (MODELS[number % len(MODELS)], BRANCHES[0], PROFILES[0])]
        before, meant = self.plain.copy(), set[SnapshotId]()
        if what == "start":
            self.life.database.write_waiting()
            self.life.die()
            await self._start(another_boot=another_boot, dies_after=1 + calls % 8)
            return
        self.life.dies_at = self.life.calls + calls
        if what == "evict":
            free = self.plain.candidates()
            going = free[number % len(free) :][:2] if free else []
            work: list[Awaitable[Any]] = [self.life.cache.evict(going, dry_run=False)]
            meant = set(going)
        else:
            wanted = wanted[: 2 if what == "two requests" else 1]
            work = [self._ask([one], LeaseWish(holder="lost")) for one in wanted]
            meant = {s for repo_id, revision, _ in wanted if (s := self._meant(repo_id, revision))}
        tasks = [asyncio.ensure_future(one) for one in work]
        for rest in (lambda: asyncio.wait(tasks), self.life.rest):  # who was refused goes before all is at rest
            if not self.life.dead:
                done = asyncio.ensure_future(rest())
                await asyncio.wait({done, self.life.died}, return_when=asyncio.FIRST_COMPLETED)
        self.tally.seen["killed in the middle" if self.life.dead else "killed at the end"] += 1
        self.life.die()
        await self._start(another_boot=another_boot, meant=meant, before=before)

    @happens(how=st.sampled_from(("gone", "garbage")), another_boot=st.booleans(), known=st.booleans())
    async def lose_the_database(self, how: str, another_boot: bool, known: bool) -> None:
        """Order and history are lost, never a model in use; until somebody knows what is in use."""
        self.life.die()
        await self._bury()
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.root}/modelcached/state.db{suffix}")
        path = Path(self.root, "modelcached", "state.db")
        path.unlink()
        if how == "garbage":
            path.write_bytes(b"no database " * 999)
        await self._start(another_boot=another_boot, lost=True)
        if known:
            await self._check()
            await self.life.cache.leasing.release(list(self.plain.leases))
            self.plain.leases.clear()

    async def _leave_streams(self) -> None:
        for stack in [stack for stacks in self.streams.values() for stack in stacks]:
            await stack.aclose()
        self.streams.clear()

    async def _bury(self) -> None:
        await self.life.bury()
        self.streams.clear()

    async def _start(
        self,
        *,
        another_boot: bool,
        lost: bool = False,
        dies_after: int | None = None,
        meant: set[SnapshotId] | None = None,
        before: Plain | None = None,
    ) -> None:
        """A new life over what the last one left; and what it must make of it."""
        if self.life.dead and not lost:
            await self._bury()
        if another_boot:
            self.hands.boot += 1
            self.hands.seconds = 5.0
        found = look(self.root, self.memory)
        while True:
            self.life = self._life()
            self.life.dies_at = dies_after
            start = asyncio.ensure_future(self.life.start())
            await asyncio.sleep(0)
            if not start.done():
                await asyncio.wait({start, self.life.died}, return_when=asyncio.FIRST_COMPLETED)
            if not self.life.dead:
                self.life.dies_at = None
                await start
                break
            self.tally.seen["killed in a start"] += 1
            start.cancel()
            await self._bury()
            dies_after = None
        self._started(found, another_boot=another_boot, lost=lost, meant=meant or set(), before=before)

    def _started(
        self, found: Truth, *, another_boot: bool, lost: bool, meant: set[SnapshotId], before: Plain | None
    ) -> None:
        core, plain, now = self.life.core, self.plain, self.hands.seconds
        truth = self.truth = look(self.root, self.memory)
        assert truth.snapshots == found.snapshots, "a start shows and hides nothing"
        assert truth.blobs.keys() == found.blobs.keys(), "a start loses no blob"
        assert not truth.bare, f"I8: a start leaves empty folders: {truth.bare}"
        if before is not None:
            self._settle_a_kill(truth, meant, before)
        known = {}
        for snapshot, links in truth.snapshots.items():
            kept = plain.known.get(snapshot)
            valid = {path: name for path in links if (name := truth.blob_of(snapshot, path))}
            known[snapshot] = Kept(valid, kept.profiles if kept else set(), ours=snapshot in truth.records)
            if kept is not None and kept.ours and snapshot not in self.torn and snapshot not in meant:
                assert valid == kept.paths
        for snapshot in plain.known.keys() - known.keys():
            assert snapshot in self.torn, f"I5: {snapshot} was lost"
            for (repo_id, _), history in plain.named.items():
                if repo_id == snapshot.repo_id and snapshot in plain.used:
                    history.pop(snapshot.commit, None)
        plain.known = known
        plain.used = {snapshot: tick for snapshot, tick in plain.used.items() if snapshot in known}
        plain.refs = dict(truth.refs)
        if lost:
            plain.used, plain.named, plain.pins = {}, {}, set()
            plain.leases = {}
            if found.records:
                for lease in core.use.leases.values():
                    assert lease.kind is LeaseKind.RECOVERED
                    (model,) = lease.models
                    plain.leases[lease.id] = PlainLease(LeaseKind.RECOVERED, ((model.snapshot, ""),), None, now)
                covered = {lease.models[0][0] for lease in plain.leases.values()}
                assert covered == known.keys(), "what may be in use is kept"
        for (repo_id, revision), commit in sorted(plain.refs.items()):
            if commit not in plain.named.get((repo_id, revision), {}):
                plain.named.setdefault((repo_id, revision), {})[commit] = next(plain.ticks)
        plain.restarted(now, another_boot=another_boot)
        self.foreign_refs.clear()
        self.robbed.clear()
        self.torn.clear()
        self.disturbed = False
        self.committed_bytes = truth.used_bytes - truth.database_bytes
        self.database_bytes = 0

    def _settle_a_kill(self, truth: Truth, meant: set[SnapshotId], before: Plain) -> None:
        """What was asked for in the moment of a kill may be there or not; all else is as it was."""
        core, plain = self.life.core, self.plain
        for snapshot in set(plain.known) - set(truth.snapshots) - self.torn:
            assert not before.keepers(snapshot), f"I3: {snapshot} went, kept by {before.keepers(snapshot)}"
            plain.gone([snapshot])
        for lease_id in plain.leases:
            assert lease_id in core.use.leases, f"I5: lease {lease_id} was lost"
        for lease_id in core.use.leases.keys() - plain.leases.keys():
            lease = core.use.leases[lease_id]
            if lease_id in before.leases:  # its replacement was not written
                plain.leases[lease_id] = before.leases[lease_id]
                continue
            assert {model.snapshot for model in lease.models} <= meant
            plain.leases[lease_id] = self._lease(lease)
        changed = meant & before.known.keys() & truth.snapshots.keys() & truth.records.keys()
        self.half |= {s for s in changed if any((s.repo_id, n) in self.damaged for n in before.known[s].names)}
        order = core.use.order(snapshot for snapshot in {*plain.known, *meant} if snapshot in truth.snapshots)
        assert [s for s in order if s not in meant] == [s for s in before.order(order) if s not in meant]
        self._take_over_times(order)
        for snapshot in meant & truth.records.keys():
            record = core.index.snapshot(snapshot)
            profiles = set(record.record.selections) if record is not None and record.record is not None else set()
            kept = plain.known.setdefault(snapshot, Kept({}))
            kept.profiles = profiles & {profile.canonical for profile in PROFILES}

    # What must hold

    async def _check(self) -> None:
        await self.life.rest()
        self.life.database.write_waiting()
        status = await self.life.cache.status()
        self.truth = look(self.root, self.memory)
        assert not self.wrong, "\n".join(self.wrong)
        assert not self.errors, "\n".join(self.errors)
        self._settle()
        self._check_space(status.used_bytes)
        self._check_snapshots()
        self._check_nothing_leaks()
        self._check_books()

    def _settle(self) -> None:
        """What was healed or has gone is no excuse any more."""
        truth, plain = self.truth, self.plain
        linked = _linked(truth)
        bad = {name for name in self.damaged & truth.blobs.keys() if not self._is_right(name)}
        self.damaged = bad | self.damaged & linked - truth.blobs.keys()
        self.torn = {s for s in self.torn if s in plain.known and s not in truth.snapshots}
        self.half = {
            s for s in self.half & truth.records.keys() if truth.records[s].keys() - truth.snapshots.get(s, {}).keys()
        }
        self.foreign &= truth.blobs.keys()
        self.doubtful &= truth.private["partial"]
        if truth.private["quarantine"] != self.quarantine:  # names that no repository's books have came or went
            self.quarantine, self.disturbed = truth.private["quarantine"], True
        for snapshot in self.loose & plain.known.keys() & truth.snapshots.keys():
            kept = plain.known[snapshot]
            links = truth.snapshots[snapshot]
            chosen = {path: name for path in links if (name := truth.blob_of(snapshot, path))}
            entry = self.life.core.index.snapshot(snapshot)
            assert entry is not None
            assert entry.record is not None
            kept.paths, kept.profiles = chosen, kept.profiles & entry.record.selections.keys()

    def _check_space(self, used_bytes: int) -> None:
        """I4 and I8: the account is du's, nothing is promised at rest, and nothing went over."""
        truth, space = self.truth, self.life.space
        assert used_bytes == truth.used_bytes, f"I8: the account says {used_bytes}, du {truth.used_bytes}"
        assert space.reserved_bytes == 0
        assert not space.reservations()
        committed = truth.used_bytes - truth.database_bytes
        assert committed <= self._most() + SMALL_FILES_BYTES, f"I4: {committed} of {self._most()}"
        self.committed_bytes, self.database_bytes = committed, truth.database_bytes
        for name, status in truth.blobs.items():
            digest = Digest.parse(name[1])
            blob = self.life.core.index.blob(name[0], digest) if digest else None
            if blob is not None and not self.disturbed and blob.stamp.inode == status.st_ino:
                assert blob.link_count == status.st_nlink, f"{name} has {status.st_nlink} names"
                assert blob.allocated_bytes == status.st_blocks * 512

    def _check_snapshots(self) -> None:
        """I1: what is recorded is there whole; and the index, the records and the model say the same."""
        truth, plain, core = self.truth, self.plain, self.life.core
        for snapshot, chosen in truth.records.items():
            if snapshot not in truth.snapshots:
                assert snapshot in self.torn, f"I8: a record of {snapshot}, which is not there"
                continue
            if snapshot in self.half:
                entry = core.index.snapshot(snapshot)
                assert entry is not None
                assert entry.state is SnapshotState.UNVERIFIED, f"I1: {snapshot} would be answered from"
                continue
            for path, name in chosen.items():
                assert truth.blob_of(snapshot, path) == name, f"I1: {path} of {snapshot}"
                if (snapshot.repo_id, name) not in self.damaged:
                    assert (snapshot.repo_id, name) in truth.blobs, f"I1: {path} of {snapshot} leads nowhere"
                    assert self._is_right((snapshot.repo_id, name)), f"I1: {path} of {snapshot} has wrong bytes"
        index = {snapshot.id: snapshot for snapshot in core.index.snapshots()}
        assert index.keys() == plain.known.keys()
        for snapshot, kept in plain.known.items():
            assert index[snapshot].state is not SnapshotState.CONDEMNED
            if snapshot in self.torn:
                continue
            there = {path: name for path in truth.snapshots[snapshot] if (name := truth.blob_of(snapshot, path))}
            assert there == kept.paths, f"{snapshot} holds {sorted(there)}, not {sorted(kept.paths)}"
            assert {path: digest.hex for path, digest in index[snapshot].links.items()} == there
            if kept.ours:
                # A kill may come between a snapshot that has grown and its record.
                assert snapshot in self.half or truth.records[snapshot].items() <= there.items()
        for snapshot, paths in truth.trees.items():
            assert snapshot in truth.snapshots or snapshot in self.torn, f"a listing of {snapshot}"
            assert paths <= truth.snapshots.get(snapshot, dict.fromkeys(paths)).keys(), f"{snapshot} lists too much"

    def _check_nothing_leaks(self) -> None:
        """I8: all that is there is somebody's."""
        truth = self.truth
        assert not truth.private["staging"], "I8: staging"
        assert not truth.private["trash"], "I8: trash"
        partial = truth.private["partial"]
        whole = {name for name in partial if f"{name.removesuffix('.journal')}.journal" in partial}
        assert whole == partial, f"I8: {partial - whole}"
        assert truth.others == self.strangers, f"I8: {truth.others ^ self.strangers}"
        assert truth.bare <= self.robbed, f"I8: empty folders: {truth.bare - self.robbed}"
        linked = _linked(truth)
        linked |= {(s.repo_id, name) for s in self.torn for name in self.plain.known[s].names}  # they go with it
        leaked = truth.blobs.keys() - linked - self._orphans() - self.foreign
        assert not leaked, f"I8: nobody will ever remove {leaked}"

    def _check_books(self) -> None:
        """Leases, pins, branches and order are the model's; no request has left a hold behind."""
        truth, plain, core = self.truth, self.plain, self.life.core
        assert not core.use.holding()
        assert not core.use._held_snapshots
        assert core.use.leases.keys() == plain.leases.keys()
        for lease_id, lease in plain.leases.items():
            assert core.use.leases[lease_id].kind is lease.kind
        assert {(pin.repo_id, pin.revision) for pin in core.use.pins} == plain.pins
        believed = {(repo_id, r): c for repo_id, repo in core.index.repos.items() for r, c in repo.refs.items()}
        assert believed == plain.refs
        for ref, commit in truth.refs.items():
            if ref not in self.foreign_refs:
                assert plain.refs.get(ref) == commit, f"{ref} says {commit}"
        for ref, commit in plain.refs.items():
            snapshot = SnapshotId(ref[0], commit)
            assert snapshot in plain.known, f"{ref} names {commit}, which is not there"
            assert snapshot in self.torn or truth.refs.get(ref) == commit or self.disturbed
        assert core.use.order(plain.known) == plain.order(plain.known)
        for snapshot in plain.known:
            by_daemon = bool(core.use.protections(snapshot, core.refs()))
            assert by_daemon == bool(plain.keepers(snapshot)), f"I3: who keeps {snapshot}"


def _linked(truth: Truth) -> set[Name]:
    """Names that some snapshot links to."""
    return {(s.repo_id, os.path.basename(text)) for s, links in truth.snapshots.items() for text in links.values()}


def _pair(snapshot: SnapshotId) -> tuple[RepoId, Commit]:
    return snapshot.repo_id, snapshot.commit

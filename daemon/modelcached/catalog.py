"""Revision -> commit -> manifest: from memory, from the Hub within a deadline, or from what is cached.

A commit needs no call. A branch's commit is believed for ``resolve_ttl``, then
asked for again: for at most two seconds if a cached commit can stand in
(answered as stale), else for ``hub.timeout``, retries included. When the Hub
has failed several times in a row, nobody asks for a while: the breaker is
everybody's.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from modelcached.errors import CacheError, Reason
from modelcached.model import Commit, Manifest, RepoId, Revision, SnapshotId, as_commit
from modelcached.pools import Pools
from modelcached.sources.endpoints import Endpoints
from modelcached.sources.faults import REFUSALS, TransientError
from modelcached.sources.hub import HubApi, Resolved
from modelcached.sources.own_token import OwnToken, OwnTokenError
from modelcached.store.disk import storage_error
from modelcached.store.manifests import ManifestStore, Record

log = structlog.get_logger()
T = TypeVar("T")

STALE_AFTER = timedelta(seconds=1.5)
"""How long a fresh answer is waited for when a cached one can stand in; the promise is two seconds."""
MAX_CALLS = 5
"""Tries of one question, all endpoints together."""
BREAKER_FAILURES = 3
BREAKER_SECONDS = 10.0
_BACKOFF = wait_random_exponential(multiplier=0.25, max=8)


def fingerprint(token: str | None) -> str:
    """Tells tokens apart without keeping them."""
    return hashlib.sha256(b"modelcached:" + token.encode()).hexdigest()[:16] if token else "anonymous"


def is_silence(error: CacheError) -> bool:
    """The Hub said nothing about the question; anything else is its word."""
    silent = (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_STALLED, Reason.RATE_LIMITED)
    return isinstance(error, OwnTokenError) or error.reason in silent


@dataclass(frozen=True, slots=True)
class CatalogLimits:
    """Times of the Hub's answers."""

    resolve_ttl: timedelta
    timeout: timedelta
    offline: bool = False
    """Nobody is asked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The commit to serve."""

    commit: Commit
    stale: bool
    """It could not be asked for in time; this is what stood in."""
    restricted: bool | None
    """None where nobody was asked."""
    told_at: float = 0.0
    """When the Hub said so, time.monotonic(); 0 where it did not."""


@dataclass(slots=True, eq=False)
class _Question(Generic[T]):
    """What the Hub is being asked at this moment, for all who want to know."""

    task: asyncio.Task[T]
    asked_at: float
    """time.monotonic()"""
    late: bool = False
    """It is silent for longer than those wait for whom something cached can stand in."""


class Breaker:
    """Stops asking an upstream that has failed several times in a row."""

    def __init__(self) -> None:
        self._failures = 0
        self._open_until = 0.0

    @property
    def open(self) -> bool:
        """Nobody should ask now."""
        return time.monotonic() < self._open_until

    def failed(self) -> None:
        """A question got no answer."""
        self._failures += 1
        if self._failures >= BREAKER_FAILURES:
            self._open_until = time.monotonic() + BREAKER_SECONDS

    def answered(self) -> None:
        """It lives, whatever it said."""
        self._failures, self._open_until = 0, 0.0


class Catalog:
    """The event loop's alone; the calls run in Hub threads."""

    def __init__(
        self,
        *,
        apis: Sequence[HubApi],
        endpoints: Endpoints,
        pools: Pools,
        manifests: ManifestStore,
        limits: CatalogLimits,
        observe: Callable[[str, str], None],
        own_token: OwnToken,
    ) -> None:
        """``observe(call, outcome)`` counts each call of the Hub."""
        self._apis = {api.endpoint: api for api in apis}
        self._endpoints = endpoints
        self._pools = pools
        self._manifests = manifests
        self.limits = limits
        self._observe = observe
        self._own_token = own_token
        self.breaker = Breaker()
        self._resolved: dict[tuple[RepoId, Revision, str], tuple[float, Resolved]] = {}
        self._asking: dict[object, _Question[Any]] = {}

    async def resolve(self, repo_id: RepoId, revision: Revision, token: str | None, cached: Commit | None) -> Answer:
        """The commit that the revision means. ``cached``: a whole commit that can stand in for it.

        Raises CacheError: what the Hub says for certain (unknown, gated), or UPSTREAM_* when it says nothing
        and nothing is cached.
        """
        commit = as_commit(revision)
        if commit is not None:
            return Answer(commit, stale=False, restricted=None)
        key = (repo_id, revision, fingerprint(token))
        known = self._resolved.get(key)
        if known is not None and time.monotonic() - known[0] < self.limits.resolve_ttl.total_seconds():
            return Answer(known[1].commit, stale=False, restricted=known[1].restricted, told_at=known[0])
        if cached is not None and (self.limits.offline or self.breaker.open):
            return Answer(cached, stale=True, restricted=None)

        async def ask() -> tuple[float, Resolved]:
            resolved = await self._ask(
                "resolve",
                f"{repo_id}@{revision}",
                token,
                lambda api, sent, left: api.resolve(repo_id, revision, sent, left),
            )
            self._resolved[key] = (time.monotonic(), resolved)
            return self._resolved[key]

        question: _Question[tuple[float, Resolved]] = self._once(("resolve", *key), ask)
        answer = await self._answer(question, stand_in=cached is not None)
        if answer is None:
            assert cached is not None
            log.warning("serving the cached commit", repo_id=repo_id, revision=revision, commit=cached)
            return Answer(cached, stale=True, restricted=None)
        told_at, resolved = answer
        return Answer(resolved.commit, stale=False, restricted=resolved.restricted, told_at=told_at)

    async def manifest(
        self, snapshot: SnapshotId, token: str | None, *, restricted: bool | None, local: Manifest | None = None
    ) -> Record:
        """What the commit holds, and what this cache has of it: our own record, else the Hub's listing.

        ``local``: what can stand in for the Hub's listing.
        """
        try:
            record = await self._pools.on_disk(self._manifests.read, snapshot.repo_id, snapshot.commit)
        except OSError as error:
            raise storage_error(error, f"reading the record of {snapshot}") from error
        if record is not None and not record.manifest.local:
            return record
        if local is not None and (self.limits.offline or self.breaker.open):
            return Record(local)

        async def ask() -> Manifest:
            secret = restricted
            if secret is None:
                revision = Revision(snapshot.commit)
                answer = await self._ask(
                    "resolve",
                    str(snapshot),
                    token,
                    lambda api, sent, left: api.resolve(snapshot.repo_id, revision, sent, left),
                )
                secret = answer.restricted
            return await self._ask(
                "tree",
                str(snapshot),
                token,
                lambda api, sent, left: api.manifest(snapshot.repo_id, snapshot.commit, sent, left, restricted=secret),
            )

        listing: _Question[Manifest] = self._once(("tree", snapshot, fingerprint(token)), ask)
        answer = await self._answer(listing, stand_in=local is not None)
        if answer is None:
            assert local is not None
            log.warning("the commit is what a directory says that it is", model=str(snapshot))
            return Record(local)
        return Record(answer)

    async def check_access(self, repo_id: RepoId, token: str | None, *, known: bool) -> bool:
        """Whether the Hub says in time that the token may read the repository.

        ``known``: it said so before, and its silence need not be waited for. Raises CacheError where the token
        may not, or where nobody says and nobody said.
        """
        if known and (self.limits.offline or self.breaker.open):
            return False

        async def ask() -> bool:
            await self._ask("auth", repo_id, token, lambda api, sent, left: api.check_access(repo_id, sent, left))
            return True

        question: _Question[bool] = self._once(("auth", repo_id, fingerprint(token)), ask)
        return await self._answer(question, stand_in=known) or False

    def expire(self, repo_id: RepoId) -> None:
        """The next question about the repository goes to the Hub."""
        for key in [key for key in self._resolved if key[0] == repo_id]:
            del self._resolved[key]

    def _once(self, key: object, ask: Callable[[], Coroutine[None, None, T]]) -> _Question[T]:
        """One question at a time, however many want the answer; it goes on when they have gone."""
        running = self._asking.get(key)
        if running is None:
            running = _Question(asyncio.create_task(ask()), time.monotonic())
            self._asking[key] = running

            def over(task: asyncio.Task[T]) -> None:
                self._asking.pop(key, None)
                if not task.cancelled():
                    task.exception()  # read, so that an answer nobody waited for is no complaint

            running.task.add_done_callback(over)
        return running

    async def _answer(self, question: _Question[T], *, stand_in: bool) -> T | None:
        """The answer; None where the Hub says nothing in time, and something cached can stand in.

        The time runs from when the question was asked: who comes later finds the Hub silent already.
        """
        wait = question.asked_at + STALE_AFTER.total_seconds() - time.monotonic() if stand_in else None
        try:
            return await asyncio.wait_for(asyncio.shield(question.task), wait)
        except TimeoutError:
            if not question.late:  # however many waited for it
                question.late = True
                self.breaker.failed()
            waits = f"{self._endpoints.first} has not answered within {STALE_AFTER.total_seconds():g} s"
            log.warning("the Hub is slow", why=waits)
        except CacheError as error:
            if not stand_in or not is_silence(error):
                raise
            log.warning("the Hub failed", why=error.message)
        return None

    async def _ask(
        self, name: str, about: str, token: str | None, call: Callable[[HubApi, str | None, timedelta], T]
    ) -> T:
        """One question; where the daemon's own token is no good, asked as by anybody.

        Raises OwnTokenError where that token alone could have helped.
        """
        if self.limits.offline:
            raise CacheError(
                Reason.UPSTREAM_UNAVAILABLE,
                f"hub.offline is set, and neither the cache nor sources.directories know {about}",
                mend="add a directory that holds the model, or let the Hub be asked",
            )
        own, sent = self._own_token, self._own_token.worth_sending(token)

        def with_token(secret: str | None) -> Callable[[HubApi, timedelta], T]:
            # A token belongs to the first endpoint's host and goes nowhere else.
            return lambda api, left: call(api, secret if api.endpoint == self._endpoints.first else None, left)

        if not own.is_used_by(token):
            return await self._ask_endpoints(name, with_token(token))
        if sent is not None:
            try:
                answer = await self._ask_endpoints(name, with_token(sent))
            except CacheError as error:
                if error.reason is not Reason.TOKEN_REJECTED:
                    if error.reason in REFUSALS:  # its owner may not read that, and is known
                        own.accepted()
                    raise
                own.rejected(error)
            else:
                own.accepted()
                return answer
        try:
            return await self._ask_endpoints(name, with_token(None))
        except CacheError as error:
            if own.trouble is None or error.reason not in REFUSALS:
                raise
            why = f"{error.message}; with {own.trouble.message}" if sent is None else own.trouble.message
            raise OwnTokenError(Reason.TOKEN_REJECTED, why) from error

    async def _ask_endpoints(self, name: str, call: Callable[[HubApi, timedelta], T]) -> T:
        """One question to the endpoints, the healthiest first, within ``hub.timeout`` and MAX_CALLS."""
        deadline = time.monotonic() + self.limits.timeout.total_seconds()
        among = set(self._endpoints.names)

        def left() -> float:
            return deadline - time.monotonic()

        def gives_up(state: RetryCallState) -> bool:
            return state.attempt_number >= MAX_CALLS or left() <= self._endpoints.seconds_closed(among)

        def wait(state: RetryCallState) -> float:
            if self._endpoints.rested(among):
                return 0.0  # another endpoint is asked at once, the same one after a while
            closed = self._endpoints.seconds_closed(among)
            return closed or min(float(_BACKOFF(state)), max(0.0, left()))

        retrying = AsyncRetrying(stop=gives_up, wait=wait, retry=retry_if_exception_type(TransientError), reraise=True)
        try:
            async for attempt in retrying:
                with attempt:
                    await self._until_open(among, left())
                    result = await self._first_word(name, call, among, left)
        except TransientError as error:
            self.breaker.failed()
            raise error.final() from error
        except CacheError:
            self.breaker.answered()
            raise
        self.breaker.answered()
        return result

    async def _until_open(self, among: set[str], left: float) -> None:
        """One 429 holds back every question, once; the bytes have a limit of their own, and a pause of their own."""
        closed = self._endpoints.seconds_closed(among)
        if closed > max(0.0, left):
            raise TransientError(
                Reason.RATE_LIMITED,
                f"{self._endpoints.first} limits our rate (429), and wants no question for {math.ceil(closed)} s",
                retry_after=timedelta(seconds=math.ceil(closed)),
            )
        await asyncio.sleep(closed)

    async def _first_word(
        self, name: str, call: Callable[[HubApi, timedelta], T], among: set[str], left: Callable[[], float]
    ) -> T:
        """From the endpoint whose turn it is. A mirror that refuses is left out: it is the first one's to refuse."""
        share = self.limits.timeout.total_seconds() / len(self._endpoints.names)
        while True:
            endpoint = self._endpoints.choose(among)
            try:
                result = await self._call(name, self._apis[endpoint], call, max(0.1, min(share, left())))
            except TransientError as error:
                self._endpoints.failed(endpoint, error)
                raise
            except CacheError as error:
                self._endpoints.answered(endpoint)
                if endpoint == self._endpoints.first or error.reason not in REFUSALS:
                    raise
                among.discard(endpoint)
                continue
            self._endpoints.answered(endpoint)
            return result

    async def _call(self, name: str, api: HubApi, call: Callable[[HubApi, timedelta], T], seconds: float) -> T:
        outcome = "error"
        try:
            # The library's own timeouts are per read; this one is for the whole, whatever trickles in.
            result = await asyncio.wait_for(
                self._pools.on_hub(call, api, timedelta(seconds=seconds)), timeout=seconds + 0.5
            )
            outcome = "ok"
        except TimeoutError as error:
            outcome = Reason.UPSTREAM_STALLED
            raise TransientError(
                Reason.UPSTREAM_STALLED, f"{api.endpoint} did not answer within {seconds:.1f} s (hub.timeout)"
            ) from error
        except (TransientError, CacheError) as error:
            outcome = error.reason
            raise
        finally:
            self._observe(name, str(outcome))
        return result

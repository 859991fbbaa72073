"""Granting, renewing and ending leases: the cache's side of ledger/leases.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from modelcached.cache.core import Core
from modelcached.cache.requests import LeaseWish
from modelcached.cache.want import Want
from modelcached.errors import CacheError, Reason
from modelcached.ledger.leases import Lease, LeasedModel, LeaseKind


class Leasing:
    """The event loop's alone."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._released: dict[str, asyncio.Event] = {}

    async def grant(self, wants: Sequence[Want], wish: LeaseWish, pod_seen: Callable[[str], bool]) -> Lease:
        """Used now, with the strongest proof that the caller can give; in state.db before the answer leaves."""
        models = tuple(LeasedModel(want.snapshot, want.revision if want.by_name else "") for want in wants)
        section = self._core.config.leases
        kind, ttl = LeaseKind.TTL, min(wish.ttl or section.ttl, section.ttl)
        seconds: float | None = ttl.total_seconds()
        visible: bool = await self._core.pools.on_disk(pod_seen, wish.pod_uid) if wish.pod_uid else False
        if wish.stream:
            kind, seconds = LeaseKind.STREAM, None
        elif visible:
            kind = LeaseKind.POD
            seconds = section.max_pod_lease.total_seconds() if section.max_pod_lease else None
        pod_uid = wish.pod_uid if kind is LeaseKind.POD else ""
        used = [self._core.use.touch(want.snapshot) for want in wants]
        before = self._core.use.of_pod(pod_uid)
        lease, statements = self._core.use.lease(kind, wish.who, models, ttl_seconds=seconds, pod_uid=pod_uid)
        try:
            await self._core.commit(*used, *statements)
        except CacheError:
            # Nobody was told of it. One that was there before, or that another request has renewed, stays.
            if lease.id not in before and self._core.use.leases.get(lease.id) is lease:
                self._core.use.drop(lease.id)
            raise
        return lease

    async def renew(self, lease_id: str) -> Lease:
        """Raises CacheError(LEASE_NOT_FOUND)."""
        renewed = self._core.use.renew(lease_id)
        if renewed is None:
            raise CacheError(Reason.LEASE_NOT_FOUND, f"there is no lease {lease_id!r}")
        lease, statement = renewed
        await self._core.commit(statement)
        return lease

    async def release(self, lease_ids: Sequence[str]) -> list[str]:
        """Ends them; those that there were."""
        there = [lease_id for lease_id in lease_ids if lease_id in self._core.use.leases]
        statements = [statement for lease_id in there for statement in self._core.use.drop(lease_id)]
        for lease_id in there:
            if (waiting := self._released.pop(lease_id, None)) is not None:
                waiting.set()
        if not self._core.use.recovered()[0]:
            self._core.degraded.pop("recovered", None)
        await self._core.commit(*statements)
        return there

    @asynccontextmanager
    async def held(self, lease_id: str) -> AsyncIterator[Lease]:
        """A HoldModel stream: the lease lives as long as it does."""
        lease = self._core.use.leases.get(lease_id)
        if lease is None:
            raise CacheError(Reason.LEASE_NOT_FOUND, f"there is no lease {lease_id!r}")
        with self._core.use.stream(lease_id):
            yield lease

    async def until_released(self, lease_id: str) -> None:
        """Until somebody ends the lease; a HoldModel stream waits here."""
        if lease_id in self._core.use.leases:
            await self._released.setdefault(lease_id, asyncio.Event()).wait()

    def stop(self) -> None:
        """Sends every HoldModel stream away; their leases wait for reconnect_grace."""
        for waiting in self._released.values():
            waiting.set()

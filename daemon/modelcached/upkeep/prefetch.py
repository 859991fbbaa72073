"""The model list kept: what it names is fetched behind all requests, pinned, and brought up to date.

Two loops. ``look`` reads the file and takes away pins whose line is gone; ``work`` brings one model after the
other, the highest priority first, and looks at each again after ``hub.resolve_ttl``. A list that cannot be used
changes nothing: the last good one stays in force, and before there was one, all pins do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from modelcached.cache import Cache, Watch
from modelcached.cache.requests import Listed, ModelRequest, Phase, Standing
from modelcached.errors import CacheError, Reason
from modelcached.ledger.use import PinOwner
from modelcached.modellist import ListedModel, ModelListError, read
from modelcached.upkeep.file_watch import stamp

log = structlog.get_logger()

SHORTEST_SECONDS = 2.0
"""Between two tries of one model; doubled with each failure, and no model is looked at more often."""
LONGEST_SECONDS = 300.0
_TOPIC = "model list"
_NAMED = 3
"""Failing models that ``degraded`` names; status has them all."""


@dataclass(slots=True, eq=False)
class _Kept:
    """One model of the list in force."""

    model: ListedModel
    held: bool = False
    """Whole and pinned when it was last brought, though perhaps not the newest commit any more."""
    why: str = ""
    """It failed the last time."""
    due: float = 0.0
    """When it is looked at again; monotonic."""
    failures: int = 0


class Prefetcher:
    """The event loop's alone."""

    def __init__(self, cache: Cache, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._cache = cache
        self._core = cache.core
        self._monotonic = monotonic
        self._kept: list[_Kept] | None = None
        """In order of priority. None before there was a good list: then no pin is taken away."""
        self._seen: object = None
        """File and stamp of the list in force; None where the file is another by now."""
        self._current: _Kept | None = None
        self._watch = Watch(background=True)
        self._bringing: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self.soon = asyncio.Event()
        """Set: the file may have changed."""
        self.soon.set()
        self._core.listed = self.listed

    # The file

    async def look(self) -> None:
        """Once: reads the file where it is another, and takes away the pins of lines that are gone."""
        file = self._core.config.models.file
        if file is None:
            self._core.degraded.pop(_TOPIC, None)
            self._seen = None
            self._adopt(())
        else:
            found = await self._core.pools.on_disk(stamp, file)
            if (file, found) != self._seen and await self._read(file):
                self._seen = (file, found)
        await self._unpin()

    async def _read(self, file: Path) -> bool:
        """Whether it is good. One that is not is read again: not all that mends it (chmod) is seen from outside."""
        try:
            models = await self._core.pools.on_disk(read, file)
        except ModelListError as error:
            stays = "its last pins stay" if self._kept is None else "the last good one stays in force"
            told = f"model list: {file}: {error}; {stays}"
            if told != self._core.degraded.get(_TOPIC):
                log.error("model list refused, what it said before stays", file=str(file), why=str(error))  # noqa: TRY400
            self._core.degraded[_TOPIC] = told
            self._seen = None
            return False
        self._core.degraded.pop(_TOPIC, None)
        log.info("model list", file=str(file), models=len(models))
        self._adopt(models)
        return True

    def _adopt(self, models: tuple[ListedModel, ...]) -> None:
        """From now on this is the list. What is known of a model that stays is kept."""
        before = {kept.model.key: kept for kept in self._kept or ()}
        self._kept = []
        for model in sorted(models, key=lambda model: -model.priority):
            kept = before.get(model.key) or _Kept(model)
            kept.model = model
            self._kept.append(kept)
        if self._current is not None and (self._current not in self._kept or self._overtaken(self._current)):
            assert self._bringing is not None
            self._bringing.cancel()
        self._tell_failing()
        self._news.set()

    def _overtaken(self, current: _Kept) -> bool:
        """Something that was never tried has a higher priority than what is being fetched."""
        return any(
            kept.model.priority > current.model.priority and not kept.held and not kept.failures
            for kept in self._kept or ()
        )

    async def _unpin(self) -> None:
        """Takes away the list's own pins whose line is gone; tried again by the next look where that fails."""
        if self._kept is None:
            return
        wanted = {(kept.model.repo_id, kept.model.revision) for kept in self._kept}
        for pin in [pin for pin in self._core.use.pins if pin.owner is PinOwner.LIST]:
            if (pin.repo_id, pin.revision) not in wanted and await self._cache.drop_pin(pin):
                log.info("unpinned, for the model list names it no more", model=f"{pin.repo_id}@{pin.revision}")

    # The models

    async def work(self) -> None:
        """For ever: brings what is due, the highest priority first."""
        while True:
            self._news.clear()
            now = self._monotonic()
            kept = next((kept for kept in self._kept or () if kept.due <= now), None)
            if kept is not None:
                await self._bring(kept)
                continue
            next_due = min((kept.due for kept in self._kept or ()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if next_due is None else next_due - now):
                    await self._news.wait()

    async def _bring(self, kept: _Kept) -> None:
        """One model. A list that changes may take it back; what is on the disk by then stays."""
        self._current, self._watch = kept, Watch(background=True)
        self._bringing = asyncio.create_task(self._try(kept, self._watch), name=f"prefetch {kept.model}")
        try:
            await asyncio.wait({self._bringing})
        finally:
            if not self._bringing.done():
                self._bringing.cancel()
                await asyncio.wait({self._bringing})
            self._current = self._bringing = None
            self._tell_failing()

    async def _try(self, kept: _Kept, watch: Watch) -> None:
        model, began = kept.model, self._monotonic()
        seconds = max(SHORTEST_SECONDS, self._core.config.hub.resolve_ttl.total_seconds())
        try:
            await self._cache.keep(ModelRequest(model.repo_id, model.revision, model.profile), watch)
        except Exception as error:
            if not isinstance(error, CacheError):
                log.exception("prefetch failed, will try again", model=str(model))
            kept.why = _why(error)
            seconds = self._pause(kept, error)
            kept.failures += 1
            log.warning("model of the list is not held", model=str(model), why=kept.why, again_seconds=round(seconds))
        else:
            if not kept.held or kept.failures:
                log.info("model of the list is held", model=str(model))
            kept.held, kept.why, kept.failures = True, "", 0
            if not watch.working:  # looking again at all that is held leaves half of the time to what is not
                seconds = max(seconds, 2 * len(self._kept or ()) * (self._monotonic() - began))
        kept.due = self._monotonic() + seconds

    def _pause(self, kept: _Kept, error: Exception) -> float:
        if isinstance(error, CacheError):
            if error.reason is Reason.TRANSFER_CANCELLED:  # a person wanted it so, for now
                return LONGEST_SECONDS
            if error.retry_delay is not None:
                return max(SHORTEST_SECONDS, error.retry_delay.total_seconds())
        return min(LONGEST_SECONDS, SHORTEST_SECONDS * 2.0**kept.failures)

    # How it stands

    def listed(self) -> tuple[Listed, ...]:
        """Every model of the list in force, the highest priority first."""
        return tuple(self._listed(kept) for kept in self._kept or ())

    def _listed(self, kept: _Kept) -> Listed:
        standing, detail = Standing.HELD, ""
        if kept is self._current and (self._watch.working or not (kept.held or kept.why)):
            progress = self._watch.progress()
            standing, detail = Standing.FETCHING, progress.detail
            if progress.phase is Phase.QUEUED:
                standing = Standing.WAITING
        elif kept.why:
            standing = Standing.FAILING
            detail = f"an earlier commit is held; {kept.why}" if kept.held else kept.why
        elif not kept.held:
            standing = Standing.WAITING
        model = kept.model
        request = ModelRequest(model.repo_id, model.revision, model.profile)
        return Listed(request, model.priority, standing, detail)

    def _tell_failing(self) -> None:
        topic, failing = "listed models", [kept for kept in self._kept or () if kept.why]
        if not failing:
            self._core.degraded.pop(topic, None)
            return
        named = "; ".join(f"{kept.model}: {kept.why}" for kept in failing[:_NAMED])
        more = f"; and {len(failing) - _NAMED} more" if len(failing) > _NAMED else ""
        self._core.degraded[topic] = f"{len(failing)} of the model list's models fail: {named}{more}"


def _why(error: Exception) -> str:
    if not isinstance(error, CacheError):
        return f"{type(error).__name__}: {error}"
    if error.reason in (Reason.NO_SPACE_NOW, Reason.OVER_BUDGET):
        return f"does not fit: {error.text}"
    return error.text

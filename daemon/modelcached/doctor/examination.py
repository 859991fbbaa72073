"""All checks, in the order in which a person would look."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from modelcached import __version__
from modelcached.cache.core import PODS_DIRECTORY, Core
from modelcached.doctor import disk, node, upstream
from modelcached.doctor.finding import Finding, failure, ok, skipped
from modelcached.ledger.leases import LeaseKind
from modelcached.model import RepoId
from modelcached.sources.hub import HubApi
from modelcached.units import format_duration


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the doctor cannot find out by itself."""

    apis: Sequence[HubApi]
    polling: Callable[[], str]
    """Why hub/ is polled; empty where it is watched."""
    began_at: float
    """Monotonic."""


class Doctor:
    """The event loop's alone."""

    def __init__(self, core: Core, surroundings: Surroundings) -> None:
        self._core = core
        self._around = surroundings

    async def examine(self, repo_id: RepoId | None) -> AsyncIterator[Finding]:
        """One finding after the other; ``repo_id``: whose access is tried, too."""
        core, config = self._core, self._core.config
        up = timedelta(seconds=round(time.monotonic() - self._around.began_at))
        yield ok("daemon", f"modelcached {__version__}, up for {format_duration(up)}")
        for finding in node.troubles(core.degraded.values()):
            yield finding
        for check in self._disk_checks():
            for finding in await self._tried(check):
                yield finding
        for finding in await self._tried(lambda: node.sockets(config.server)):
            yield finding
        if config.hub.offline:
            yield skipped("upstream", "hub.offline is set: the Hub is never asked")
            return
        for api in self._around.apis:
            for finding in await self._on_hub(lambda api=api: [upstream.reach(api)]):  # type: ignore[misc]
                yield finding
        first = self._around.apis[0]
        for finding in await self._on_hub(lambda: [upstream.token(first, config.hub.token_file)]):
            yield finding
        if repo_id is not None:
            token, apis = config.hub.token_file, self._around.apis
            for finding in await self._on_hub(lambda: upstream.access(apis, token, repo_id)):
                yield finding

    def _disk_checks(self) -> list[Callable[[], Iterable[Finding]]]:
        core, layout = self._core, self._core.layout
        pods = sum(lease.kind is LeaseKind.POD for lease in core.use.leases.values())
        healthy, polling = PODS_DIRECTORY not in core.degraded, self._around.polling()
        path = core.config.leases.kubelet_pods_dir
        return [
            lambda: [disk.owner(layout)],
            lambda: [disk.readers(layout)],
            lambda: disk.abilities(core.disk, layout),
            lambda: disk.space(layout, core.space, core.kubelet()),
            lambda: [node.inotify(layout, polling)],
            lambda: [node.pods(path, healthy=healthy, leases=pods)],
            lambda: node.directories(core.config.sources.directories),
            lambda: [node.selinux()],
            lambda: [node.memory()],
        ]

    async def _tried(self, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
        try:
            return await self._core.pools.on_disk(lambda: list(check()))
        except OSError as error:
            return [failure("directory", f"cannot be looked at: {error}", "see the kernel's log")]

    async def _on_hub(self, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
        return await self._core.pools.on_hub(lambda: list(check()))

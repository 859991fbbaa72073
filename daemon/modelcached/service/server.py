"""Both sockets and what is registered on each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from modelcache.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, cache_pb2_grpc

from modelcached.cache import Cache
from modelcached.config import ServerSection
from modelcached.doctor import Doctor
from modelcached.ledger.history import History
from modelcached.service.admin_service import AdminService
from modelcached.service.cache_service import CacheService
from modelcached.service.sockets import Socket
from modelcached.service.status import Gate

_CACHE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


class Server:
    """The gRPC side of the daemon."""

    def __init__(
        self,
        cache: Cache,
        history: History,
        doctor: Doctor,
        section: ServerSection,
        pod_seen: Callable[[str], bool],
        config_file: Path | None,
        refused: Callable[[], None],
    ) -> None:
        """Two gates: workloads must not lock operators out. ``refused``: of a call that is one too many."""
        gate, admin_gate = Gate(section.max_streams, refused), Gate(section.max_streams, refused)
        cache_service = CacheService(cache, gate, pod_seen)
        admin_service = AdminService(cache, history, doctor, config_file, admin_gate, pod_seen)
        operators_cache_service = CacheService(cache, admin_gate, pod_seen)
        self._health = HealthServicer()
        self._drain = section.drain_timeout
        self._watchers: list[asyncio.Task[None]] = []
        self.gate = gate

        def workloads(server: grpc.aio.Server) -> None:
            cache_pb2_grpc.add_CacheServiceServicer_to_server(cache_service, server)
            self._common(server, _CACHE)

        def operators(server: grpc.aio.Server) -> None:
            cache_pb2_grpc.add_CacheServiceServicer_to_server(operators_cache_service, server)
            admin_pb2_grpc.add_AdminServiceServicer_to_server(admin_service, server)
            self._common(server, _CACHE, _ADMIN)

        self._sockets = (
            Socket(section.cache_socket, section.cache_socket_mode, 0o755, workloads),
            Socket(section.admin_socket, section.admin_socket_mode, 0o700, operators),
        )

    def _common(self, server: grpc.aio.Server, *names: str) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)

    async def start(self) -> None:
        """Serves on both sockets from here on."""
        for socket in self._sockets:
            await socket.open()
            self._watchers.append(asyncio.create_task(socket.watch(), name=f"watch {socket.path.name}"))
        for name in ("", _CACHE, _ADMIN):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Says that no more calls are welcome; those under way go on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, *, at_once: bool = False) -> None:
        """Ends both sockets."""
        for watcher in self._watchers:
            watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._watchers, return_exceptions=True)
        grace = timedelta(0) if at_once else self._drain
        await asyncio.gather(*(socket.close(grace.total_seconds()) for socket in self._sockets))

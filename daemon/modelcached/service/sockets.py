"""Unix sockets: locked before they are bound, given their mode, watched, bound again when somebody removed them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog

from modelcached.errors import CacheError, Reason

log = structlog.get_logger()

WATCH_SECONDS = 2.0
_OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),  # a request is a few hundred bytes; what is longer than its field
    # may be is refused by name, which needs the message to come through
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
]


@dataclass(slots=True, eq=False)
class Socket:
    """One listening socket and the server behind it."""

    path: Path
    mode: int
    directory_mode: int
    register: Callable[[grpc.aio.Server], None]
    _lock: int = -1
    _server: grpc.aio.Server | None = None
    _inode: tuple[int, int] | None = None
    _old: list[grpc.aio.Server] = field(default_factory=list)

    async def open(self) -> None:
        """Binds and serves. Raises CacheError(STORAGE_ERROR) where another daemon has the path."""
        self._own()
        await self._bind()

    def _own(self) -> None:
        """Makes the directory and takes the lock, unless they are ours already.

        gRPC takes over a path in use without an error, and the first server is never reachable again.
        """
        directory, name = self.path.parent, f"{self.path}.lock"
        if not directory.is_dir():
            directory.mkdir(parents=True, mode=self.directory_mode)
            directory.chmod(self.directory_mode)
        if self._lock >= 0 and os.path.exists(name) and os.path.samestat(os.stat(name), os.fstat(self._lock)):
            return
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise CacheError(
                Reason.STORAGE_ERROR,
                f"{self.path} is served by another modelcached",
                mend="stop it, or choose another path",
            ) from error
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = lock

    async def _bind(self) -> None:
        self._clear()
        server = grpc.aio.server(options=_OPTIONS)
        self.register(server)
        server.add_insecure_port(f"unix:{self.path}")
        await server.start()
        self.path.chmod(self.mode)
        status = os.lstat(self.path)
        self._server, self._inode = server, (status.st_dev, status.st_ino)

    def _clear(self) -> None:
        """A socket left by a daemon that was killed; the lock says that nobody serves it."""
        if os.path.lexists(self.path):
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                told = f"{self.path} is there and is no socket"
                raise CacheError(Reason.STORAGE_ERROR, told, mend="remove it, or choose another path")
            self.path.unlink()

    async def watch(self) -> None:
        """For ever: binds again when the socket's inode has gone."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                status = os.lstat(self.path)
                found: tuple[int, int] | None = (status.st_dev, status.st_ino)
            except FileNotFoundError:
                found = None
            if found == self._inode:
                continue
            log.warning("socket was removed or replaced, binding it again", path=str(self.path))
            try:
                self._own()
                if self._server is not None:
                    self._old.append(self._server)  # its streams go on until they end by themselves
                    self._server = None
                await self._bind()
            except (OSError, CacheError, RuntimeError) as error:
                log.error("socket cannot be bound", path=str(self.path), why=str(error))  # noqa: TRY400

    async def close(self, grace_seconds: float) -> None:
        """Lets calls under way end, then removes the socket."""
        for server in [*self._old, *([self._server] if self._server else [])]:
            await server.stop(grace_seconds)
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:
                self.path.unlink()
        except FileNotFoundError:
            pass
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

"""A long road on loopback: every connection has a round-trip time and a cap of its own.

`python -m tests.bench.proxy --rtt MS --rate MB LISTEN:TARGET_PORT ...` prints a line when it listens. Each direction
is delayed by half a round trip, the first bytes to the server by a whole one more (the handshake); bytes to the
client are read no faster than the cap, so that the server feels it. Slow start and loss are left out. A process of
its own with one event loop; about a fifth of a core at 160 MB/s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_BLOCK_BYTES = 256 << 10
_SOCKET_BUFFER_BYTES = 512 << 10
"""What the kernel may hold on its own: the road's length is to be in the delay, not in buffers."""
_SPARE_BYTES = 2 << 20
_BEHIND_SECONDS = 0.01
"""A timer that fires late is made up for up to this; a pause of the sender is not."""


class Direction:
    """Bytes from one socket to another, later, and no faster than the cap (bytes per second; 0: none)."""

    def __init__(self, source: socket.socket, sink: socket.socket, delay: float, rate: float, handshake: float) -> None:
        self._source, self._sink = source, sink
        self._delay, self._rate = delay, rate
        self._not_before = time.monotonic() + handshake
        self._under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._held_bytes = 0
        self._room_bytes = int(rate * delay) + _SPARE_BYTES
        self._delivered = asyncio.Event()

    async def run(self) -> None:
        """Until the source ends or either side breaks (OSError in an ExceptionGroup)."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._receive())
            both.create_task(self._deliver())

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        free_at = 0.0
        while True:
            data = await loop.sock_recv(self._source, _BLOCK_BYTES)
            now = max(time.monotonic(), self._not_before)
            free_at = max(free_at, now - _BEHIND_SECONDS)
            if self._rate:
                free_at += len(data) / self._rate
            self._held_bytes += len(data)
            self._under_way.put_nowait((max(now, free_at) + self._delay, data))
            if not data:
                return
            if (wait := free_at - time.monotonic()) > 0 and self._rate:
                await asyncio.sleep(wait)
            while self._held_bytes > self._room_bytes:
                self._delivered.clear()
                await self._delivered.wait()

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._under_way.get()
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if not data:
                self._sink.shutdown(socket.SHUT_WR)
                return
            await loop.sock_sendall(self._sink, data)
            self._held_bytes -= len(data)
            self._delivered.set()


class Road:
    """A listener, and what it leads to."""

    def __init__(self, target: tuple[str, int], rtt: float, rate: float) -> None:
        self._target, self._rtt, self._rate = target, rtt, rate
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Accepts for ever."""
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            task = asyncio.create_task(self._connection(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connection(self, client: socket.socket) -> None:
        server = socket.socket()
        server.setblocking(False)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
        half = self._rtt / 2
        with client, server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            try:
                await asyncio.get_running_loop().sock_connect(server, self._target)
                async with asyncio.TaskGroup() as both:
                    both.create_task(Direction(client, server, half, 0, self._rtt).run())
                    both.create_task(Direction(server, client, half, self._rate, 0).run())
            except* OSError:
                pass  # one side has gone; so does the other, as its sockets close


async def _serve(roads: list[tuple[int, int]], rtt: float, rate: float) -> None:
    listeners = []
    for port, target in roads:
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        listener.setblocking(False)
        listeners.append(Road(("127.0.0.1", target), rtt, rate).serve(listener))
    print("listening", flush=True)
    await asyncio.gather(*listeners)


@contextmanager
def long_road(roads: dict[int, int], rtt_seconds: float, bytes_per_second: float) -> Iterator[None]:
    """Runs the proxy: ports to listen on, and the ports they lead to."""
    command = [sys.executable, "-m", "tests.bench.proxy", "--rtt", f"{rtt_seconds * 1000:g}"]
    command += ["--rate", f"{bytes_per_second / 1e6:g}", *(f"{port}:{target}" for port, target in roads.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.proxy", description=__doc__)
    parser.add_argument("--rtt", type=float, default=50, help="round-trip time in milliseconds")
    parser.add_argument("--rate", type=float, default=20, help="MB per second for each connection; 0: no cap")
    parser.add_argument("roads", nargs="+", metavar="LISTEN:TARGET", help="ports on 127.0.0.1")
    options = parser.parse_args()
    roads = [(int(port), int(target)) for port, _, target in (road.partition(":") for road in options.roads)]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(roads, options.rtt / 1000, options.rate * 1e6))


if __name__ == "__main__":
    main()

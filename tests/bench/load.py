"""Callers of EnsureModel in one client process, and the bare server that they are compared with.

`python -m tests.bench.load calls ADDRESS REPO` prints a JSON object: when each call began (monotonic seconds) and how
long it took. `python -m tests.bench.load echo ADDRESS` is grpc.aio and generated code, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from modelcache.client import Client, reference
from modelcache.v1 import cache_pb2, cache_pb2_grpc, common_pb2

_WARM_UP_CALLS = 20
_LEASE_SECONDS = 60


class Echo(cache_pb2_grpc.CacheServiceServicer):
    """Answers every call with the same message."""

    answer = cache_pb2.EnsureModelResponse(
        ready=cache_pb2.Ready(
            models=[common_pb2.ReadyModel(repo_id="org/name", revision="main", commit="0" * 40, profile="full")],
            hub_dir="/var/lib/llm-models/hub",
        )
    )

    async def EnsureModel(self, request: Any, context: Any) -> AsyncIterator[cache_pb2.EnsureModelResponse]:  # noqa: N802 - gRPC's name
        yield self.answer


async def echo(address: str) -> None:
    """Serves until killed."""
    server = grpc.aio.server()
    cache_pb2_grpc.add_CacheServiceServicer_to_server(Echo(), server)  # type: ignore[abstract]
    server.add_insecure_port(address)
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


async def calls(options: argparse.Namespace) -> dict[str, list[float]]:
    """So many callers over one channel, each with one call at a time, until the time is over or stdin ends."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    if options.until_eof:
        loop.add_reader(sys.stdin.fileno(), ended.set)  # nobody writes to it: readable means ended
    began: list[float] = []
    took: list[float] = []
    async with grpc.aio.insecure_channel(options.address) as channel:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        request = cache_pb2.EnsureModelRequest(
            model=common_pb2.ModelReference(
                repo_id=options.repo, revision=options.revision, profile=common_pb2.Profile(name="full")
            ),
            lease=cache_pb2.LeaseRequest(ttl=Duration(seconds=_LEASE_SECONDS), holder="bench"),
        )

        async def call() -> None:
            start = time.monotonic()
            ready = False
            async for event in stub.EnsureModel(request):
                ready = event.WhichOneof("event") == "ready"
            if not ready:
                raise RuntimeError("a call ended without a Ready")
            began.append(start)
            took.append(time.monotonic() - start)

        async def caller() -> None:
            while not ended.is_set():
                await call()
                if options.pause:
                    await asyncio.sleep(options.pause)

        for _ in range(_WARM_UP_CALLS):
            await call()
        began.clear()
        took.clear()
        print("calling", flush=True)
        loop.call_later(options.seconds, ended.set)
        await asyncio.gather(*(caller() for _ in range(options.callers)))
    return {"began": began, "took": took}


def library_calls(options: argparse.Namespace) -> dict[str, list[float]]:
    """One caller that uses our client library (synchronous), until the time is over."""
    began: list[float] = []
    took: list[float] = []
    model = reference(options.repo, options.revision, profile="full")
    lease = cache_pb2.LeaseRequest(ttl=Duration(seconds=_LEASE_SECONDS), holder="bench")
    with Client(options.address) as client:
        ends = time.monotonic() + options.seconds
        while (start := time.monotonic()) < ends:
            with client.ensure(model, lease=lease) as events:
                *_, last = events
                if last.DESCRIPTOR.name != "Ready":
                    raise RuntimeError("a call ended without a Ready")
            began.append(start)
            took.append(time.monotonic() - start)
    return {"began": began[_WARM_UP_CALLS:], "took": took[_WARM_UP_CALLS:]}


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    parser.add_argument("what", choices=("calls", "echo"))
    parser.add_argument("address", help="unix:///path")
    parser.add_argument("repo", nargs="?", default="org/name")
    parser.add_argument("--revision", default="")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a caller's calls")
    parser.add_argument("--until-eof", action="store_true", help="stop when stdin ends, too")
    parser.add_argument("--library", action="store_true", help="call through modelcache.client, one caller")
    options = parser.parse_args()
    if options.what == "echo":
        asyncio.run(echo(options.address))
    elif options.library:
        print(json.dumps(library_calls(options)))
    else:
        print(json.dumps(asyncio.run(calls(options))))


if __name__ == "__main__":
    main()

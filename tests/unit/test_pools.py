"""Threads for blocking work."""

from __future__ import annotations

import structlog
from modelcached.pools import Pools


async def test_what_a_thread_logs_carries_its_request() -> None:
    pools = Pools.start(connections=1)
    try:
        with structlog.contextvars.bound_contextvars(request_id="7"):
            for run in (pools.on_disk, pools.on_hub, pools.on_hash, pools.on_flush, pools.on_mover):
                assert await run(structlog.contextvars.get_contextvars) == {"request_id": "7"}
        assert await pools.on_disk(structlog.contextvars.get_contextvars) == {}
    finally:
        pools.stop()

"""`python -m tests.hub`: the test Hub as a process of its own, for demonstrations.

The first line on stdout is the endpoint. `GET /_hub/counters` tells what was sent, `POST /_hub/shutdown`
and SIGTERM end it.
"""

from __future__ import annotations

import argparse
import signal
import threading
from dataclasses import asdict

from .models import CATALOGUE
from .server import MIB, Hub


class DemoHub(Hub):
    """A Hub that can be asked for its counters and told to end, over HTTP."""

    ended = threading.Event()

    def control(self, method: str, route: str) -> object | None:
        match method, route:
            case "GET", "counters":
                return {"files": [asdict(total) for total in self.totals()]}
            case "POST", "shutdown":
                self.ended.set()
                return {"stopping": True}
            case _:
                return None


def main() -> None:
    """Serve until told to stop."""
    options = _parse()
    with DemoHub(port=options.port, cdn_port=options.cdn_port) as hub:
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda *_: hub.ended.set())
        for name in options.model or ["tiny"]:
            hub.create_repo(f"org/{name}").commit(CATALOGUE[name]())
        hub.rate = options.rate * MIB if options.rate else None
        print(hub.endpoint, flush=True)
        hub.ended.wait()
        hub.wait_until(lambda: all(record.finished for record in hub.requests() if record.file == "shutdown"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--cdn-port", type=int, default=0, help="0: any free port")
    parser.add_argument("--rate", type=float, help="MiB per second over all bodies (default: unlimited)")
    parser.add_argument(
        "--model", action="append", choices=sorted(CATALOGUE), help="served as org/NAME (default: tiny)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

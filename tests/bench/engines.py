"""Which library receives: ranges into a reused buffer, by as many threads as the daemon has movers. No disk, no hash.

The answer to "why http.client": see docs/benchmarks.md. `pycurl` and `urllib3` are installed for this alone.
"""

from __future__ import annotations

import http.client
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench import measure
from tests.bench.cases import GIB, Bench, Case, Column, upstream
from tests.bench.measure import ContenderError
from tests.bench.peers import Contender, Figures
from tests.hub.models import paced_model

THREADS = 8
RANGE_BYTES = 16 << 20
CHUNK_BYTES = 256 << 10
_ROOT = str(Path(__file__).parents[2])

Sink = Callable[[int], None]
"""Told how many bytes came."""
Engine = Callable[[str], Callable[[int, int, Sink], None]]
"""Of a URL: one thread's way to receive [start, end), its connection kept."""


def _http_client(url: str) -> Callable[[int, int, Sink], None]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc)
    buffer = memoryview(bytearray(CHUNK_BYTES))

    def fetch(start: int, end: int, sink: Sink) -> None:
        connection.request("GET", parts.path, headers={"Range": f"bytes={start}-{end - 1}"})
        response = connection.getresponse()
        while count := response.readinto(buffer):
            sink(count)

    return fetch


def _urllib3(url: str) -> Callable[[int, int, Sink], None]:
    import urllib3  # noqa: PLC0415 - a contender of the bench alone

    pool = urllib3.PoolManager()

    def fetch(start: int, end: int, sink: Sink) -> None:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        response = pool.request("GET", url, headers=headers, preload_content=False)
        for piece in response.stream(CHUNK_BYTES):
            sink(len(piece))
        response.release_conn()

    return fetch


def _httpx2(url: str) -> Callable[[int, int, Sink], None]:
    import httpx2  # noqa: PLC0415 - what huggingface_hub receives with

    client = httpx2.Client()

    def fetch(start: int, end: int, sink: Sink) -> None:
        with client.stream("GET", url, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
            for piece in response.iter_raw(CHUNK_BYTES):
                sink(len(piece))

    return fetch


def _pycurl(url: str) -> Callable[[int, int, Sink], None]:
    import pycurl  # noqa: PLC0415 - a contender of the bench alone

    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, url)
    handle.setopt(pycurl.BUFFERSIZE, CHUNK_BYTES)
    handle.setopt(pycurl.NOSIGNAL, 1)

    def fetch(start: int, end: int, sink: Sink) -> None:
        handle.setopt(pycurl.RANGE, f"{start}-{end - 1}")
        handle.setopt(pycurl.WRITEFUNCTION, lambda piece: sink(len(piece)))
        handle.perform()

    return fetch


ENGINES: dict[str, Engine] = {
    "http.client": _http_client,
    "urllib3": _urllib3,
    "httpx2": _httpx2,
    "pycurl": _pycurl,
}


def receive(engine: Engine, url: str, size_bytes: int) -> int:
    """All of the file, by THREADS at once; how many bytes came."""
    starts: queue.SimpleQueue[int] = queue.SimpleQueue()
    for start in range(0, size_bytes, RANGE_BYTES):
        starts.put(start)
    came = [0] * THREADS

    def work(number: int) -> None:
        def sink(count: int) -> None:
            came[number] += count

        fetch = engine(url)
        while True:
            try:
                start = starts.get_nowait()
            except queue.Empty:
                return
            fetch(start, min(start + RANGE_BYTES, size_bytes), sink)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(came)


class Received(Contender):
    """One engine, in a process of its own."""

    def __init__(self, name: str, url: str, size_bytes: int, bench: Bench) -> None:
        self.name = name
        self._size_bytes = size_bytes
        self._argv = [sys.executable, "-m", "tests.bench.engines", name, url, str(size_bytes)]
        self._bench = bench

    def run(self) -> Figures:
        done = measure.run(self._argv, {**os.environ, "PYTHONPATH": _ROOT}, self._bench.directory)
        if done.stdout.strip() != str(self._size_bytes):
            raise ContenderError(f"{self.name} received {done.stdout.strip()} of {self._size_bytes} bytes")
        gib = self._size_bytes / GIB
        return {
            "seconds": done.seconds,
            "rate": self._size_bytes / done.seconds / 1e6,
            "cpu_gib": done.cpu_seconds / gib,
            "peak": done.peak_bytes / 2**20,
        }


@contextmanager
def _prepare(bench: Bench) -> Iterator[Sequence[Contender]]:
    with upstream(bench, "bench/engine", paced_model(bench.scale.big_bytes, 1)) as (site, model):
        (path,) = model.large
        url = site.cdn_url(model.files[path])
        measure.warm(model.paths)
        yield [Received(name, url, model.files[path].size, bench) for name in ENGINES]


ENGINE = Case(
    "engine",
    "Receiving alone, 1 file, 8 threads, ranges of 16 MiB",
    (
        Column("seconds", "s"),
        Column("rate", "MB/s", 0, less_is_better=False),
        Column("cpu_gib", "CPU s/GiB"),
        Column("peak", "MiB", 0),
    ),
    _prepare,
    base="http.client",
)


if __name__ == "__main__":
    sys.stdout.write(f"{receive(ENGINES[sys.argv[1]], sys.argv[2], int(sys.argv[3]))}\n")

"""Bytes of a file from the Hub's Xet store, through hf_xet in a process of its own.

One process reads one stretch of a file after the other, for starting one takes as long as a shard of 100 MB. It is
watched from here (see xet_process.py) and killed after the first stretch that did not come through, for whatever
hf_xet does wrong ends with it, and when nobody has asked it for a while. Only what has arrived here counts, and whether
it is right is the digest's to say, for hf_xet 1.8 checks nothing.

Xet is never the only way: an origin that gives up says OriginFailedError, and the file goes on over HTTP from
where it is. Blocking: call it from a mover thread.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from modelcached.errors import CacheError, Reason
from modelcached.sources.abort import Abort, AbortedError
from modelcached.sources.faults import TransientError
from modelcached.sources.http import RemoteFile
from modelcached.sources.hub import HubApi, XetToken
from modelcached.sources.origin import OriginFailedError
from modelcached.sources.sink import Sink
from modelcached.sources.xet_child import BLOCK_BYTES
from modelcached.sources.xet_process import Child, EndedError, NoProcessError
from modelcached.sources.xet_process import start as start_process

MIN_BYTES = 16 << 20
"""A smaller file is one request over HTTP: a process would cost more."""
STRETCH_BYTES = 2 << 30
"""What a process is asked for at once. Between two, another flight may have its turn, and the token may be renewed."""
STREAMS = 1
"""At once. One stream has many connections of its own; with full xorbs (64 MiB) its process takes 350 MiB at most
with the buffers below, and two would not fit into 600."""
BUFFERS = {
    "reconstruction.download_buffer_size": "128mb",
    "reconstruction.download_buffer_perfile_size": "64mb",
    "reconstruction.download_buffer_limit": "192mb",
}
_CONFIG = {
    **BUFFERS,
    "telemetry.enabled": False,
    # Its own retries are for what is over at once; ours know the stall timeout and the way over HTTP.
    "client.retry_max_attempts": 2,
    "client.retry_base_delay": "500ms",
}
MAX_FAILURES = 3
"""A file that has failed so often (a stall counts twice) goes on over HTTP."""
REST = timedelta(minutes=5)
"""When two files in a row had to go on over HTTP, the others do not even try for so long."""
_WHOLE_PIECE_STALLS = 10
"""Bytes must be coming in all the time, but a whole piece (up to 64 MiB) may take so many stall timeouts."""
_TOKEN_MARGIN_SECONDS = 60
_POLL_SECONDS = 0.1


class XetSource:
    """Streams of files from the stores that endpoints name. Thread-safe."""

    def __init__(
        self,
        apis: Sequence[HubApi],
        *,
        stall_timeout_seconds: float,
        enabled: bool = True,
        ca_file: Path | None = None,
    ) -> None:
        self.enabled = enabled
        """May change at any time; files under way go on."""
        self._ca_file = ca_file
        self._apis = {api.endpoint: api for api in apis}
        self._stall_seconds = stall_timeout_seconds
        self._tokens: dict[tuple[str, str, str, str | None], XetToken] = {}
        self._lock = threading.Lock()
        self._given_up = 0
        self._rests_until = 0.0
        self._idle: tuple[float, Child] | None = None

    def origin(self, file: RemoteFile) -> XetOrigin | None:
        """The file's origin here; None where it has none or needs none."""
        known = file.entry.xet_hash and re.fullmatch(r"[0-9a-f]{64}", file.entry.xet_hash)
        if not known or not self.enabled or file.entry.size_bytes < MIN_BYTES or file.endpoint not in self._apis:
            return None
        return XetOrigin(self, file)

    # Whether it pays to try

    @property
    def rests(self) -> bool:
        """Nobody should try now."""
        return time.monotonic() < self._rests_until

    def worked(self) -> None:
        """A stretch came through."""
        with self._lock:
            self._given_up, self._rests_until = 0, 0.0

    def gave_up(self) -> None:
        """A file went on over HTTP."""
        with self._lock:
            self._given_up += 1
            if self._given_up >= 2:
                self._rests_until = time.monotonic() + REST.total_seconds()

    # One stretch

    def fetch(self, file: RemoteFile, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """Hands the bytes [start, end) to the sink in order. See HttpSource.fetch for what it raises."""
        token = self._token(file, abort)
        request = {
            "cas_url": token.cas_url,
            "token": token.access_token,
            "expires": token.expires,
            "hash": file.entry.xet_hash,
            "size": file.entry.size_bytes,
            "start": start,
            "end": end,
            "beat_seconds": min(1.0, self._stall_seconds / 4),
            "config": _CONFIG,
        }
        try:
            child = self._take()
        except NoProcessError as error:
            raise TransientError(Reason.UPSTREAM_UNAVAILABLE, f"{file}: no process for Xet: {error}") from error
        try:
            child.ask(request)
            self._watch(child, file, start, end, sink, abort)
        except BaseException:
            child.end()
            raise
        self._keep(child)

    def _take(self) -> Child:
        with self._lock:
            kept, self._idle = self._idle, None
        if kept is not None:
            if kept[1].lives:
                return kept[1]
            kept[1].end()
        return start_process(self._ca_file)

    def _keep(self, child: Child) -> None:
        """For the next stretch."""
        with self._lock:
            if self._idle is None:
                self._idle = time.monotonic(), child
                return
        child.end()

    @property
    def idles(self) -> bool:
        """There is a process that nobody has asked since its last stretch."""
        return self._idle is not None

    def close(self, *, idle_seconds: float = 0.0) -> None:
        """Ends the process that nobody has asked for so long."""
        with self._lock:
            if self._idle is None or time.monotonic() - self._idle[0] < idle_seconds:
                return
            (_, child), self._idle = self._idle, None
        child.end()

    def _watch(self, child: Child, file: RemoteFile, start: int, end: int, sink: Sink, abort: Abort) -> None:
        child.channel.settimeout(self._stall_seconds)
        abort.attach(child.channel)
        try:
            self._receive(child, file, start, end, sink, abort)
        except TimeoutError as error:
            raise TransientError(
                Reason.UPSTREAM_STALLED, f"{file}: Xet sent nothing within the stall timeout"
            ) from error
        except EndedError as error:
            if abort.is_set:
                raise AbortedError from error
            self.forget(file)  # its token may be what was wrong
            raise TransientError(
                Reason.UPSTREAM_UNAVAILABLE, f"{file}: Xet ended {end - error.position} bytes early: {child.said()}"
            ) from error
        finally:
            abort.attach(None)

    def _receive(self, child: Child, file: RemoteFile, start: int, end: int, sink: Sink, abort: Abort) -> None:
        position, moved_at = start, time.monotonic()
        while position < end:
            offset, length = child.frame(position)
            if length == 0:
                if time.monotonic() - moved_at > _WHOLE_PIECE_STALLS * self._stall_seconds:
                    raise TimeoutError
                continue
            if offset != position or length > min(BLOCK_BYTES, end - position):
                raise TransientError(
                    Reason.UPSTREAM_UNAVAILABLE, f"{file}: Xet sent {length} bytes of {offset} where {position} was due"
                )
            if abort.is_set:
                raise AbortedError
            with child.block(length) as block:
                sink(block, position)
            position += length
            moved_at = time.monotonic()

    # Tokens

    def _token(self, file: RemoteFile, abort: Abort) -> XetToken:
        """The store's address and a token for it, from the Hub with the caller's own token."""
        key = (file.endpoint, file.repo_id, file.commit, file.token)
        with self._lock:
            known = self._tokens.get(key)
        if known is not None and known.expires - time.time() > _TOKEN_MARGIN_SECONDS:
            return known
        token = self._ask(file, abort)
        with self._lock:
            now = time.time()
            self._tokens = {k: t for k, t in self._tokens.items() if t.expires > now}
            self._tokens[key] = token
        return token

    def _ask(self, file: RemoteFile, abort: Abort) -> XetToken:
        """In a thread of its own, so that a Hub that trickles its answer holds neither a mover nor our end."""
        api, limit, answer = self._apis[file.endpoint], self._stall_seconds, Future[XetToken]()

        def ask() -> None:
            try:
                answer.set_result(api.xet_token(file.repo_id, file.commit, file.token, timedelta(seconds=limit)))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                answer.set_exception(error)

        threading.Thread(target=ask, name="xet-token", daemon=True).start()
        deadline = time.monotonic() + limit + 0.5
        while not wait({answer}, _POLL_SECONDS).done:
            if abort.is_set:
                raise AbortedError
            if time.monotonic() > deadline:
                raise TransientError(Reason.UPSTREAM_STALLED, f"{file.endpoint} gave no Xet token within {limit:.1f} s")
        try:
            return answer.result()
        except CacheError as error:  # over HTTP it will be said again, or not be so
            raise OriginFailedError(f"{file}: no Xet token: {error.message}") from error

    def forget(self, file: RemoteFile) -> None:
        """The next stretch asks for a new token."""
        with self._lock:
            self._tokens.pop((file.endpoint, file.repo_id, file.commit, file.token), None)


@dataclass(slots=True, eq=False)
class XetOrigin:
    """A file of the Hub that has a Xet hash."""

    source: XetSource
    file: RemoteFile
    failures: int = field(default=0)

    @property
    def label(self) -> str:
        """Where the bytes are counted."""
        return "xet"

    @property
    def part_bytes(self) -> int:
        """Long stretches: each costs a process."""
        return STRETCH_BYTES

    @property
    def at_once(self) -> int | None:
        """How many processes may run."""
        return STREAMS

    @property
    def content_tries(self) -> int:
        """Over HTTP it is right, or it is wrong upstream."""
        return 1

    def fetch(self, start: int, end: int, sink: Sink, abort: Abort) -> None:
        """Through hf_xet. Raises OriginFailedError when it has failed too often, here or elsewhere."""
        if self.source.rests:
            raise OriginFailedError(f"{self.file}: Xet has failed lately and is not tried")
        try:
            self.source.fetch(self.file, start, end, sink, abort)
        except TransientError as error:
            self.failures += 2 if error.reason is Reason.UPSTREAM_STALLED else 1
            if self.failures < MAX_FAILURES:
                raise
            self.source.gave_up()
            raise OriginFailedError(error.message) from error
        except OriginFailedError:
            self.source.gave_up()
            raise
        self.failures = 0
        self.source.worked()

    def forget(self) -> None:
        """The token may be renewed."""
        self.source.forget(self.file)

    def __str__(self) -> str:
        return f"{self.file} over Xet"

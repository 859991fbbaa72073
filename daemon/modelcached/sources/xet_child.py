"""The program that reads stretches of files through hf_xet, one after the other, for the daemon that started it.

    python -m modelcached.sources.xet_child PARENT_PID DESCRIPTOR_OF_THE_SHARED_MEMORY

A process of its own, because a stream of hf_xet 1.8 cannot be stopped from outside (``cancel`` leaves the
traffic running) and a silent server holds it for half an hour; a process can be killed, and its sockets with it.
It dies with the daemon and holds no lock. It is told what to read on stdin, a line of JSON for each stretch, so that
no token stands in its arguments or environment; it never sees the token of the Hub, only that of the store.

It writes blocks into memory that it shares with its reader, one after the other and round again, and tells of each
on stdout, which is a socket: offset in the file (8 bytes), length (4 bytes), both little-endian. The reader answers
each with a byte, after which the block is free. (Through the socket itself every byte is copied once more, and the
two processes wake each other for every 200 KiB.) A frame of length 0 says that bytes are coming in, though no piece is
whole yet: hf_xet hands out a term at a time, up to 64 MiB. Its reader counts: a stream may end early and look well.
What went wrong is the last line of stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
from typing import Any

from modelcached.sources.tcp import bytes_received

FRAME = struct.Struct("<QI")
BLOCK_BYTES, BLOCKS = 1 << 20, 8
"""Of the shared memory."""
STDERR_BYTES = 64 << 10
"""What is kept of stderr, which lies in memory."""

_MEMORY = "/dev/shm"  # noqa: S108 - a private directory is made in it
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Streams what each line asks for, and ends with 0 after the last; any other end has its reason on stderr."""
    _die_with(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold the token
    resource.setrlimit(resource.RLIMIT_FSIZE, (STDERR_BYTES, STDERR_BYTES))
    frames = _Frames(socket.socket(fileno=1), mmap.mmap(int(sys.argv[2]), BLOCKS * BLOCK_BYTES))
    try:
        while line := sys.stdin.buffer.readline():
            _stream(json.loads(line), frames)
    except BaseException as error:  # noqa: BLE001 - a Rust panic is no Exception
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
        os._exit(1)  # a runtime that hangs must not hold the exit
    os._exit(0)


def _die_with(parent: int) -> None:
    """SIGKILL when the daemon's thread that started this process ends; now, if it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


class _Frames:
    """The way to the daemon. One thread sends, another tells of life."""

    def __init__(self, channel: socket.socket, blocks: mmap.mmap) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._blocks = blocks
        self._next = 0
        self._free = BLOCKS

    def send(self, offset: int, piece: bytes) -> None:
        view = memoryview(piece)
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            if self._free == 0:
                taken = len(self._channel.recv(BLOCKS))
                if not taken:
                    raise ConnectionResetError("the daemon has closed its end")
                self._free += taken
            at = self._next * BLOCK_BYTES
            self._blocks[at : at + len(block)] = block
            self._next = (self._next + 1) % BLOCKS
            self._free -= 1
            self._tell(offset + start, len(block))

    def live(self) -> None:
        self._tell(0, 0)

    def _tell(self, offset: int, length: int) -> None:
        with self._lock:
            self._channel.sendall(FRAME.pack(offset, length))


def _stream(request: dict[str, Any], frames: _Frames) -> None:
    import hf_xet  # noqa: PLC0415 - not before this process is sure to die with its parent

    # with_config refuses a name or a size that it does not know; in the environment they would go unnoticed.
    config = hf_xet.XetConfig().with_config(request["config"])
    # It makes directories for uploads, which a reader never uses; by default below $HOME.
    with tempfile.TemporaryDirectory(
        prefix="modelcached-xet-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None
    ) as scratch:
        os.environ["HF_XET_CACHE"] = scratch
        group = hf_xet.XetSession(config).new_download_stream_group(
            endpoint=request["cas_url"], token=request["token"], token_expiry_unix_secs=request["expires"]
        )
    position, end = request["start"], request["end"]
    stream = group.download_stream(hf_xet.XetFileInfo(request["hash"], request["size"]), position, end)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(frames, request["beat_seconds"], ended), daemon=True).start()
    while (piece := next(stream, None)) is not None:
        frames.send(position, piece)
        position += len(piece)
        del piece  # tens of MiB that need not wait for the next
    ended.set()
    if position < end:
        raise EOFError("the stream ended early and said nothing")


def _beat(frames: _Frames, seconds: float, ended: threading.Event) -> None:
    """Tells the daemon whenever this process has received something since the last time."""
    before: dict[int, int] = {}
    while not ended.wait(seconds):
        now = _received()
        if any(count > before.get(inode, 0) for inode, count in now.items()):
            with contextlib.suppress(OSError):
                frames.live()
        before = now


def _received() -> dict[int, int]:
    """Bytes received so far by each TCP connection of this process, by the socket's inode."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue  # making a socket of it would fail and leave the duplicate open
            with socket.socket(fileno=os.dup(int(name))) as own:
                if own.family in (socket.AF_INET, socket.AF_INET6):
                    found[status.st_ino] = bytes_received(own)
    return found


if __name__ == "__main__":
    main()

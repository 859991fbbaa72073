"""Starts xet_child.py, hears what it says, and ends it."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from modelcached.model import shown
from modelcached.sources.xet_child import BLOCK_BYTES, BLOCKS, FRAME, STDERR_BYTES

_LAST_WORDS_SECONDS = 1.0
_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Large memory in huge pages, where the system gives them to whoever asks (transparent_hugepage: madvise). hf_xet hands
out a piece in new memory each time, up to 64 MiB: page by page of 4 KiB that takes a third of the whole CPU. glibc 2.35
and later (the manual's Memory Allocation Tunables); others do not look at it."""
_KEPT_VARIABLES = re.compile(
    r"PATH|LANG|TMPDIR|PYTHONPATH|LD_LIBRARY_PATH|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE
)


class EndedError(Exception):
    """The process has closed its end."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position


class NoProcessError(Exception):
    """The machine gives no process, or no descriptors for it."""


class Child:
    """A process that reads one stretch after the other, and the way to it. Whoever has it ends it."""

    def __init__(
        self, process: subprocess.Popen[bytes], channel: socket.socket, blocks: memoryview, stderr: int, held: ExitStack
    ) -> None:
        self.channel = channel
        self._process = process
        self._blocks = blocks
        self._next = 0
        self._stderr = stderr
        self._held = held

    @property
    def lives(self) -> bool:
        """It has not ended yet."""
        return self._process.poll() is None

    def ask(self, request: dict[str, object]) -> None:
        """The next stretch."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it says why it has ended already
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """Kills it, whatever it does at this moment."""
        self._held.close()

    def frame(self, position: int) -> tuple[int, int]:
        """Offset and length of what comes next. Raises TimeoutError, EndedError (``position`` is for it)."""
        header = bytearray(FRAME.size)
        view = memoryview(header)
        while view:
            try:
                count = self.channel.recv_into(view)
            except ConnectionError:
                count = 0
            if count == 0:
                raise EndedError(position)
            view = view[count:]
        offset, length = FRAME.unpack(header)
        return offset, length

    @contextmanager
    def block(self, length: int) -> Iterator[memoryview]:
        """What the frame told of, as long as it is needed; then its place is the process's again."""
        at = self._next * BLOCK_BYTES
        with self._blocks[at : at + length] as block:
            yield block
        self._next = (self._next + 1) % BLOCKS
        with suppress(OSError):  # the next frame will not come
            self.channel.send(b".")

    def said(self) -> str:
        """Why it ended, in its own words; without the addresses' queries, for they are signed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_SECONDS)
        lines = os.pread(self._stderr, STDERR_BYTES, 0).decode(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        status = self._process.returncode
        ending = f", exit status {status}" if status else ""
        return shown(re.sub(r"\?[^\s)\"']+", "?...", words), 300) + ending


def start(ca_file: Path | None = None) -> Child:
    """A process that waits to be asked. It believes the authorities of ``ca_file`` beside the system's.

    Raises NoProcessError.
    """
    with ExitStack() as held:
        try:
            stderr = os.memfd_create("xet-stderr")
            held.callback(os.close, stderr)
            memory = os.memfd_create("xet-blocks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            held.callback(os.close, memory)
            os.ftruncate(memory, BLOCKS * BLOCK_BYTES)
            # A process that made it shorter would end this one with SIGBUS.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            blocks = held.enter_context(memoryview(held.enter_context(mmap.mmap(memory, BLOCKS * BLOCK_BYTES))))
            ours, theirs = socket.socketpair()
            held.enter_context(ours)
            with theirs:
                # Exec'ed by vfork: nothing of ours runs between, so gRPC's threads do no harm.
                process = subprocess.Popen(  # noqa: S603 - our own program
                    [sys.executable, "-P", "-m", "modelcached.sources.xet_child", str(os.getpid()), str(memory)],
                    stdin=subprocess.PIPE,
                    stdout=theirs.fileno(),
                    stderr=stderr,
                    cwd="/",
                    env=_environment(ca_file),
                    pass_fds=(memory,),
                )
        except OSError as error:
            raise NoProcessError(error.strerror or str(error)) from error
        held.callback(_close, process)
        held.callback(process.wait)
        held.callback(process.kill)
        return Child(process, ours, blocks, stderr, held.pop_all())


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # what it was asked for and did not read
        process.stdin.close()


def _environment(ca_file: Path | None) -> dict[str, str]:
    """What hf_xet needs of ours, and what keeps it from calling home and from writing logs below $HOME."""
    kept = {name: value for name, value in os.environ.items() if _KEPT_VARIABLES.fullmatch(name)}
    if ca_file is not None:
        # It reads the directory beside the file only where both are named.
        kept = {"SSL_CERT_DIR": ssl.get_default_verify_paths().openssl_capath, **kept, "SSL_CERT_FILE": str(ca_file)}
    return {**kept, **_MALLOC, "HF_XET_TELEMETRY_ENABLED": "0", "HF_XET_LOG_DEST": "/dev/null", "RUST_LOG": "error"}

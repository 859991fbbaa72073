"""Starts xet_child.py, hears what it says, and ends it."""

from __future__ import annotations

import json
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
from modelcached.sources.xet_child import FRAME, STDERR_BYTES

_LAST_WORDS_SECONDS = 1.0
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
    """The process of one stretch, and the way to it."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, stderr: int) -> None:
        self.channel = channel
        self._process = process
        self._stderr = stderr

    def frame(self, position: int) -> tuple[int, int]:
        """Offset and length of what comes next."""
        header = bytearray(FRAME.size)
        self.fill(memoryview(header), position)
        offset, length = FRAME.unpack(header)
        return offset, length

    def fill(self, view: memoryview, position: int) -> None:
        """Receives into all of the view. Raises TimeoutError, EndedError."""
        while view:
            try:
                count = self.channel.recv_into(view)
            except ConnectionError:
                count = 0
            if count == 0:
                raise EndedError(position)
            view = view[count:]

    def said(self) -> str:
        """Why it ended, in its own words; without the addresses' queries, for they are signed."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LAST_WORDS_SECONDS)
        lines = os.pread(self._stderr, STDERR_BYTES, 0).decode(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        status = self._process.returncode
        ending = f", exit status {status}" if status else ""
        return shown(re.sub(r"\?[^\s)\"']+", "?...", words), 300) + ending


@contextmanager
def started(request: dict[str, object], ca_file: Path | None = None) -> Iterator[Child]:
    """A process for the request, killed when the block is left, whatever it does at that moment.

    It believes the authorities of ``ca_file`` beside the system's. Raises NoProcessError.
    """
    with ExitStack() as held:
        try:
            stderr = os.memfd_create("xet-stderr")
            held.callback(os.close, stderr)
            ours, theirs = socket.socketpair()
            held.enter_context(ours)
            with theirs:
                # Exec'ed by vfork: nothing of ours runs between, so gRPC's threads do no harm.
                process = subprocess.Popen(  # noqa: S603 - our own program
                    [sys.executable, "-P", "-m", "modelcached.sources.xet_child", str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=theirs.fileno(),
                    stderr=stderr,
                    cwd="/",
                    env=_environment(ca_file),
                    close_fds=True,
                )
        except OSError as error:
            raise NoProcessError(error.strerror or str(error)) from error
        held.callback(process.wait)
        held.callback(process.kill)
        with suppress(BrokenPipeError):  # it says why it has ended already
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
        yield Child(process, ours, stderr)


def _environment(ca_file: Path | None) -> dict[str, str]:
    """What hf_xet needs of ours, and what keeps it from calling home and from writing logs below $HOME."""
    kept = {name: value for name, value in os.environ.items() if _KEPT_VARIABLES.fullmatch(name)}
    if ca_file is not None:
        # It reads the directory beside the file only where both are named.
        kept = {"SSL_CERT_DIR": ssl.get_default_verify_paths().openssl_capath, **kept, "SSL_CERT_FILE": str(ca_file)}
    return {**kept, "HF_XET_TELEMETRY_ENABLED": "0", "HF_XET_LOG_DEST": "/dev/null", "RUST_LOG": "error"}

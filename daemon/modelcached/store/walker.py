"""Reads hub/ in a process of its own, while the daemon reads its records of it: two cores start a large cache sooner.

    python -m modelcached.store.walker PARENT_PID CACHE_DIR

It is told the folders on stdin and writes what ``scan_repo`` found of each, in their order, to stdout: ``marshal``,
which a process of the same interpreter reads at once. It only reads, and dies with its parent. It is never needed:
what it does not tell, for whatever reason, the daemon finds out by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

from modelcached.model import Digest, made, repo_id_of_folder
from modelcached.store.layout import Layout
from modelcached.store.mounts import is_mounted, mounts_below
from modelcached.store.scan import FoundBlob, FoundRepo, scan_repo

LEAST_FOLDERS = 100
"""Fewer are read before another process has begun."""
_PIPE_BYTES = 1 << 20
"""As much as a pipe may hold: about a hundred repositories."""
_AHEAD_BYTES = 8 << 20
"""As much is taken ahead of who asks, about eight hundred repositories: it reads on while the daemon is loaded. What is
not believed yet takes memory."""
_SIZE_BYTES = 8
"""Before each answer, little-endian: marshal reads a stream byte by byte."""
_PR_SET_PDEATHSIG = 1


class Walker:
    """Tells what is in each folder, asked for in order. Blocking: call it from disk threads. ``close`` must follow."""

    def __init__(self, layout: Layout, folders: Sequence[str], source: IO[bytes] | None = None) -> None:
        """``source``: where a process tells; without one it finds all out by itself."""
        self.folders = folders
        """In their order."""
        self._layout = layout
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = _Answers()
        self._told = source is not None
        if source is not None:
            # What is told is taken at once, so that the process need not wait for who has no time for it yet.
            self._reader = threading.Thread(target=self._read, args=(source,), name="walker", daemon=True)
            self._reader.start()

    @classmethod
    def begin(cls, layout: Layout, folders: Sequence[str]) -> Self:
        """With a process of its own from now on; without one where they are few, or the machine gives none."""
        process = _start(layout, folders) if len(folders) >= LEAST_FOLDERS else None
        if process is None:
            return cls(layout, folders)
        try:
            walker = cls(layout, folders, process.stdout)
        except RuntimeError:  # it gives no thread
            _end(process)
            return cls(layout, folders)
        walker._process = process
        return walker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._answers.end()  # who reads them may wait for room
            self._reader.join()
            _end(process)
            self._answers, self._told = _Answers(), False

    def found(self, folder: str, known: Mapping[str, Digest]) -> FoundRepo | None:
        """As ``scan_repo``; None also where the folder's name is no repository's."""
        repo_id = repo_id_of_folder(folder)
        if repo_id is None:
            return None
        if self._told:
            try:
                size = int.from_bytes(self._answers.take(_SIZE_BYTES), "little")
                told = marshal.loads(self._answers.take(size))  # noqa: S302 - our own process wrote it
            except (EOFError, ValueError, TypeError):
                self._told = False  # it ended before its time
            else:
                return None if told is None else _unpacked(FoundRepo(repo_id), told, known)
        return scan_repo(self._layout, repo_id, known)

    def _read(self, source: IO[bytes]) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):
                while chunk := source.read1(_PIPE_BYTES):  # type: ignore[attr-defined]
                    self._answers.put(chunk)
        finally:
            self._answers.end()  # nobody may wait for more


class _Answers:
    """What was told and not asked for yet: no more than _AHEAD_BYTES, or than somebody waits for."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._changed = threading.Condition()
        self._wanted = 0
        self._ended = False

    def put(self, chunk: bytes) -> None:
        """Waits for room."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or len(self._bytes) < max(_AHEAD_BYTES, self._wanted))
            self._bytes += chunk
            self._changed.notify_all()

    def end(self) -> None:
        """There is no more, or nobody wants more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self, size: int) -> bytes:
        """The next bytes. Raises EOFError where there are no more."""
        with self._changed:
            self._wanted = size
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or len(self._bytes) >= size)
            if len(self._bytes) < size:
                raise EOFError
            taken = bytes(self._bytes[:size])
            del self._bytes[:size]
            self._changed.notify_all()
            return taken


def hub_folders(layout: Layout) -> tuple[list[str], list[str]]:
    """Names in hub/; and paths of those that are a mount, or hold one, which are never entered."""
    mounts = mounts_below(layout.hub)
    names = sorted(os.listdir(layout.hub))
    mounted = [name for name in names if is_mounted(f"{layout.hub}/{name}", mounts)]
    return [name for name in names if name not in mounted], [f"{layout.hub}/{name}" for name in mounted]


def _start(layout: Layout, folders: Sequence[str]) -> subprocess.Popen[bytes] | None:
    argv = [sys.executable, "-P", "-m", __name__, str(os.getpid()), layout.cache_dir]
    try:
        # Exec'ed by vfork: nothing of ours runs between, so gRPC's threads do no harm.
        process = subprocess.Popen(  # noqa: S603 - our own program
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", env=_environment()
        )
    except OSError:
        return None
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(marshal.dumps(list(folders)))
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def _environment() -> dict[str, str]:
    """How Python finds its modules, and nothing that anybody might keep secret."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "LD_LIBRARY_PATH") or name.startswith(("PYTHON", "LC_"))
    }


def _packed(found: FoundRepo) -> Any:
    """In what ``marshal`` can write."""
    snapshots = {
        commit: {path: digest.hex for path, digest in links.items()} for commit, links in found.snapshots.items()
    }
    return (
        {digest.hex: tuple(blob) for digest, blob in found.blobs.items()},
        {digest.hex: target for digest, target in found.shared.items()},
        snapshots,
        (found.refs, found.trees, found.strangers, found.sizes, found.hollow),
    )


def _unpacked(found: FoundRepo, told: Any, known: Mapping[str, Digest]) -> FoundRepo:
    blobs, shared, snapshots, rest = told
    texts = {text for links in snapshots.values() for text in links.values()} | blobs.keys()
    digests = {text: known[text] for text in texts & known.keys()}
    digests |= Digest.parse_all(texts - digests.keys())
    found.blobs = {digests[text]: made(FoundBlob, blob) for text, blob in blobs.items()}
    found.shared = {digests[text]: target for text, target in shared.items()}
    found.snapshots = {
        commit: {sys.intern(path): digests[text] for path, text in links.items()} for commit, links in snapshots.items()
    }
    found.refs, found.trees, found.strangers, found.sizes, found.hollow = rest
    return found


def _die_with(parent: int) -> None:
    """It must not outlive its parent, not even one that was killed before this was asked for."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; it is the daemon's to heed


def main() -> None:
    """Answers for each folder that stdin names."""
    _die_with(int(sys.argv[1]))
    gc.disable()  # nothing here refers to itself
    layout, out = Layout(sys.argv[2]), sys.stdout.buffer
    for folder in marshal.load(sys.stdin.buffer):  # noqa: S302 - our own parent wrote it
        if (repo_id := repo_id_of_folder(folder)) is not None:
            found = scan_repo(layout, repo_id)
            told = marshal.dumps(None if found is None else _packed(found))
            out.write(len(told).to_bytes(_SIZE_BYTES, "little") + told)
            out.flush()


if __name__ == "__main__":
    main()

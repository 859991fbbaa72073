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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from modelcached.model import Digest, repo_id_of_folder
from modelcached.store.layout import Layout
from modelcached.store.scan import FoundBlob, FoundRepo, scan_repo

LEAST_FOLDERS = 100
"""Fewer are read before another process has begun."""
_PIPE_BYTES = 1 << 20
"""It need not wait for its reader: about forty repositories."""
_SIZE_BYTES = 8
"""Before each answer, little-endian: marshal reads a stream byte by byte."""
_PR_SET_PDEATHSIG = 1


class Walker:
    """Tells what is in each folder, asked for in order. Blocking: call it from disk threads."""

    def __init__(self, layout: Layout, source: IO[bytes] | None) -> None:
        self._layout = layout
        self._source = source

    def found(self, folder: str, known: Mapping[str, Digest]) -> FoundRepo | None:
        """As ``scan_repo``; None also where the folder's name is no repository's."""
        repo_id = repo_id_of_folder(folder)
        if repo_id is None:
            return None
        if self._source is not None:
            try:
                size = int.from_bytes(self._source.read(_SIZE_BYTES), "little")
                told = marshal.loads(self._source.read(size))  # noqa: S302 - our own process wrote it
            except (EOFError, ValueError, TypeError, OSError):
                self._source = None  # it ended before its time
            else:
                return None if told is None else _unpacked(FoundRepo(repo_id), told, known)
        return scan_repo(self._layout, repo_id, known)


@contextmanager
def walking(layout: Layout, folders: Sequence[str]) -> Iterator[Walker]:
    """A walker of those folders of hub/; without a process where they are few, or the machine gives none."""
    process = _start(layout, folders) if len(folders) >= LEAST_FOLDERS else None
    if process is None:
        yield Walker(layout, None)
        return
    assert process.stdout is not None
    try:
        yield Walker(layout, process.stdout)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


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
        [(digest.hex, *blob) for digest, blob in found.blobs.items()],
        {digest.hex: target for digest, target in found.shared.items()},
        snapshots,
        (found.refs, found.trees, found.strangers, found.sizes, found.hollow),
    )


def _unpacked(found: FoundRepo, told: Any, known: Mapping[str, Digest]) -> FoundRepo:
    blobs, shared, snapshots, rest = told
    texts = {text for links in snapshots.values() for text in links.values()} | {text for text, *_ in blobs}
    digests = {text: known[text] for text in texts & known.keys()}
    digests |= Digest.parse_all(texts - digests.keys())
    found.blobs = {digests[text]: FoundBlob._make(blob) for text, *blob in blobs}
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

"""Nothing but SQLite changes the disk below cache.dir past store/disk.py: the kernel's own word against the seam's.

A crash test that dies before every announced call has died everywhere only if this holds. Needs `strace`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hub import MIB, Hub, Synthetic
from tests.node.announcing import announcing
from tests.node.daemon import Node

ANNOUNCED_BY = {
    "open": {"create"},
    "openat": {"create"},
    "openat2": {"create"},
    "creat": {"create"},
    "mkdir": {"mkdir"},
    "mkdirat": {"mkdir"},
    "chmod": {"chmod"},
    "fchmod": {"chmod"},
    "fchmodat": {"chmod"},
    "fchmodat2": {"chmod"},
    "fallocate": {"allocate"},
    "ftruncate": {"truncate", "allocate"},
    "truncate": {"truncate"},
    "write": {"append"},
    "pwrite64": {"write"},
    "splice": {"write"},
    "rename": {"rename"},
    "renameat": {"rename"},
    "renameat2": {"rename", "exchange"},
    "link": {"link"},
    "linkat": {"link"},
    "symlink": {"symlink"},
    "symlinkat": {"symlink"},
    "unlink": {"unlink"},
    "unlinkat": {"unlink", "rmdir"},
    "rmdir": {"rmdir"},
    "fsync": {"fsync"},
    "fdatasync": {"fdatasync"},
    "fchown": {"chown"},
    "ioctl": {"clone"},
}
"""System call -> what the seam may have called it."""
NEVER = (
    *("writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "mknod", "mknodat", "sync", "syncfs"),
    *("chown", "lchown", "fchownat", "utime", "utimes", "futimesat", "utimensat"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "mmap"),
)
"""What changes a file too, and what the seam has no word for."""
_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_AT = re.compile(r'(?:\d+|AT_FDCWD)<(/[^>]*)>, "((?:[^"\\]|\\.)*)"')
_PATH = re.compile(r'"(/(?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"\b\d+<(/[^>]*)>")


@dataclass(frozen=True)
class Change:
    """A system call that changes something below cache.dir."""

    thread: str
    call: str
    paths: frozenset[str]
    line: str


def paths_of(arguments: str) -> frozenset[str]:
    """Every path that a call names, by descriptor or by name."""
    found = {os.path.normpath(os.path.join(directory, name)) for directory, name in _AT.findall(arguments)}
    rest = _AT.sub("", arguments)
    return frozenset(found | set(_PATH.findall(rest)) | set(_DESCRIPTOR.findall(rest)))


def changes(line: str, root: str) -> Change | None:
    """The change that a line of strace's tells of; SQLite's own files do not count."""
    match = _CALL.fullmatch(line)
    if match is None:  # the end of a call, a signal, an exit
        return None
    thread, call, arguments = match.groups()
    paths = paths_of(arguments)
    if call in ("write", "pwrite64", "writev", "pwritev", "pwritev2"):  # the content may say anything
        paths = frozenset(_DESCRIPTOR.findall(arguments)[:1])
    if call == "symlinkat":  # nor is what a link says a path that changes
        paths = frozenset(os.path.normpath(os.path.join(*pair)) for pair in _AT.findall(arguments))
    if call in ("open", "openat", "openat2") and not re.search(r"O_CREAT|O_TRUNC|O_TMPFILE", arguments):
        return None
    if call == "ioctl" and "FICLONE" not in arguments:
        return None
    if call == "mmap" and not ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments):
        return None
    below = frozenset(path for path in paths if f"{path}/".startswith(f"{root}/"))
    own = frozenset(path for path in below if not os.path.basename(path).startswith("state.db"))
    if call == "fdatasync":  # SQLite syncs the directory in which it has made its log
        own -= {f"{root}/modelcached"}
    return Change(thread, call, own, line) if own else None


def announcement(line: str, file: Path) -> tuple[str, str, str] | None:
    """Thread, operation and path of what the seam has announced."""
    match = re.fullmatch(rf'(\d+) +write\(\d+<{re.escape(str(file))}>, "(\w+) (.*)\\n", \d+.*', line)
    return (match[1], match[2], match[3]) if match else None


def read_trace(trace: Path) -> Iterator[str]:
    with trace.open(errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def wait_until_ended(node: Node, trace: Path) -> None:
    """The daemon has ended, and strace has written all that it saw of it."""
    assert node.process is not None
    end = re.compile(rf"^{node.process.pid} +\+\+\+ ", re.MULTILINE)
    node.wait_until(lambda: end.search(trace.read_text(errors="replace")), 20, "strace has seen the daemon's end")


def test_every_change_below_the_cache_directory_is_announced(
    hub: Hub,
    make_node: Callable[..., Node],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    weights = Synthetic(5 * MIB, seed=1)
    hub.create_repo("org/model").commit(
        {"config.json": b"{}", "model.safetensors": weights, "nested/deep/tokenizer.json": b"[]", "notes.txt": b"x"}
    )
    hub.create_repo("org/other").commit({"config.json": b"[]", "model.safetensors": weights})
    own = Synthetic(5 * MIB, seed=2)
    hub.create_repo("org/given").commit({"config.json": b"{}", "model.safetensors": own})
    given = tmp_path / "given"
    given.mkdir()
    (given / "config.json").write_bytes(b"{}")
    (given / "model.safetensors").write_bytes(b"".join(own.blocks()))
    os.chown(given / "model.safetensors", 65534, 65534)
    node = make_node()
    trace, ended, announced = tmp_path / "trace", tmp_path / "second trace", tmp_path / "announced"
    calls = ",".join(f"?{call}" for call in (*ANNOUNCED_BY, *NEVER))
    # -D: the daemon is our child and strace its own, so that signals and the end are the daemon's.
    node.wrapper = ["strace", "-D", "-f", "-y", "-s", "512", "-o", str(trace), "-e", f"trace={calls}"]
    node.program = announcing(announced)
    node.start()
    node.ensure("org/model", "--include", "*.json")
    node.ensure("--profile", "full", "org/model")
    node.ensure("--profile", "full", "org/other")
    node.release_all()
    node.ctl("evict", "org/model", "--yes")
    node.ensure("--profile", "full", "org/model")
    node.ctl("import", str(given), "org/given", "--move", "--yes")
    node.kill()
    (node.private / "staging" / "left").mkdir()
    (node.private / "staging" / "left" / "file").touch()
    wait_until_ended(node, trace)
    node.wrapper[node.wrapper.index(str(trace))] = str(ended)
    node.start()
    node.release_all()
    node.ctl("evict", "org/other", "--yes")
    assert node.terminate() == 0
    wait_until_ended(node, ended)

    root = str(node.cache_dir)
    bypasses, matched, told = [], Counter[str](), Counter[str]()
    for file in (trace, ended):
        last: dict[str, tuple[str, str]] = {}
        for line in read_trace(file):
            if (heard := announcement(line, announced)) is not None:
                thread, operation, path = heard
                last[thread] = (operation, path)
                told[f"{operation} {path}"] += 1
                continue
            change = changes(line, root)
            if change is None:
                continue
            operation, path = last.get(change.thread, ("", ""))
            if operation in ANNOUNCED_BY.get(change.call, ()) and path in change.paths:
                matched[f"{operation} {path}"] += 1
            else:
                bypasses.append(f"{change.line}\n    behind {operation} {path}")
    assert not bypasses, "\n".join(["changed without a word:", *bypasses])
    inside = f" {root}/"  # what an import removes lies elsewhere
    told = Counter({line: count for line, count in told.items() if inside in line})
    lines = Counter(line for line in announced.read_text().splitlines() if inside in line)
    assert told == lines, "strace has heard what the daemon wrote"
    assert not lines.keys() - matched.keys(), "what is announced is done"
    verbs = {line.partition(" ")[0] for line in lines}
    seldom = {"fdatasync"}  # checkpoints are 256 MiB or ten seconds apart
    assert verbs >= set().union(*ANNOUNCED_BY.values()) - seldom, "the run had each kind of call"
    record_property("count", f"system calls below cache.dir that change something, all announced: {matched.total()}")

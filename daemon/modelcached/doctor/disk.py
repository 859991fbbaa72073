"""The cache directory: whose it is, who can read it, what its filesystem can do, and whether it fits. Blocking."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator

from modelcached.cache.core import KUBELET_DELETES_BELOW
from modelcached.doctor.access import closed_on_the_way, mode_of
from modelcached.doctor.finding import Finding, failure, ok, warning
from modelcached.ledger.space import Space
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.measure import Filesystem, filesystem
from modelcached.store.mounts import kind_of, remote_kind
from modelcached.units import format_size

_FICLONE = 0x40049409
"""ioctl_ficlonerange(2): _IOW(0x94, 9, int)."""
_PROBE_BYTES = 4096
_CANNOT = {
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EXDEV,
    errno.ENOTTY,
    errno.ENOLCK,
}
"""How filesystems say that they have no such thing."""


def owner(layout: Layout) -> Finding:
    """Whose the directory is."""
    uid = os.stat(layout.cache_dir).st_uid
    who = f"{layout.cache_dir} is uid {uid}'s, mode {mode_of(layout.cache_dir):04o}"
    if uid != os.geteuid():
        return warning("directory", f"{who}; the daemon runs as uid {os.geteuid()}", "chown it to the daemon's user")
    return ok("directory", who)


def readers(layout: Layout) -> Finding:
    """Whether another user, as workloads are, gets through to a model."""
    if not mode_of(layout.hub) & stat.S_IROTH or not mode_of(layout.hub) & stat.S_IXOTH:
        text = f"{layout.hub} has mode {mode_of(layout.hub):04o}: workloads of other users cannot list it"
        return failure("readers", text, f"chmod o+rx {layout.hub}")
    if (closed := closed_on_the_way(layout.hub)) is not None:
        text = f"{closed} has mode {mode_of(closed):04o}: workloads of other users cannot read models through it"
        return warning("readers", text, f"chmod o+x {closed}, unless workloads mount hub/ itself")
    blob = _a_blob(layout)
    if blob is not None and not mode_of(blob) & stat.S_IROTH:
        return failure("readers", f"{blob} cannot be read by other users", f"chmod a+r {os.path.dirname(blob)}/*")
    return ok("readers", f"any user can read {layout.hub}")


def _a_blob(layout: Layout) -> str | None:
    for folder in os.listdir(layout.hub):
        with contextlib.suppress(OSError):
            directory = f"{layout.hub}/{folder}/blobs"
            if folder.startswith("models--") and (names := os.listdir(directory)):
                return f"{directory}/{names[0]}"
    return None


def abilities(disk: Disk, layout: Layout) -> Iterator[Finding]:
    """What the filesystem can do, tried out in a directory of its own out of readers' sight."""
    kind = kind_of(layout.cache_dir) or "unknown"
    probe = layout.staged("doctor")
    disk.mkdir(probe)
    try:
        found = {
            "hard links": _can(lambda: _link(disk, probe)),
            "fallocate": _can(lambda: _fallocate(probe)),
            "exchange": _can(lambda: _exchange(disk, probe)),
            "flock": _can(lambda: _flock(probe)),
            "reflink": _can(lambda: _reflink(probe)),
        }
    except OSError as error:
        yield failure("filesystem", f"{kind}: nothing can be written: {error}", "see the kernel's log: is it full?")
        return
    finally:
        with contextlib.suppress(OSError):
            disk.remove_tree(probe)
    lacking = [name for name, there in found.items() if not there]
    text = f"{kind}; {', '.join(name for name, there in found.items() if there)}"
    vital = [name for name in lacking if name in ("hard links", "flock")]
    if vital:
        yield failure("filesystem", f"{text}; no {', no '.join(vital)}", "put cache.dir on ext4, XFS or btrfs")
    elif "fallocate" in lacking or "exchange" in lacking:
        what = {"fallocate": "reservations are soft", "exchange": "a model that grows is out of sight for a moment"}
        costs = "; ".join(what[name] for name in ("fallocate", "exchange") if name in lacking)
        yield warning("filesystem", f"{text}; {costs}", "put cache.dir on ext4, XFS or btrfs")
    else:
        yield ok("filesystem", text)
    if (remote := remote_kind(layout.cache_dir)) is not None:
        yield warning(
            "filesystem",
            f"{remote} may be changed by other machines without this kernel's knowing: hub/ is polled, not watched",
            "let no other node write there",
        )


def _can(attempt: Callable[[], bool | None]) -> bool:
    """False where the filesystem says that it has no such thing. Raises OSError for everything else."""
    try:
        return attempt() is not False
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise


def _file(probe: str, name: str) -> int:
    return os.open(f"{probe}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _link(disk: Disk, probe: str) -> None:
    os.close(_file(probe, "one"))
    disk.link(f"{probe}/one", f"{probe}/two")


def _fallocate(probe: str) -> None:
    descriptor = _file(probe, "space")
    try:
        os.posix_fallocate(descriptor, 0, _PROBE_BYTES)
    finally:
        os.close(descriptor)


def _exchange(disk: Disk, probe: str) -> bool:
    for name in ("this", "that"):
        os.mkdir(f"{probe}/{name}")
    return disk.exchange(f"{probe}/this", f"{probe}/that")


def _flock(probe: str) -> None:
    descriptor = _file(probe, "lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _reflink(probe: str) -> None:
    source, target = _file(probe, "source"), _file(probe, "target")
    try:
        os.write(source, b"x" * _PROBE_BYTES)
        fcntl.ioctl(target, _FICLONE, source)
    finally:
        os.close(source)
        os.close(target)


def space(layout: Layout, books: Space, kubelet: str | None) -> Iterator[Finding]:
    """Whether the budget is there, and what others on the filesystem want."""
    disk, limits = filesystem(layout.cache_dir), books.limits
    reach = books.used_bytes + disk.free_bytes - limits.min_free_bytes
    budget = format_size(limits.budget_bytes)
    if reach < limits.budget_bytes:
        yield warning(
            "budget",
            f"cache.budget is {budget}, and only {format_size(max(0, reach))} can be had: "
            f"{format_size(disk.free_bytes)} are free, of which {format_size(limits.min_free_bytes)} are kept",
            "lower cache.budget, or make room on the filesystem",
        )
    else:
        yield ok("budget", f"{budget}, {format_size(books.used_bytes)} of it used; all of it can be had")
    yield from _inodes(disk, limits.min_free_inodes)
    yield _beside_kubelet(disk, limits.min_free_bytes, kubelet)


def _inodes(disk: Filesystem, kept: int) -> Iterator[Finding]:
    if disk.inodes is None or disk.free_inodes is None:
        return
    text = f"{disk.free_inodes:,} of {disk.inodes:,} inodes are free, {kept:,} of them kept"
    if disk.free_inodes <= kept:
        yield failure("inodes", f"{text}: nothing new is admitted", "remove small files of others, or evict models")
    else:
        yield ok("inodes", text)


def _beside_kubelet(disk: Filesystem, min_free: int, kubelet: str | None) -> Finding:
    if kubelet is None:
        return ok("kubelet's disk", "the kubelet and container runtimes are on other filesystems, or there are none")
    least = int(disk.size_bytes * KUBELET_DELETES_BELOW)
    if min_free < least:
        return warning(
            "kubelet's disk",
            f"{kubelet} is on the same filesystem, and cache.min_free ({format_size(min_free)}) is below the "
            f"{format_size(least)} (15 %) at which the kubelet deletes images",
            "raise cache.min_free, or leave it at auto",
        )
    return ok("kubelet's disk", f"{kubelet} is on the same filesystem; {format_size(min_free)} are left to it")

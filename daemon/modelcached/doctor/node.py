"""The machine round the cache: inotify, the kubelet's pods, SELinux, memory, sockets. Blocking."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from modelcached.config import ServerSection
from modelcached.doctor.access import closed_on_the_way, mode_of
from modelcached.doctor.finding import Finding, failure, ok, skipped, warning
from modelcached.sources.folder import repositories
from modelcached.store.layout import Layout
from modelcached.store.memory import number_in, smallest_limit_bytes
from modelcached.units import format_size

_WATCHES_A_REPO = 4
"""The repository's own directory, blobs/, snapshots/, refs/; more where refs have folders."""


def inotify(layout: Layout, polling: str, proc: str = "/proc") -> Finding:
    """Whether what others change in hub/ is told at once."""
    most = number_in(f"{proc}/sys/fs/inotify/max_user_watches")
    instances = number_in(f"{proc}/sys/fs/inotify/max_user_instances")
    wanted = _WATCHES_A_REPO * (len(os.listdir(layout.hub)) + 1)
    limits = f"max_user_watches {most}, max_user_instances {instances}"
    if polling:
        return warning(
            "inotify",
            f"hub/ is polled every few seconds: {polling}",
            "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches (sysctl)",
        )
    if most is not None and wanted > most:
        text = f"{wanted} directories are to be watched; {limits}"
        return warning("inotify", text, "raise fs.inotify.max_user_watches (sysctl)")
    return ok("inotify", f"hub/ is watched; {limits}")


def pods(path: Path | None, *, healthy: bool, leases: int) -> Finding:
    """Whether leases of pods can be granted, and end."""
    if path is None:
        return skipped("pods", "leases.kubelet_pods_dir is not set: no lease ends with its pod")
    try:
        there = len(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return skipped("pods", f"{path} is not there: no pod leases are granted", "in Kubernetes, mount it read-only")
    except OSError as error:
        mend = "mount it so that the daemon may read it; under systemd: systemd-tmpfiles --create modelcached.conf"
        return failure("pods", f"{path} cannot be listed: {error.strerror}", mend)
    if not healthy:
        mend = "is it the kubelet's own, with mountPropagation HostToContainer? cachectl release ends leases by hand"
        return failure("pods", f"{path} shows no pod that is known to be there: {leases} pod leases do not end", mend)
    return ok("pods", f"{path} shows {there} pods")


def directories(paths: Iterable[Path]) -> Iterator[Finding]:
    """Whether what sources.directories names can be looked into, and holds models."""
    for path in paths:
        try:
            models = repositories(path)
        except OSError as error:
            mend = "in Kubernetes, mount it into the daemon's pod"
            yield failure("directories", f"{path} cannot be listed: {error.strerror}", mend)
            continue
        if models:
            yield ok("directories", f"{path} has {models} models")
        else:
            mend = "it must be a cache of huggingface_hub's (HF_HOME, or its hub) or have org/name below it"
            yield warning("directories", f"{path} has no models", mend)


def selinux(root: str = "/sys/fs/selinux") -> Finding:
    """Which mode is in force."""
    enforcing = number_in(f"{root}/enforce")
    if enforcing is None:
        return ok("SELinux", "not in use")
    if enforcing:
        return warning(
            "SELinux",
            "enforcing: containers read a hostPath only with a label that allows it",
            "label the cache container_file_t (see docs/operations.md); this is not tested",
        )
    return ok("SELinux", "permissive")


def memory() -> Finding:
    """Page cache is charged to who touches it first: a limit on the daemon is one on what it has just written."""
    try:
        limit = smallest_limit_bytes()
    except OSError as error:
        return skipped("memory", f"the kernel does not tell: {error}")
    if limit is not None:
        return warning(
            "memory",
            f"a control group limits the daemon to {format_size(limit)}, and what it writes counts against it",
            "set no memory limit on the daemon (docs/design.md, Memory)",
        )
    return ok("memory", "no control group limits the daemon")


def sockets(section: ServerSection) -> list[Finding]:
    """Whether workloads get to theirs, and only operators to the other."""
    found = []
    for name, path in (("workloads' socket", section.cache_socket), ("operators' socket", section.admin_socket)):
        try:
            mode = mode_of(str(path))
        except OSError as error:
            found.append(failure(name, f"{path}: {error.strerror}", "restart the daemon"))
            continue
        closed = closed_on_the_way(str(path.parent))
        if name.startswith("workloads") and not mode & stat.S_IWOTH:
            found.append(warning(name, f"{path} has mode {mode:04o}: only its owner's workloads can ask", "chmod 0666"))
        elif name.startswith("workloads") and closed is not None:
            text = f"{closed} cannot be entered by other users"
            found.append(warning(name, text, f"chmod o+x {closed}, or mount {path.parent} into workloads"))
        elif name.startswith("operators") and mode & stat.S_IWOTH:
            text = f"{path} has mode {mode:04o}: any user may evict"
            found.append(warning(name, text, "set server.admin_socket_mode to 0600"))
        else:
            found.append(ok(name, f"{path}, mode {mode:04o}"))
    return found


def troubles(degraded: Collection[str]) -> list[Finding]:
    """What the daemon itself says."""
    if not degraded:
        return [ok("daemon", "nothing is degraded")]
    return [failure("daemon", text, "") for text in degraded]

"""Who else lives on the cache's filesystem and acts when it fills: the kubelet deletes images, then evicts pods."""

from __future__ import annotations

import os
from collections.abc import Iterable

KUBELET_DIRECTORIES = (
    "/var/lib/kubelet",
    "/var/lib/containerd",
    "/var/lib/rancher",
    "/var/lib/docker",
    "/dev/termination-log",
)
"""Of the kubelet and of container runtimes: nodefs and imagefs, in its words.

The last is what a container sees of the kubelet's where nothing else is mounted: a file of its own pods directory
(kuberuntime_container.go, makeMounts).
"""


def kubelet_directory(path: str, others: Iterable[str]) -> str | None:
    """The first of the others that is on path's filesystem; None where none is, or can be seen."""
    device = os.stat(path).st_dev
    for other in others:
        try:
            if os.stat(other).st_dev == device:
                return other
        except OSError:
            continue
    return None

"""What is left to others on the filesystem, in inodes: bytes are tested where a daemon is asked for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelcached.cache.core import SET_ASIDE_INODES
from modelcached.config import Config
from modelcached.store.measure import Filesystem

from tests.node.core import a_core

TB = 10**12


@pytest.mark.parametrize(
    ("inodes", "kubelet", "kept"),
    [
        (1_000_000, "/var/lib/kubelet", 60_000),
        (1_000_000, None, SET_ASIDE_INODES),
        (100, "/var/lib/kubelet", SET_ASIDE_INODES),
        (None, "/var/lib/kubelet", SET_ASIDE_INODES),
    ],
)
def test_inodes_are_left_to_the_kubelet_and_to_the_daemon_itself(
    tmp_path: Path, inodes: int | None, kubelet: str | None, kept: int
) -> None:
    with a_core(tmp_path, []) as core:
        core.apply_limits(Config().cache, Filesystem(TB, TB, inodes, inodes), kubelet)
        assert core.space.limits.min_free_inodes == kept

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


async def test_a_kubelet_that_comes_later_is_left_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pods = tmp_path / "pods"
    monkeypatch.setattr("modelcached.cache.core.KUBELET_DIRECTORIES", (str(pods),))
    with a_core(tmp_path, []) as core:
        core.apply_limits(core.config.cache, await core.filesystem(), core.kubelet())
        alone = core.space.limits.min_free_bytes
        pods.mkdir()
        await core.look_for_kubelet()
        assert core.space.limits.min_free_bytes > alone
        pods.rmdir()
        await core.look_for_kubelet()
        assert core.space.limits.min_free_bytes == alone

"""The kubelet's pods directory: when an absence there means anything, after a restart of the daemon too."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelcached.upkeep.pods import PodsDirectory

KNOWN = frozenset({"known"})


class Restarting:
    """A daemon's look at a directory, and what is left of it for the next daemon."""

    def __init__(self) -> None:
        self.remembered: list[str] = []

    def start(self, path: Path | None, *, boot: str = "boot-1", own: str = "") -> PodsDirectory:
        proven = self.remembered[-1] if self.remembered else ""
        return PodsDirectory(path, own, boot_id=boot, proven=proven, remember=self.remembered.append)


@pytest.fixture
def daemon() -> Restarting:
    return Restarting()


@pytest.fixture
def pods(tmp_path: Path) -> Path:
    (tmp_path / "pods" / "known").mkdir(parents=True)
    (tmp_path / "pods" / "stranger").mkdir()
    return tmp_path / "pods"


def test_a_directory_of_strangers_proves_nothing_until_a_known_pod_is_seen(daemon: Restarting, pods: Path) -> None:
    directory = daemon.start(pods)
    assert not directory.look(frozenset({"gone"})).healthy
    assert directory.look(KNOWN).healthy
    (pods / "known").rmdir()
    assert directory.look(KNOWN).healthy, "it is the same directory still"


def test_our_own_pod_proves_it_too(daemon: Restarting, pods: Path) -> None:
    assert daemon.start(pods, own="stranger").look(frozenset({"gone"})).healthy


def test_the_grant_of_a_lease_proves_it_before_anybody_has_looked(daemon: Restarting, pods: Path) -> None:
    directory = daemon.start(pods)
    assert [directory.seen(uid) for uid in ("", ".", "..", "absent")] == [False] * 4
    assert daemon.remembered == []
    assert directory.seen("known")
    assert len(daemon.remembered) == 1
    directory.look(KNOWN)
    assert len(daemon.remembered) == 1, "once is enough"


def test_what_cannot_be_looked_at_is_not_seen(daemon: Restarting, pods: Path) -> None:
    """As in a directory that may not be searched, which root may; the kernel refuses so long a name to anybody."""
    assert not daemon.start(pods).seen("x" * 300)


def test_the_same_directory_is_believed_after_a_restart(daemon: Restarting, pods: Path) -> None:
    daemon.start(pods).seen("known")
    (pods / "known").rmdir()
    seen = daemon.start(pods).look(KNOWN)
    assert (seen.healthy, seen.uids) == (True, {"stranger"})


def test_another_directory_in_its_place_is_not_nor_is_an_empty_one(daemon: Restarting, pods: Path) -> None:
    daemon.start(pods).seen("known")
    kept = pods.rename(pods.with_name("kept"))
    (pods / "stranger").mkdir(parents=True)
    assert not daemon.start(pods).look(KNOWN).healthy
    for name in ("known", "stranger"):
        (kept / name).rmdir()
    assert not daemon.start(kept).look(KNOWN).healthy
    assert not daemon.start(kept / "none").look(KNOWN).healthy
    assert not daemon.start(None).look(KNOWN).healthy


def test_another_boot_proves_it_anew(daemon: Restarting, pods: Path) -> None:
    daemon.start(pods).seen("known")
    (pods / "known").rmdir()
    assert not daemon.start(pods, boot="boot-2").look(KNOWN).healthy

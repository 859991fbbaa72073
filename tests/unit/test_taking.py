"""A file that lies on this machine is the cache's without a copy, and never while somebody else may write it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from modelcached.model import Algorithm, Digest, RepoId
from modelcached.store.disk import Disk
from modelcached.store.layout import Layout
from modelcached.store.owner import prepare
from modelcached.store.partials import PartialStore
from modelcached.store.taking import Taken, TakenAwayError

CONTENT = bytes(n % 251 for n in range(100_000))
DIGEST = Digest(Algorithm.SHA256, hashlib.sha256(CONTENT).hexdigest())
REPO = RepoId("org/name")
STRANGER = 65534


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(str(tmp_path / "cache"))
    prepare(Disk(), made)
    return made


@pytest.fixture
def store(layout: Layout) -> PartialStore:
    return PartialStore(Disk(), layout, "this boot")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def take(store: PartialStore, mine: Path) -> Callable[..., Taken | None]:
    def taken(path: Path = mine, *, moves: bool = True) -> Taken | None:
        return store.take(DIGEST, len(CONTENT), str(path), moves=moves)

    return taken


def staged(layout: Layout) -> list[str]:
    return os.listdir(layout.staging)


def read(taken: Taken) -> bytes:
    view = memoryview(bytearray(len(CONTENT)))
    assert taken.read(view, 0) == len(CONTENT)
    return bytes(view)


def test_what_is_given_away_becomes_the_blob_itself(
    layout: Layout, mine: Path, take: Callable[..., Taken | None]
) -> None:
    os.chown(mine, STRANGER, STRANGER)
    mine.chmod(0o640)
    Path(layout.partial_data(DIGEST)).touch()
    Path(layout.partial_journal(DIGEST)).touch()
    taken = take()
    assert taken is not None
    assert read(taken) == CONTENT
    assert taken.allocated() == {mine.stat().st_ino: mine.stat().st_blocks * 512}
    status = taken.publish(REPO)
    taken.close()
    blob = Path(layout.blob(REPO, DIGEST))
    assert (blob.stat().st_ino, status.st_ino) == (mine.stat().st_ino,) * 2
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (os.geteuid(), os.getegid(), 0o444)
    assert blob.read_bytes() == CONTENT
    assert os.listdir(layout.partial) == staged(layout) == [], "what an earlier try left is not wanted"


def test_until_it_is_published_nothing_of_it_has_changed(
    layout: Layout, mine: Path, take: Callable[..., Taken | None]
) -> None:
    os.chown(mine, STRANGER, STRANGER)
    mine.chmod(0o640)
    before = mine.stat()
    taken = take()
    assert taken is not None
    assert len(staged(layout)) == 1
    taken.close()
    after = mine.stat()
    assert staged(layout) == []
    assert (after.st_uid, after.st_mode, after.st_mtime_ns, after.st_nlink) == (
        before.st_uid,
        before.st_mode,
        before.st_mtime_ns,
        1,
    )


def test_a_link_is_followed_to_the_file(mine: Path, layout: Layout, take: Callable[..., Taken | None]) -> None:
    link = mine.with_name("link")
    link.symlink_to(mine.name)
    taken = take(link)
    assert taken is not None
    assert taken.publish(REPO).st_ino == mine.stat().st_ino
    taken.close()
    assert link.is_symlink()


def test_what_has_another_name_is_not_only_theirs_who_give_it_away(
    mine: Path, layout: Layout, take: Callable[..., Taken | None]
) -> None:
    os.link(mine, mine.with_name("another"))
    assert take() is None
    assert staged(layout) == []


def test_what_somebody_has_open_for_writing_is_copied(
    layout: Layout, mine: Path, take: Callable[..., Taken | None]
) -> None:
    with mine.open("r+b"):
        assert take() is None
    assert staged(layout) == []
    assert take() is not None


def test_who_opens_it_for_writing_meanwhile_is_seen(
    layout: Layout, mine: Path, take: Callable[..., Taken | None]
) -> None:
    taken = take()
    assert taken is not None
    with pytest.raises(BlockingIOError):  # the kernel tells us first; whoever can wait would
        os.open(mine, os.O_RDWR | os.O_NONBLOCK)
    with pytest.raises(TakenAwayError):
        taken.publish(REPO)
    taken.close()
    assert staged(layout) == []
    assert not os.path.lexists(layout.blob(REPO, DIGEST))


@pytest.mark.parametrize(
    ("mode", "owner", "linked"),
    [(0o444, None, True), (0o555, None, True), (0o644, None, False), (0o400, None, False), (0o444, STRANGER, False)],
    ids=["read-only", "executable", "its owner may write", "not for everybody", "another's"],
)
def test_what_is_not_given_away_is_linked_only_where_nothing_about_it_changes(
    mine: Path, take: Callable[..., Taken | None], layout: Layout, mode: int, owner: int | None, linked: bool
) -> None:
    mine.chmod(mode)
    if owner is not None:
        os.chown(mine, owner, owner)
    taken = take(moves=False)
    assert (taken is not None) is linked
    assert len(staged(layout)) == linked


def test_what_is_no_file_or_has_another_size_is_not_taken(
    tmp_path: Path, layout: Layout, take: Callable[..., Taken | None]
) -> None:
    fifo, short = tmp_path / "fifo", tmp_path / "short"
    os.mkfifo(fifo)
    short.write_bytes(CONTENT[:-1])
    assert take(fifo) is take(short) is take(tmp_path) is take(tmp_path / "none") is None
    assert staged(layout) == []

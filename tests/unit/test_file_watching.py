"""Files that change beside their links: who follows one is told of it, of nothing else, and no longer than it wants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelcached.upkeep import file_watch
from modelcached.upkeep.file_watch import FileWatcher

SECONDS = 10.0


def write(file: Path, text: str) -> None:
    file.write_text(text)


class Told:
    """What a follower was told, as something to wait for."""

    def __init__(self) -> None:
        self.times = 0
        self._news = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self._news.set()

    async def again(self) -> None:
        await asyncio.wait_for(self._news.wait(), SECONDS)
        self._news.clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "..1").mkdir()
    (tmp_path / "..1" / "models.yaml").write_text("models: []")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "models.yaml").symlink_to("..data/models.yaml")
    return tmp_path / "models.yaml"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text("")
    return tmp_path / "config.toml"


@pytest.fixture
async def watcher() -> Iterator[FileWatcher]:  # type: ignore[misc]
    watcher = FileWatcher()
    yield watcher  # type: ignore[misc]
    watcher.stop()


async def test_a_swapped_link_is_told_and_so_is_what_changed_before(file: Path, watcher: FileWatcher) -> None:
    told = Told()
    watcher.follow("list", file, told)
    await told.again()  # it may have changed since it was read
    (file.parent / "..2").mkdir()
    (file.parent / "..2" / "models.yaml").write_text("models: [{repo: org/name}]")
    (file.parent / "..data_tmp").symlink_to("..2")
    (file.parent / "..data_tmp").rename(file.parent / "..data")
    await told.again()


async def test_two_files_in_one_directory_are_told_apart(file: Path, other: Path, watcher: FileWatcher) -> None:
    lists, settings = Told(), Told()
    watcher.follow("list", file, lists)
    watcher.follow("configuration", other, settings)
    await asyncio.gather(lists.again(), settings.again())
    write(other, "[log]\n")
    await settings.again()
    assert (lists.times, settings.times) == (1, 2)
    watcher.follow("list", None, lists)
    write(file, "models: [{repo: org/name}]")
    write(other, "[log]\nlevel = 'info'\n")
    await settings.again()  # the other goes on
    assert lists.times == 1, "and who has ended is told no more"


async def test_another_file_takes_the_place_of_the_one_before(file: Path, tmp_path: Path, watcher: FileWatcher) -> None:
    told = Told()
    watcher.follow("list", file, told)
    await told.again()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    watcher.follow("list", elsewhere / "models.yaml", told)
    (elsewhere / "models.yaml").write_text("models: []")
    await told.again()
    watcher.follow("list", elsewhere / "models.yaml", told)
    assert told.times == 2, "the same file again is nothing new"


async def test_what_cannot_be_watched_is_no_error(tmp_path: Path, file: Path, watcher: FileWatcher) -> None:
    told = Told()
    watcher.follow("list", tmp_path / "none" / "models.yaml", told)
    watcher.follow("list", file, told)
    await told.again()


async def test_nothing_is_told_after_the_end(file: Path) -> None:
    watcher, told = FileWatcher(), Told()
    watcher.follow("list", file, told)
    watcher.stop()
    await asyncio.sleep(file_watch._SETTLE_SECONDS * 2)
    assert told.times == 0

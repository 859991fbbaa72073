"""Fixtures: processes, the states that protocols begin with, and the counts that a reader of the log wants to see."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .zygote import Zygote

MEMORY = "/dev/shm"


@pytest.fixture(scope="package")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a thousand states of a small disk wait for no platter."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent, prefix="modelcached-crash-") as path:
        yield Path(path)


@pytest.fixture
def base(zygote: Zygote) -> Callable[[str, Path], Path]:
    """The state of the disk that a protocol begins with, below a directory."""

    def make(name: str, work: Path) -> Path:
        path = work / "base"
        path.mkdir()
        zygote.run("prepare", name=name, cache_dir=str(path))
        return path

    return make

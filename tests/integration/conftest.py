"""Fixtures: a test Hub, and a node whose daemon ends with the test."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import MIB, Hub
from tests.node import Node
from tests.node.canary import Canary, assert_log_is_clean, fingerprint


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A test Hub of its own for each test."""
    with Hub() as running:
        yield running


@pytest.fixture
def make_node(tmp_path: Path, hub: Hub) -> Iterator[Callable[..., Node]]:
    """Makes nodes (not started) that ask the test Hub: ``make_node(cache={"budget": "1GB"})``."""
    nodes: list[Node] = []

    def make(**settings: Any) -> Node:
        node = Node(tmp_path / f"node{len(nodes)}", hub.endpoint, settings)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.stop()


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """A node with a daemon that serves."""
    return make_node().start()


@pytest.fixture
def small_disk(make_node: Callable[..., Node]) -> Iterator[Node]:
    """A node whose cache directory is a filesystem of 64 MiB that others use too."""
    node = make_node(cache={"budget": "1GB", "min_free": f"{16 * MIB}B"})
    node.cache_dir.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(node.cache_dir)], check=True)
    yield node.start()
    node.stop()
    subprocess.run(["umount", "--lazy", str(node.cache_dir)], check=True)


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    root = tmp_path / "canary"
    (root / "etc" / "deep").mkdir(parents=True)
    (root / "etc" / "passwd").write_text("root:x:0:0\n")
    (root / "etc" / "deep" / "config.json").write_text("{}")
    return Canary(root, fingerprint(root))


@pytest.fixture
def guarded(node: Node, canary: Canary) -> Iterator[Node]:
    """A serving node whose canary is unchanged, and whose log is clean, after the test."""
    yield node
    node.stop()
    canary.assert_untouched()
    assert_log_is_clean(node)

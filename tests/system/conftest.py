"""The fixtures of the integration tests, for tests that need more than Python on the machine; and disks that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub
from tests.integration.conftest import hub, make_node, node
from tests.node import Node
from tests.node.disks import Disk, enter_private_mounts
from tests.node.kubelet import Kubelet
from tests.node.podman import Podman
from tests.node.standing import SIZE, Standing
from tests.system.images import Images

__all__ = ["hub", "make_node", "node"]


@pytest.fixture(scope="session")
def private_mounts() -> None:
    """What is mounted from here on is seen by this run alone, and ends with it even if it is killed."""
    enter_private_mounts()


@pytest.fixture
def stand_on(private_mounts: None, hub: Hub, make_node: Callable[..., Node]) -> Iterator[Callable[..., Standing]]:
    """A serving node with its cache on the disk: ``stand_on(disk, "one", "two")`` has these models cached and leased.

    Other settings as for ``make_node``. The daemon ends before its disk does.
    """
    with ExitStack() as stack:

        def stand(disk: Disk, *kept: str, size_bytes: int = SIZE, **settings: dict[str, Any]) -> Standing:
            stack.enter_context(disk)
            cache = {"dir": str(disk.path), "budget": "1GB", "min_free": "0B", **settings.pop("cache", {})}
            node = make_node(cache=cache, **settings).start()
            stack.callback(node.stop)
            standing = Standing(node, hub)
            standing.keep(*kept, size_bytes=size_bytes)
            return standing

        yield stand


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """With a store of its own, which goes with the run."""
    running = Podman()
    yield running
    running.close()


@pytest.fixture(scope="session")
def images(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The daemon's and the client's, built once a run: a minute and a half."""
    built = Images(podman)
    built.build(tmp_path_factory.mktemp("images"))
    return built


@pytest.fixture
def kubelet(images: Images, tmp_path: Path) -> Iterator[Kubelet]:
    """A node with both images, and no pod."""
    running = Kubelet(tmp_path / "node", images.podman)
    yield running
    running.stop()

"""A test Hub, a node that serves, and pods on it; and how often starts are timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub import Hub
from tests.hub.models import tiny_llama
from tests.integration.conftest import hub, make_node, node
from tests.node import Node
from tests.vllm.models import tiny_adapter
from tests.vllm.pod import CONSUMER, ROOT, Pod

__all__ = ["hub", "make_node", "node"]

BASE, ADAPTER = "org/tiny", "org/adapter"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make system-vllm` names the rounds."""
    group = parser.getgroup("vllm", "the real vLLM (tests/vllm)")
    group.addoption("--start-rounds", type=int, default=3, help="starts of each kind (default %(default)s)")
    group.addoption("--start-results", type=Path, default=ROOT / "vllm-results", help="where the figures go")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A start of vLLM takes a minute, and some tests need three."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def _consumer() -> None:
    if not (CONSUMER / "ready").exists():
        pytest.fail("vLLM is not installed: run make system-vllm")


@pytest.fixture
def published(hub: Hub) -> Hub:
    """The Hub, with a model and an adapter for it."""
    hub.create_repo(BASE).commit(tiny_llama())
    hub.create_repo(ADAPTER).commit(tiny_adapter(BASE))
    return hub


@pytest.fixture
def pod(node: Node, tmp_path: Path) -> Pod:
    """Containers with the cache and without a network."""
    return Pod(node, tmp_path / "home")

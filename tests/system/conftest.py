"""The fixtures of the integration tests, for tests that need more than Python on the machine."""

from tests.integration.conftest import hub, make_node, node

__all__ = ["hub", "make_node", "node"]

"""A node under test: a real daemon in its own process, a real Hub, the real clients."""

from .daemon import Node, free_port

__all__ = ["Node", "free_port"]

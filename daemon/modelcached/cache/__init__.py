"""The heart: what the node's cache does, from a request to a published snapshot and back to free space."""

from modelcached.cache.assemblies import Watch
from modelcached.cache.cache import Cache
from modelcached.cache.core import Core

__all__ = ["Cache", "Core", "Watch"]

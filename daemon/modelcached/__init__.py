"""modelcached: the daemon that owns a node's model cache."""

__version__ = "0.1.0"

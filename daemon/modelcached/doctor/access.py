"""What other users, as workloads are, can get at. Blocking."""

from __future__ import annotations

import os
import stat


def mode_of(path: str) -> int:
    """Its permission bits."""
    return stat.S_IMODE(os.stat(path).st_mode)


def closed_on_the_way(path: str) -> str | None:
    """The first directory, from the root to ``path`` itself, that other users cannot enter."""
    parts = path.split("/")
    ways = ("/".join(parts[:depth]) for depth in range(2, len(parts) + 1))
    return next((way for way in ways if not mode_of(way) & stat.S_IXOTH), None)

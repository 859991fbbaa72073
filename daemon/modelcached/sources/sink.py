"""Where a source's bytes go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Sink = Callable[[memoryview, int], None]
"""Takes bytes for an offset of the file. The view is used again afterwards."""


@dataclass(frozen=True, slots=True)
class FileSink:
    """A sink that is a file, and takes bytes out of a pipe as well: from there the kernel copies them itself."""

    write: Sink
    splice: Callable[[int, int, int], None]
    """Takes so many bytes out of a pipe, which holds them, for an offset: descriptor, bytes, offset."""

    def __call__(self, view: memoryview, offset: int) -> None:
        """As any other sink."""
        self.write(view, offset)

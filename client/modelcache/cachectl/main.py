"""The door of cachectl: checks for its two packages, and turns whatever happens into one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from modelcache.reasons import EXIT_UNAVAILABLE

_PACKAGES = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs cachectl; returns its exit status."""
    # gRPC's own log lines would stand between ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from modelcache.cachectl.commands import run  # noqa: PLC0415 - the base install has neither click nor rich

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.stderr.write(f"cachectl: {package} is not installed; install modelcached[cli]\n")
        return EXIT_UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main())

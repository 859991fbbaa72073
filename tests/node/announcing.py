"""The daemon with a hook in its seam: what it changes is written to a file, just before it does; and it can be killed.

``python announcing.py FILE CALL NUMBER [modelcached's arguments]``: a line "operation path" for each call
that changes the disk. Just before the NUMBERth line in which the regular expression CALL is found, it kills itself;
an empty CALL kills nobody.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from modelcached import main
from modelcached.store.disk import Disk


def announcing(file: Path, call: str = "", number: int = 1) -> list[str]:
    """The command, for ``Node.program``."""
    return [sys.executable, __file__, str(file), call, str(number)]


def _run(file: str, call: str, number: int, arguments: Sequence[str]) -> int:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    found = itertools.count(1)

    def announce(operation: str, path: str) -> None:
        line = f"{operation} {path}\n"
        if call and re.search(call, line) and next(found) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(descriptor, line.encode())

    main.Disk = functools.partial(Disk, announce)  # type: ignore[misc,assignment]
    return main.main(arguments)


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))

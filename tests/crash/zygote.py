"""Fresh processes at a few milliseconds each: forked from one that has imported everything and started nothing.

Neither pytest nor a process with threads can be forked safely, and a new interpreter takes half a second. Talks
JSON lines on stdin and stdout; whatever the child tells comes back when it has ended, however it ended.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import protocols

ROOT = Path(__file__).parent.parent.parent
CHILD_SECONDS = 30


@dataclass(frozen=True)
class Ended:
    """How a child came to its end."""

    status: int
    """0 when it returned, -signal when it was killed."""
    told: list[str]
    result: Any


class Zygote:
    """The parent's side."""

    def __init__(self) -> None:
        path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )

    def run(self, function: str, **arguments: Any) -> Ended:
        """Calls tests.crash.protocols.<function>(tell, **arguments) in a process of its own."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, arguments]).encode() + b"\n")
        self._process.stdin.flush()
        status, told, result, failure = json.loads(self._process.stdout.readline())
        assert failure is None, f"{function}({arguments}) failed\n{failure}"
        assert status in (0, -signal.SIGKILL), f"{function}({arguments}) ended with {status} after {told[-5:]}"
        return Ended(status, told, result)

    def close(self) -> None:
        self._process.communicate()


def _child(function: str, arguments: dict[str, Any], pipe: int) -> None:
    def tell(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    gc.disable()  # it would copy every page that it looks at
    signal.alarm(CHILD_SECONDS)
    try:
        work = getattr(protocols, function)
        tell("=" + json.dumps(work(tell, **arguments)))
    except BaseException:  # noqa: BLE001 - the parent raises it
        tell("!" + json.dumps(traceback.format_exc()))


def _serve() -> None:
    protocols.set_up()
    assert threading.active_count() == 1
    assert "grpc" not in sys.modules
    gc.collect()
    gc.freeze()
    for line in sys.stdin.buffer:
        function, arguments = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(function, arguments, writer)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            lines = file.read().splitlines()
        _, status = os.waitpid(pid, 0)
        results = {line[0]: json.loads(line[1:]) for line in lines if line[0] in "=!"}
        told = [line for line in lines if line[0] not in "=!"]
        answer = [os.waitstatus_to_exitcode(status), told, results.get("="), results.get("!")]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()

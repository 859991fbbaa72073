"""`vllm serve` in a pod, and the questions that it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vllm.pod import Pod, end

START_SECONDS = 240
"""vLLM on two busy cores; it took 30 to 60 s here."""

FLAGS = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--host", "127.0.0.1")
"""Compiling would take longer than everything else together, and has nothing to do with where the files lie."""

# In the server's network namespace, which no other process can reach. It asks until it is answered: a server that is
# starting refuses the connection. Times are CLOCK_MONOTONIC, which all processes of a machine share.
_ASK = """
import json, sys, time, urllib.error, urllib.request
url, body = sys.argv[1:]
while True:
    request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        print(json.dumps({"answer": json.loads(text), "at": time.monotonic()}))
        break
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode()[:2000]}")
    except (urllib.error.URLError, ConnectionError):
        time.sleep(0.02)
"""


@dataclass
class Server:
    """A container that becomes a vLLM server; ends with the block."""

    pod: Pod
    command: tuple[str, ...]
    log: Path
    port: int = 8000

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self.container = self.pod.start(*self.command, log=self.log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> int:
        """As a kubelet ends it; the exit status of its first process. May be called twice."""
        return end(self.container)

    def complete(self, model: str, prompt: str, *, tokens: int) -> Any:
        """A greedy completion's only choice, with its tokens and how likely it found them; waits for its start."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = self._ask("/v1/completions", json.dumps({**body, "return_token_ids": True, "logprobs": 1}))["answer"]
        return answer["choices"][0]

    def first_token_seconds(self, model: str) -> float:
        """From the container's start until a completion of one token was there."""
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}
        return float(self._ask("/v1/completions", json.dumps(body))["at"]) - self.began

    def models(self) -> list[str]:
        """What it says that it serves."""
        return [model["id"] for model in self._ask("/v1/models", "")["answer"]["data"]]

    def _ask(self, path: str, body: str) -> Any:
        enter = [] if self.pod.network else self._enter()
        asking = subprocess.Popen(
            [*enter, sys.executable, "-c", _ASK, f"http://127.0.0.1:{self.port}{path}", body],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + START_SECONDS
        try:
            while asking.poll() is None:
                assert self.container.poll() is None, f"it ended:\n{self.log_text()}"
                assert time.monotonic() < deadline, f"no answer within {START_SECONDS} s:\n{self.log_text()}"
                time.sleep(0.05)
        finally:
            asking.kill()
            said, complaint = asking.communicate()
        assert asking.returncode == 0, f"{complaint}\n{self.log_text()}"
        return json.loads(said)

    def _enter(self) -> list[str]:
        """How to get into the server's network, once it has one: a container that has just begun is still in ours."""
        ours = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.container.pid}/ns/net") == ours:
            assert self.container.poll() is None, self.log_text()
            time.sleep(0.01)
        return ["nsenter", "--target", str(self.container.pid), "--net"]

    def log_text(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace")[-8000:]

"""`python -m tests.hub` as a process of its own."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from tests.hub.models import tiny_llama
from tests.hub_faithful.http_calls import call

ROOT = Path(__file__).parents[2]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.hub", "--rate", "64"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.mark.parametrize("ending", ["SIGTERM", "shutdown"])
def test_it_serves_counts_and_ends_cleanly(process: subprocess.Popen[str], tmp_path: Path, ending: str) -> None:
    assert process.stdout is not None
    endpoint = process.stdout.readline().strip()
    snapshot = snapshot_download("org/tiny", cache_dir=tmp_path, endpoint=endpoint)
    files = tiny_llama()
    assert {path: (Path(snapshot) / path).read_bytes() for path in files} == files
    totals = json.loads(call(f"{endpoint}/_hub/counters").body)["files"]
    weights = [total for total in totals if (total["file"], total["kind"]) == ("model.safetensors", "cdn")]
    assert [(total["requests"], total["body_bytes"]) for total in weights] == [(1, len(files["model.safetensors"]))]
    if ending == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        assert call(f"{endpoint}/_hub/shutdown", "POST").status == 200
    assert process.wait(10) == 0

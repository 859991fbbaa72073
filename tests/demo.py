"""`make demo`: the main job, from a cold cache to a tidy eviction. Every line that it prints is measured.

Without a model it starts the test Hub on loopback and serves a small but real
model from there; with one (`make demo MODEL=org/name`) it asks the real Hub.
Everything lives in one temporary directory and is gone at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.node.daemon import BIN, Node

CLIENTS = 8

LOAD = """
import sys
from pathlib import Path
from huggingface_hub import snapshot_download
from safetensors import deserialize
directory = Path(snapshot_download(sys.argv[1]))
files = sorted(directory.glob("*.safetensors"))
tensors = size = 0
for file in files:
    # As bytes, not as arrays: numpy has no bfloat16, which most weights have.
    for _, tensor in deserialize(file.read_bytes()):
        tensors += 1
        size += len(tensor["data"])
print(f"{tensors} tensors, {size:,} bytes of weights from {len(files)} safetensors file(s)")
"""


def say(text: str) -> None:
    """A headline."""
    sys.stdout.write(f"\n\033[1m== {text}\033[0m\n" if sys.stdout.isatty() else f"\n== {text}\n")
    sys.stdout.flush()


def show(*command: str, node: Node) -> None:
    """Runs a client's command as a person would, output and all."""
    sys.stdout.write(f"$ {' '.join(command)}\n")
    sys.stdout.flush()
    subprocess.run([str(BIN / command[0]), *command[1:]], env=node.client_environment, check=True)


def main() -> int:
    """The story; 0 when every step was as it should be."""
    for number in (signal.SIGINT, signal.SIGTERM):  # an exit like any other: nothing stays behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    model = sys.argv[1] if len(sys.argv) > 1 else ""
    hub: subprocess.Popen[str] | None = None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with tempfile.TemporaryDirectory(prefix="modelcached-demo-") as root:
        if not model:
            model = "org/tiny"
            hub = subprocess.Popen([sys.executable, "-m", "tests.hub"], stdout=subprocess.PIPE, text=True)
            assert hub.stdout is not None
            endpoint = hub.stdout.readline().strip()
        settings = {"cache": {"budget": "80%", "min_free": "1%"}, "log": {"level": "info"}}
        if token := os.environ.get("HF_TOKEN"):
            token_file = Path(root) / "token"
            token_file.touch(mode=0o600)
            token_file.write_text(token)
            settings["hub"] = {"token_file": str(token_file)}
        node = Node(Path(root), endpoint, settings)
        try:
            story(node, model, endpoint, own_hub=hub is not None)
        finally:
            node.stop()
            if hub is not None:
                hub.terminate()
                hub.wait()
    assert not Path(root).exists()
    say("done: no process and no file is left")
    return 0


def story(node: Node, model: str, endpoint: str, *, own_hub: bool) -> None:
    """What a node does with one model."""
    say(f"a daemon owns {node.cache_dir}, upstream is {endpoint}")
    node.start()

    say(f"{CLIENTS} pods ask for {model} at once")
    began = time.monotonic()
    clients = [node.popen("ensure-model", "--json", model) for _ in range(CLIENTS)]
    outcomes = []
    for client in clients:
        out, err = client.communicate(timeout=3600)
        if client.returncode:
            sys.stderr.write(err)
            raise SystemExit(client.returncode)
        outcomes.append(json.loads(out))
    counts = {name: sum(o["outcome"] == name for o in outcomes) for name in ("downloaded", "joined", "hit")}
    size = outcomes[0]["bytes_total"]
    sys.stdout.write(
        f"all ready in {time.monotonic() - began:.2f} s: "
        + ", ".join(f"{count} {name}" for name, count in counts.items())
        + f"; {size:,} bytes selected\n"
    )
    if own_hub:
        with urllib.request.urlopen(f"{endpoint}/_hub/counters") as answer:
            files = json.load(answer)["files"]
        # A large file's bytes come from the CDN; its resolve address answers with a redirect of some bytes.
        by_kind = {
            kind: {file["file"]: file["body_bytes"] for file in files if file["kind"] == kind}
            for kind in ("resolve", "cdn")
        }
        sent = sum((by_kind["resolve"] | by_kind["cdn"]).values())
        sys.stdout.write(f"upstream sent {sent:,} bytes: {sent / size:.3f} x the selection\n")
        if sent != size:
            raise SystemExit("upstream was not asked for each byte exactly once")

    say("what an operator sees")
    show("cachectl", "status", node=node)
    show("cachectl", "ls", node=node)

    say("the real huggingface_hub loads it by repo id, offline, from the cache")
    environment = {**os.environ, "HF_HUB_CACHE": str(node.hub_dir), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", LOAD, model], env=environment, check=True)

    say("what Prometheus sees")
    with urllib.request.urlopen(f"http://127.0.0.1:{node.metrics_port}/metrics") as answer:
        wanted = ("modelcached_used_bytes ", "modelcached_requests_total{", "modelcached_fetched_bytes_total{")
        for line in answer.read().decode().splitlines():
            if line.startswith(wanted):
                sys.stdout.write(line + "\n")

    say("its leases released, it can go")
    show("cachectl", "release", "--model", model, node=node)
    show("cachectl", "evict", model, "--yes", node=node)
    show("cachectl", "status", node=node)


if __name__ == "__main__":
    sys.exit(main())

"""The real huggingface_hub, as a process of its own, that writes into a node's hub/ behind the daemon's back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.hub import Hub
from tests.node.daemon import Node

FILL = """
import sys
from huggingface_hub import snapshot_download
for repo_id in sys.argv[1:]:
    snapshot_download(repo_id)
"""


def fill(hub: Hub, node: Node, *repo_ids: str, shared: bool = False) -> None:
    """snapshot_download of each, with the node's hub/ as its cache; over Xet with shared blobs where ``shared``."""
    node.hub_dir.mkdir(parents=True, exist_ok=True)
    download(hub, node.root / "home", *repo_ids, cache=node.hub_dir, shared=shared)
    assert (node.hub_dir / "blobs").is_dir() is shared


def download(hub: Hub, home: Path, *repo_ids: str, cache: Path | None = None, shared: bool = False) -> None:
    """snapshot_download of each into a cache, by default the one below HF_HOME."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(cache or home / "hub"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "0" if shared else "1",
        "HF_XET_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    subprocess.run([sys.executable, "-c", FILL, *repo_ids], env=environment, check=True, timeout=60)

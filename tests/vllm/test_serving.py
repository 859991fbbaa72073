"""vLLM serves by repo id what ensure-model made whole: another user, a read-only mount, no network."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.hub import Hub
from tests.hub.content import FileSource
from tests.hub.models import kitchen_sink, mistral_style, sharded_llama, tiny_llama
from tests.integration.test_leases import OTHER_POD, POD, evict, leases, refusal_to_evict, start_pod
from tests.node import Node
from tests.vllm.conftest import ADAPTER, BASE
from tests.vllm.pod import CONSUMER, MODELS, Pod
from tests.vllm.serving import FLAGS, Server

PROMPT = "The cache is read-only"
TOKENS = 8
EXACT = (*FLAGS, "--dtype", "float32")
"""As the weights are: of its own accord vLLM rounds F32 to 16 bits, and would not quite agree with transformers."""

# transformers, from the same mount and by the same repo id: how likely it finds each token of an answer. With an
# adapter, the products of its matrices are added to the weights by hand (peft is not installed).
SCORE = """
import json, sys, torch
from pathlib import Path
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
repo_id, prompt, answer, *adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(repo_id)
model = AutoModelForCausalLM.from_pretrained(repo_id, dtype=torch.float32)
for name in adapter:
    root = Path(snapshot_download(name))
    config = json.loads((root / "adapter_config.json").read_text())
    parts = load_file(root / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    for down in [part for part in parts if part.endswith("lora_A.weight")]:
        up = down.replace("lora_A", "lora_B")
        target = down.removeprefix("base_model.model.").replace("lora_A.", "")
        weights[target].data += parts[up] @ parts[down] * (config["lora_alpha"] / config["r"])
given, answer = tokenizer(prompt)["input_ids"], json.loads(answer)
with torch.no_grad():
    logits = model(torch.tensor([given + answer])).logits[0]
made = model.generate(torch.tensor([given]), max_new_tokens=len(answer), min_new_tokens=len(answer), do_sample=False)
print(json.dumps({
    "prompt": given,
    "scores": [float(row.log_softmax(-1)[token]) for row, token in zip(logits[len(given) - 1:], answer)],
    "best": [float(row.log_softmax(-1).max()) for row in logits[len(given) - 1:-1]],
    "made": len(made[0]) - len(given),
}))
"""


def agree(pod: Pod, choice: Any, repo_id: str, *adapter: str) -> None:
    """transformers reads the prompt as vLLM did, finds each token as likely, and none likelier (ties aside)."""
    answer = choice["token_ids"]
    seen = pod.python(SCORE, repo_id, PROMPT, json.dumps(answer), *adapter)
    assert (seen["prompt"], seen["made"], len(answer)) == (choice["prompt_token_ids"], TOKENS, TOKENS)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(seen["scores"], abs=0.001)
    assert seen["best"] == pytest.approx(seen["scores"], abs=0.001)


def pickled_llama() -> dict[str, FileSource]:
    """tiny_llama's weights as torch itself pickles them, and no safetensors: pytorch_model.bin."""
    files: dict[str, FileSource] = dict(tiny_llama(seed=3))
    with TemporaryDirectory() as directory:
        source, target = Path(directory) / "model.safetensors", Path(directory) / "pytorch_model.bin"
        source.write_bytes(tiny_llama(seed=3)["model.safetensors"])
        save = "import sys, torch, safetensors.torch as s; torch.save(s.load_file(sys.argv[1]), sys.argv[2])"
        subprocess.run([str(CONSUMER / "bin" / "python"), "-c", save, str(source), str(target)], check=True)
        del files["model.safetensors"]
        return files | {target.name: target.read_bytes()}


def test_an_init_container_makes_it_whole_and_vllm_serves_it(
    published: Hub, node: Node, pod: Pod, tmp_path: Path
) -> None:
    """It says what transformers says of the same files, and the pod's lease keeps them."""
    directory = start_pod(node, POD)
    start_pod(node, OTHER_POD)  # an empty directory would be no witness
    pod = replace(pod, environment={"POD_UID": POD})
    path = pod.run("ensure-model", BASE, "--hub-dir", MODELS).strip()
    assert path.startswith(f"{MODELS}/models--org--tiny/snapshots/")
    asked = len(published.counters.requests())
    with Server(pod, ("vllm", "serve", BASE, *EXACT), tmp_path / "vllm.log") as server:
        choice = server.complete(BASE, PROMPT, tokens=TOKENS)
        assert server.models() == [BASE]
        refusal_to_evict(node, BASE)
        assert server.end() == 0
    assert choice["finish_reason"] == "length"
    agree(pod, choice, BASE)
    assert len(published.counters.requests()) == asked
    directory.rmdir()
    node.wait_until(lambda: not leases(node), 20, "the lease has ended with the pod")
    node.assert_disk_truth()


def test_one_container_holds_the_lease_while_vllm_serves(published: Hub, node: Node, pod: Pod, tmp_path: Path) -> None:
    """`ensure-model --hold -- vllm serve`: nobody can evict what is served, and what nobody serves can go."""
    hold = ("ensure-model", BASE, "--hub-dir", MODELS, "--hold", "--")
    with Server(pod, (*hold, "vllm", "serve", BASE, *EXACT), tmp_path / "vllm.log") as server:
        first = server.complete(BASE, PROMPT, tokens=TOKENS)
        (lease,) = leases(node)
        refusal_to_evict(node, BASE)
        assert server.complete(BASE, PROMPT, tokens=TOKENS)["token_ids"] == first["token_ids"]
        assert [held["id"] for held in leases(node)] == [lease["id"]]
        assert server.end() == 0
    node.wait_until(lambda: not leases(node), 10, "the lease has ended with vLLM")
    evict(node, BASE)
    assert node.visible(BASE) == []


def test_a_lora_adapter_is_served_beside_its_base_model(published: Hub, node: Node, pod: Pod, tmp_path: Path) -> None:
    """By the path that ensure-model prints for it, and by its repo id; it says what the sums of the weights say."""
    answers = [
        json.loads(line) for line in pod.run("ensure-model", BASE, ADAPTER, "--hub-dir", MODELS, "--json").splitlines()
    ]
    assert [answer["repo_id"] for answer in answers] == [BASE, ADAPTER]
    named = (
        "--enable-lora",
        "--max-lora-rank",
        "8",
        "--lora-modules",
        f"by-path={answers[1]['path']}",
        f"by-id={ADAPTER}",
    )
    with Server(pod, ("vllm", "serve", BASE, *EXACT, *named), tmp_path / "vllm.log") as server:
        base, by_path, by_id = (server.complete(name, PROMPT, tokens=TOKENS) for name in (BASE, "by-path", "by-id"))
        assert sorted(server.models()) == sorted([BASE, "by-path", "by-id"])
    agree(pod, base, BASE)
    agree(pod, by_path, BASE, ADAPTER)
    assert by_id["token_ids"] == by_path["token_ids"] != base["token_ids"]


@pytest.mark.parametrize("build", [sharded_llama, kitchen_sink, pickled_llama])
def test_what_the_default_profile_selects_is_what_vllm_loads(
    hub: Hub, node: Node, pod: Pod, tmp_path: Path, build: Callable[[], Mapping[str, FileSource]]
) -> None:
    """Shards by their index, one format out of ten, and pickled weights."""
    hub.create_repo("org/other").commit(build())
    pod.run("ensure-model", "org/other", "--hub-dir", MODELS)
    with Server(pod, ("vllm", "serve", "org/other", *EXACT), tmp_path / "vllm.log") as server:
        choice = server.complete("org/other", PROMPT, tokens=TOKENS)
    agree(pod, choice, "org/other")


def test_a_repository_with_mistrals_own_weights_is_served_from_them(
    hub: Hub, node: Node, pod: Pod, tmp_path: Path
) -> None:
    """vLLM reads them where there are any, so they are all that is fetched; its tokenizer here is not Mistral's own."""
    model = {path: content for path, content in mistral_style().items() if "tekken" not in path and "v3" not in path}
    sha = hub.create_repo("org/mistral").commit(model)
    pod.run("ensure-model", "org/mistral", "--hub-dir", MODELS)
    weights = sorted(path.name for path in node.snapshot("org/mistral", sha).glob("*.safetensors"))
    assert weights == ["consolidated.safetensors"]
    with Server(pod, ("vllm", "serve", "org/mistral", *EXACT), tmp_path / "vllm.log") as server:
        choice = server.complete("org/mistral", PROMPT, tokens=TOKENS)
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == TOKENS

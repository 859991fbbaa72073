"""What is published on the test Hub: a LoRA adapter for tests.hub.models.tiny_llama, and a Llama that takes a while."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from tests.hub.content import FileSource
from tests.hub.models import llama_shapes, tiny_llama
from tests.hub.weights import Tensor, random_tensor, safetensors_file, sharded

RANK = 8


def tiny_adapter(base: str, seed: int = 0) -> dict[str, bytes]:
    """A LoRA adapter as peft saves one, for every query and value projection of tiny_llama.

    Its values are large, so that nobody takes the base model's answer for the adapter's.
    """
    config = json.loads(tiny_llama()["config.json"])
    hidden, head = config["hidden_size"], config["head_dim"]
    widths = {"q_proj": hidden, "v_proj": head * config["num_key_value_heads"]}
    rng = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random_tensor(rng, (RANK, hidden), scale=0.5)
            tensors[f"{prefix}.lora_B.weight"] = random_tensor(rng, (width, RANK), scale=0.5)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(widths),
        "inference_mode": True,
    }
    return {
        "README.md": f"---\nbase_model: {base}\nlibrary_name: peft\n---\n# Random\n".encode(),
        "adapter_config.json": json.dumps(about, indent=2).encode(),
        "adapter_model.safetensors": safetensors_file(tensors),
    }


def medium_llama(directory: Path, seed: int = 0) -> dict[str, FileSource]:
    """20 layers with random BF16 weights in four files, 473 MB together, which it writes below the directory."""
    layers, hidden, inner, heads, key_value_heads = 20, 1024, 2816, 16, 8
    head = hidden // heads
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in llama_shapes(hidden, inner, layers, key_value_heads * head).items():
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02) if len(shape) > 1 else np.ones(shape)
        # BF16 is the upper half of each float.
        upper = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        tensors[name] = Tensor("BF16", shape, upper.tobytes())
    files: dict[str, FileSource] = dict(tiny_llama(dtype="BF16"))
    del files["model.safetensors"]
    config = json.loads(tiny_llama(dtype="BF16")["config.json"]) | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head,
    }
    files["config.json"] = json.dumps(config, indent=2).encode()
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in sharded(tensors, 4).items():
        (directory / name).write_bytes(content)
        files[name] = directory / name
    return files

"""Small models that are real: transformers, vLLM and tokenizers load them; total 1-4 MiB unless said otherwise."""

from __future__ import annotations

import json
import random
from base64 import b64decode
from collections.abc import Callable, Mapping
from functools import cache

from .content import FileSource, Synthetic
from .tokenizer import VOCABULARY_SIZE, tokenizer_files
from .weights import (
    INDEX_FILE,
    DType,
    Tensor,
    constant_tensor,
    index_file,
    random_tensor,
    safetensors_file,
    safetensors_head,
    shard_name,
    sharded,
)

_HIDDEN, _INNER, _LAYERS, _HEADS, _KEY_VALUE_HEADS = 128, 256, 2, 4, 2
_HEAD = _HIDDEN // _HEADS
_MIB = 1024 * 1024
_PNG = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def tiny_llama(seed: int = 0, *, dtype: DType = "F32") -> dict[str, bytes]:
    """A whole LlamaForCausalLM repo with one weights file (1.5 MiB in F32)."""
    return {**_repo_files("Tiny Llama", dtype), "model.safetensors": safetensors_file(_llama(seed, dtype))}


def sharded_llama(shards: int = 3, seed: int = 0) -> dict[str, bytes]:
    """The same model in several weights files and their index."""
    return {**_repo_files("Sharded Llama", "F32"), **sharded(_llama(seed, "F32"), shards)}


def mistral_style(shards: int = 2, seed: int = 0) -> dict[str, bytes]:
    """One repo, two formats of the same weights, as Mistral publishes: consolidated and Hugging Face shards."""
    weights = _llama(seed, "BF16")
    parameters = {
        "dim": _HIDDEN,
        "n_layers": _LAYERS,
        "head_dim": _HEAD,
        "hidden_dim": _INNER,
        "n_heads": _HEADS,
        "n_kv_heads": _KEY_VALUE_HEADS,
        "norm_eps": 1e-05,
        "vocab_size": VOCABULARY_SIZE,
    }
    return {
        **_repo_files("Mistral Style", "BF16"),
        **sharded(weights, shards),
        "consolidated.safetensors": safetensors_file({_mistral_name(name): t for name, t in weights.items()}),
        "params.json": _json(parameters),
        "tekken.json": _json({"config": {"version": "v3", "default_vocab_size": VOCABULARY_SIZE}, "vocab": []}),
        "tokenizer.model.v3": random.Random(seed).randbytes(4096),
    }


def kitchen_sink(seed: int = 0) -> dict[str, bytes]:
    """Everything a repo accumulates: the same weights in every format ever, quants, pictures, papers.

    Only the safetensors are true; the others have the right names, magic bytes where cheap, and
    deterministic bodies of their own (64 KiB each).
    """
    rng = random.Random(seed)

    def blob(magic: bytes = b"") -> bytes:
        return magic + rng.randbytes(64 * 1024 - len(magic))

    duplicates = {
        "model.fp16.safetensors": safetensors_file(_llama(seed, "BF16")),
        "pytorch_model.bin": blob(b"PK\x03\x04"),
        "pytorch_model.fp16.bin": blob(b"PK\x03\x04"),
        "training_args.bin": blob(b"PK\x03\x04"),
        "optimizer.pt": blob(b"PK\x03\x04"),
        "model.pt": blob(b"PK\x03\x04"),
        "original/consolidated.00.pth": blob(b"PK\x03\x04"),
        "original/params.json": _json({"dim": _HIDDEN}),
        "original/tokenizer.model": blob(),
        "onnx/model.onnx": blob(),
        "onnx/model_quantized.onnx": blob(),
        "onnx/model.onnx_data": blob(),
        "openvino/openvino_model.bin": blob(),
        "openvino/openvino_model.xml": b"<net/>\n",
        "flax_model.msgpack": blob(),
        "tf_model.h5": blob(b"\x89HDF\r\n\x1a\n"),
        "rust_model.ot": blob(),
        "coreml/model.mlmodel": blob(),
        **{f"tiny.{quant}.gguf": blob(b"GGUF\x03\0\0\0") for quant in ("Q2_K", "Q4_K_M", "Q5_K_S", "Q8_0", "F16")},
        "images/diagram.png": _PNG,
        "assets/logo.jpg": blob(b"\xff\xd8\xff\xe0"),
        "LICENSE": b"Apache License 2.0\n",
        "USE_POLICY.md": b"# Use policy\n",
        "modeling_tiny.py": b'"""Custom code that trust_remote_code would run."""\n',
    }
    return {**tiny_llama(seed), **duplicates}


def paced_model(total: int = 64 * _MIB, files: int = 8, seed: int = 0) -> dict[str, FileSource]:
    """A model of `total` bytes of weights in `files` shards, made up on disk when committed.

    Every shard is a valid safetensors file (one U8 tensor), and the index names them; no two are equal.
    """
    made: dict[str, FileSource] = dict(_repo_files("Paced", "F32"))
    placed: dict[str, str] = {}
    for number in range(files):
        size = total // files + (total % files if number == files - 1 else 0)
        tensor, file = f"model.blob.{number}", shard_name(number, files)
        made[file] = Synthetic(size, seed * 1_000_003 + number, safetensors_head(tensor, size))
        placed[tensor] = file
    made[INDEX_FILE] = index_file(placed, total)
    return made


def _paced() -> Mapping[str, FileSource]:
    return paced_model()


CATALOGUE: Mapping[str, Callable[[], Mapping[str, FileSource]]] = {
    "tiny": tiny_llama,
    "sharded": sharded_llama,
    "mistral": mistral_style,
    "kitchen-sink": kitchen_sink,
    "paced": _paced,
}
"""Builders by the name the command line knows; each is served as `org/<name>`."""


@cache
def _llama(seed: int, dtype: DType) -> Mapping[str, Tensor]:
    rng = random.Random(seed)
    shapes = llama_shapes(_HIDDEN, _INNER, _LAYERS, _KEY_VALUE_HEADS * _HEAD)
    weights = {name: random_tensor(rng, shape, dtype=dtype) for name, shape in shapes.items() if len(shape) > 1}
    return weights | {
        name: constant_tensor(1.0, shape, dtype=dtype) for name, shape in shapes.items() if len(shape) == 1
    }


def llama_shapes(hidden: int, inner: int, layers: int, key_value: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a LlamaForCausalLM with our tokenizer's vocabulary; those of one dimension are norms."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY_SIZE, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["lm_head.weight"] = (VOCABULARY_SIZE, hidden)
    norms = [f"model.layers.{n}.{which}" for n in range(layers) for which in _LAYER_NORMS] + ["model.norm.weight"]
    return shapes | dict.fromkeys(norms, (hidden,))


_LAYER_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

_MISTRAL_NAMES = (
    ("model.embed_tokens", "tok_embeddings"),
    ("model.layers", "layers"),
    ("model.norm", "norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("mlp.up_proj", "feed_forward.w3"),
    *((f"self_attn.{letter}_proj", f"attention.w{letter}") for letter in "qkvo"),
)


def _mistral_name(name: str) -> str:
    for hugging_face, mistral in _MISTRAL_NAMES:
        name = name.replace(hugging_face, mistral)
    return name


def _repo_files(title: str, dtype: DType) -> dict[str, bytes]:
    configuration = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_VALUE_HEADS,
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "vocab_size": VOCABULARY_SIZE,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "float32" if dtype == "F32" else "bfloat16",
    }
    readme = f"---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n# {title}\nRandom weights for tests.\n"
    return {
        ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs -text\n",
        "README.md": readme.encode(),
        "config.json": _json(configuration),
        "generation_config.json": _json({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}),
        **tokenizer_files(),
    }


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"

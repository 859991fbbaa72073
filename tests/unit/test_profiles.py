"""What each profile selects, on the file lists of repositories as the Hub has them."""

import json
from dataclasses import dataclass, field

import pytest
from huggingface_hub.utils import filter_repo_objects
from modelcached.errors import CacheError, Reason
from modelcached.model import Algorithm, Commit, Digest, FileEntry, Manifest, Profile, RepoId, Selection
from modelcached.profiles import DEFAULT_PROFILE, MAX_INDEX_BYTES, index_file, parse_canonical, parse_profile, select


def shards(count, stem="model", suffix="safetensors"):
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]


HF = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
DOCS = [".gitattributes", "README.md"]
INDEX = "model.safetensors.index.json"


@dataclass
class Repo:
    """A repository's files by fate: what the profile selects, and what it leaves."""

    kept: list[str]
    left: list[str] = field(default_factory=list)
    indexed: list[str] = field(default_factory=list)
    """What the index names; empty where no index is to be read."""
    format: str = "safetensors"

    @property
    def files(self):
        return self.kept + self.left


VLLM = {
    "meta-llama/Llama-3.1-8B-Instruct": Repo(
        [*HF, INDEX, *shards(4), "LICENSE", "USE_POLICY.md"],
        [*DOCS, "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"],
        shards(4),
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Repo(
        [*HF, "consolidated.safetensors", "params.json", "tokenizer.model", "tokenizer.model.v3"],
        [*DOCS, INDEX, *shards(3)],
        format="consolidated",
    ),
    "mistralai/Pixtral-12B-2409": Repo(
        ["consolidated.safetensors", "params.json", "tekken.json"],
        [*DOCS, "assets/plot.png"],
        format="consolidated",
    ),
    "mistralai/Mistral-Large-Instruct-2411": Repo(
        [
            *HF,
            *shards(51, "consolidated"),
            "consolidated.safetensors.index.json",
            "params.json",
            "tokenizer.model.v7",
            "SYSTEM_PROMPT.txt",
        ],
        [*DOCS, INDEX, *shards(51)],
        shards(51, "consolidated"),
        format="consolidated",
    ),
    "Qwen/Qwen2.5-7B-Instruct": Repo(
        ["LICENSE", *HF, "merges.txt", "vocab.json", INDEX, *shards(4)],
        DOCS,
        shards(4),
    ),
    "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ": Repo([*HF, "quantize_config.json", "model.safetensors"], DOCS),
    "openai/gpt-oss-20b": Repo(
        [*HF, "LICENSE", "USAGE_POLICY", "chat_template.jinja", INDEX, *shards(3, "model", "safetensors")],
        [*DOCS, "metal/model.bin", "original/config.json", "original/dtypes.json", "original/model.safetensors"],
        shards(3),
    ),
    "openai-community/gpt2": Repo(
        [*HF, "merges.txt", "vocab.json", "model.safetensors"],
        [
            *DOCS,
            *("64-8bits.tflite", "64-fp16.tflite", "64.tflite", "flax_model.msgpack", "pytorch_model.bin"),
            *("rust_model.ot", "tf_model.h5", "onnx/config.json", "onnx/decoder_model.onnx", "onnx/tokenizer.json"),
        ],
    ),
    "google-bert/bert-base-uncased": Repo(
        ["LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"],
        [
            *DOCS,
            *("flax_model.msgpack", "pytorch_model.bin", "rust_model.ot", "tf_model.h5", "model.onnx"),
            "coreml/fill-mask/float32_model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
            "coreml/fill-mask/float32_model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
            "coreml/fill-mask/float32_model.mlpackage/Manifest.json",
        ],
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Repo(
        [
            *("1_Pooling/config.json", "config.json", "config_sentence_transformers.json", "data_config.json"),
            *("model.safetensors", "modules.json", "sentence_bert_config.json", "special_tokens_map.json"),
            *("tokenizer.json", "tokenizer_config.json", "train_script.py", "vocab.txt"),
        ],
        [
            *DOCS,
            *("onnx/model.onnx", "onnx/model_O1.onnx", "onnx/model_qint8_avx512.onnx"),
            *("openvino/openvino_model.bin", "openvino/openvino_model.xml"),
            *("pytorch_model.bin", "rust_model.ot", "tf_model.h5"),
        ],
    ),
    "google/embeddinggemma-300m": Repo(
        [
            *HF,
            *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/config.json"),
            *("3_Dense/pytorch_model.bin", "model.safetensors", "modules.json", "tokenizer.model"),
        ],
        [*DOCS, "2_Dense/pytorch_model.bin"],
    ),
    "BAAI/bge-m3": Repo(
        [
            *("1_Pooling/config.json", "config.json", "modules.json", "sentencepiece.bpe.model", "tokenizer.json"),
            *("pytorch_model.bin", "colbert_linear.pt", "sparse_linear.pt"),
        ],
        [*DOCS, "imgs/bm25.jpg", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/Constant_7_attr__value"],
        format="bin",
    ),
    "bigscience/bloom-7b1": Repo(
        ["config.json", "tokenizer.json", *shards(2, "pytorch_model", "bin"), "pytorch_model.bin.index.json"],
        [*DOCS, "flax_model-00001-of-00002.msgpack", "optimizer.pt", "scheduler.pt", "training_args.bin"],
        shards(2, "pytorch_model", "bin"),
        format="bin",
    ),
    "someone/quantized-in-pt": Repo(
        ["config.json", "llama7b-4bit-128g.pt"],
        ["optimizer.pt", "scaler.pt", "training_args.bin", "rng_state.pth", "original/weights.pt"],
        format="pt",
    ),
    "someone/lora-adapter": Repo(
        [
            *("adapter_config.json", "adapter_model.safetensors", "new_embeddings.safetensors", "tokenizer.json"),
            *("checkpoint-500/adapter_config.json", "checkpoint-500/trainer_state.json"),
        ],
        [
            *("README.md", "adapter_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"),
            *("checkpoint-500/adapter_model.safetensors", "checkpoint-500/optimizer.pt"),
        ],
    ),
    "someone/old-lora-adapter": Repo(
        ["adapter_config.json", "adapter_model.bin"], ["README.md", "training_args.bin"], format="bin"
    ),
    "someone/oldest-lora-adapter": Repo(["adapter_config.json", "adapter_model.pt"], format="pt"),
    "someone/many-adapters": Repo(
        ["de/adapter_config.json", "de/adapter_model.safetensors", "fr/adapter_config.json", "fr/adapter_model.bin"],
        ["de/adapter_model.bin", "README.md"],
    ),
    "microsoft/Phi-4-multimodal-instruct": Repo(
        [
            *HF,
            *("modeling_phi4mm.py", "processing_phi4mm.py", "preprocessor_config.json", INDEX, *shards(3)),
            *("speech-lora/adapter_config.json", "speech-lora/adapter_model.safetensors"),
            *("vision-lora/adapter_config.json", "vision-lora/adapter_model.safetensors"),
        ],
        [*DOCS, "figures/audio_summary.png", "examples/what_is_shown_in_this_image.wav", "phi_4_mm.tech_report.pdf"],
        shards(3),
    ),
    "moonshotai/Kimi-Audio-7B-Instruct": Repo(
        [
            *("config.json", "tiktoken.model", "tokenization_kimia.py", INDEX, *shards(35)),
            *("whisper-large-v3/config.json", "whisper-large-v3/model.safetensors"),
        ],
        [*DOCS, "whisper-large-v3/pytorch_model.bin", "audio_detokenizer/model.pt", "vocoder/model.pt"],
        shards(35),
    ),
    "nvidia/Cosmos3-Nano": Repo(
        [
            *("config.json", "model_index.json", *shards(2, "transformer/diffusion_pytorch_model")),
            *("transformer/diffusion_pytorch_model.safetensors.index.json", "vision_encoder/model.safetensors"),
        ],
        [*DOCS, "vae/diffusion_pytorch_model.safetensors", "sound_tokenizer/model.safetensors"],
    ),
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B": Repo(["config.json", "pytorch_model.bin"], DOCS, format="bin"),
    "z-lab/Qwen3.5-9B-DFlash": Repo(["config.json", "dflash.py", "model.safetensors", "mask_embedding.pt"], DOCS),
    "someone/chat-templates": Repo(
        [
            *("model.safetensors", "chat_template.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"),
            *("qwen.tiktoken", "configs/mel_filters.npz", "bpe_simple_vocab_16e6.txt.gz", "NOTICE.md"),
        ],
        [
            *("a.parquet", "a.arrow", "a.ipynb", "a.mp4", "a.MOV", "a.zip", "a.tar.gz", "B.PNG", ".gitignore"),
            *("m.gguf-split-a", "m.ckpt-1.data-00000-of-00001", "m.onnx.data"),
        ],
    ),
    "someone/one-file-and-an-index-of-it": Repo(["model.safetensors", INDEX], indexed=["model.safetensors"]),
    "someone/shards-and-a-stray-file": Repo(
        [*shards(2), INDEX], ["model.safetensors", ".hidden.safetensors"], shards(2)
    ),
    "someone/shards-and-a-stray-file-without-index": Repo([*shards(2), "model.safetensors"], ["sub/a.safetensors"]),
    "someone/consolidated-only-below": Repo(
        ["model.safetensors"], ["original/consolidated.safetensors", "x/consolidated.safetensors"]
    ),
    "someone/stray-consolidated": Repo(
        [*shards(2, "consolidated"), "consolidated.safetensors.index.json"],
        ["consolidated.safetensors"],
        shards(2, "consolidated"),
        format="consolidated",
    ),
    "someone/one-bin-and-the-index-of-others": Repo(
        ["config.json", "pytorch_model.bin"], ["pytorch_model.bin.index.json"], format="bin"
    ),
    "someone/hidden-file": Repo(["model.safetensors"], [".hidden.safetensors", ".pytorch_model.bin"]),
    "someone/adapter-of-another-runtime": Repo(
        ["model.safetensors"], ["onnx/adapter_config.json", "onnx/adapter_model.safetensors"]
    ),
    "someone/numbered-folder-that-is-no-module": Repo(
        ["model.safetensors", "2_Dense/config.json"], ["2_Dense/model.safetensors"]
    ),
    "someone/module-with-consolidated": Repo(
        ["model.safetensors", "modules.json", "2_Dense/model.safetensors"], ["2_Dense/consolidated.safetensors"]
    ),
    "someone/index-without-safetensors": Repo(["config.json", "pytorch_model.bin"], [INDEX], format="bin"),
    "someone/openvino-beside-torch": Repo(
        ["pytorch_model.bin"], ["openvino_model.bin", "openvino_model.xml"], format="bin"
    ),
}

TRANSFORMERS = {
    "mistralai/Mistral-7B-Instruct-v0.3": Repo(
        [*HF, INDEX, *shards(3), "params.json", "tokenizer.model", "tokenizer.model.v3"],
        [*DOCS, "consolidated.safetensors"],
        shards(3),
    ),
    "openai-community/gpt2": Repo(
        [*HF, "model.safetensors"], [*DOCS, "flax_model.msgpack", "pytorch_model.bin", "rust_model.ot", "tf_model.h5"]
    ),
    "bigscience/bloom-7b1": Repo(
        ["config.json", *shards(2, "pytorch_model", "bin"), "pytorch_model.bin.index.json"],
        ["training_args.bin", "extra.bin"],
        shards(2, "pytorch_model", "bin"),
        format="bin",
    ),
    "someone/the-single-file-wins": Repo(["model.safetensors"], [INDEX, *shards(2), "pytorch_model.bin"]),
    "someone/the-standard-name-wins": Repo(
        ["pytorch_model.bin"], ["other.safetensors", "pytorch_model.bin.index.json"], format="bin"
    ),
    "someone/no-safetensors-but-consolidated": Repo(
        ["pytorch_model.bin", "params.json"], ["consolidated.safetensors", INDEX], format="bin"
    ),
    "someone/other-names": Repo(["other.safetensors", "config.json"], ["other.bin"]),
    "sentence-transformers/clip-ViT-B-32": Repo(
        [*("0_CLIPModel/config.json", "0_CLIPModel/model.safetensors", "modules.json")],
        ["0_CLIPModel/pytorch_model.bin", "README.md"],
    ),
    "someone/lora-adapter": Repo(
        ["adapter_config.json", "adapter_model.safetensors"], ["adapter_model.bin", "training_args.bin"]
    ),
}


def entry(path, size_bytes=1):
    return FileEntry(path, size_bytes, Digest(Algorithm.SHA256, "0" * 64), "0" * 40)


def manifest(paths, repo_id="org/name"):
    return Manifest.of(RepoId(repo_id), Commit("0" * 40), [entry(path) for path in paths])


def index_of(names):
    return json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": {f"layer.{n}": w for n, w in enumerate(names)}}
    ).encode()


def chosen(profile, paths, index=None) -> Selection:
    return select(parse_profile(profile, (), ()), manifest(paths), index)


def refusal(call, *args) -> CacheError:
    with pytest.raises(CacheError) as caught:
        call(*args)
    return caught.value


@pytest.mark.parametrize(
    ("profile", "repo_id", "repo"),
    [("vllm", *item) for item in VLLM.items()] + [("transformers", *item) for item in TRANSFORMERS.items()],
)
def test_a_named_profile_selects_what_its_runtime_loads_and_nothing_else(profile, repo_id, repo):
    listed = manifest(repo.files, repo_id)
    asked = parse_profile(profile, (), ())
    needed = index_file(asked, listed)
    assert (needed is not None) == bool(repo.indexed)
    selection = select(asked, listed, index_of(repo.indexed) if repo.indexed else None)
    assert selection.paths == set(repo.kept)
    assert selection.format == repo.format
    assert selection.profile == profile
    if needed is not None:
        assert needed.path in selection.paths


def test_vllm_reads_every_bin_of_the_root_though_the_index_names_fewer():
    paths = [*shards(2, "pytorch_model", "bin"), "extra.bin", "pytorch_model.bin.index.json"]
    selection = chosen("vllm", paths, index_of(shards(2, "pytorch_model", "bin")))
    assert selection.paths == set(paths)


@pytest.mark.parametrize("profile", ["vllm", "transformers"])
@pytest.mark.parametrize(
    "paths",
    [
        ["config.json", "tokenizer.json"],
        ["config.json", "model-Q4_K_M.gguf", "tf_model.h5", "onnx/model.onnx"],
        ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/model.safetensors"],
        ["model_index.json", "transformer/model.safetensors", "text_encoder/model.safetensors"],
        ["original/model.safetensors", "training_args.bin", "optimizer.pt"],
        ["checkpoint-10/adapter_config.json", "checkpoint-10/adapter_model.safetensors"],
    ],
)
def test_a_repository_without_weights_for_the_runtime_is_refused(profile, paths):
    assert refusal(chosen, profile, paths).reason is Reason.EMPTY_SELECTION


def test_the_refusal_names_the_profile_the_repository_and_the_kinds_of_weights_it_has():
    paths = ["README.md", "m-Q4_K_M.gguf", "tf_model.h5", "onnx/model.onnx", "unet/model.safetensors"]
    error = refusal(chosen, "vllm", paths)
    assert error.message == (
        "profile vllm selects nothing in org/name: it has no weights that this loads, "
        "only ONNX in sub-folders, TensorFlow, gguf, safetensors in sub-folders"
    )
    assert error.metadata == {"profile": "vllm", "repo_id": "org/name"}


@pytest.mark.parametrize(
    ("profile", "kind", "index"),
    [
        ("vllm", "model.safetensors", INDEX),
        ("transformers", "model.safetensors", INDEX),
        ("vllm", "consolidated.safetensors", "consolidated.safetensors.index.json"),
        ("vllm", "pytorch_model.bin", "pytorch_model.bin.index.json"),
        ("transformers", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_a_shard_that_the_index_names_and_the_repository_lacks_is_named(profile, kind, index):
    stem, _, suffix = kind.partition(".")
    names = shards(3, stem, suffix)
    error = refusal(chosen, profile, [*names[:2], index], index_of(names))
    assert error.reason is Reason.INVALID_MANIFEST
    assert names[2] in error.message
    assert index in error.message


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}'),
        *(b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": ["x"]}}', b'{"weight_map": {"a": null}}'),
        *(b"[" * 100_000, b'{"weight_map": {"a": ' + b"9" * 5000 + b"}}"),
    ],
)
def test_an_index_that_is_none_is_refused(content):
    error = refusal(chosen, "vllm", ["model.safetensors", INDEX], content)
    assert error.reason is Reason.INVALID_MANIFEST
    assert INDEX in error.message


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model.safetensors",
        "..\\m.safetensors",
        "..",
        "",
    ],
)
def test_an_index_that_leads_out_of_the_root_is_refused_by_the_name_it_gives(name):
    paths = ["model.safetensors", "sub/model.safetensors", INDEX]
    error = refusal(chosen, "vllm", paths, index_of(["model.safetensors", name]))
    assert error.reason is Reason.INVALID_MANIFEST
    assert f"'{name}'" in error.message


def test_a_hostile_name_in_an_index_is_shown_escaped():
    error = refusal(chosen, "vllm", ["model.safetensors", INDEX], index_of(["\x1b[2Jx"]))
    assert "\x1b" not in error.message


def test_an_absurdly_large_index_is_refused_before_it_is_fetched():
    def listing(size_bytes):
        return Manifest.of(RepoId("a/b"), Commit("0" * 40), [entry("model.safetensors"), entry(INDEX, size_bytes)])

    assert index_file(Profile("vllm"), listing(MAX_INDEX_BYTES)) is not None
    error = refusal(index_file, Profile("vllm"), listing(MAX_INDEX_BYTES + 1))
    assert error.reason is Reason.INVALID_MANIFEST


def test_selecting_without_the_index_that_was_named_is_the_callers_fault():
    with pytest.raises(ValueError, match=r"needs the content of model\.safetensors\.index\.json"):
        chosen("vllm", ["model.safetensors", INDEX])


@pytest.mark.parametrize("profile", [parse_profile("full", (), ()), parse_profile("", ["*"], ()), Profile("gguf:Q8_0")])
def test_full_patterns_and_gguf_need_no_index(profile):
    assert index_file(profile, manifest([*shards(2), INDEX])) is None


def test_full_selects_every_file():
    repo = VLLM["mistralai/Mistral-7B-Instruct-v0.3"]
    selection = chosen("full", repo.files)
    assert (selection.paths, selection.format, selection.profile) == (set(repo.files), "any", "full")


# --- gguf -----------------------------------------------------------------------------------------------------

THE_BLOKE = [
    *(".gitattributes", "README.md", "config.json", "LICENSE.txt"),
    *(f"llama-2-7b-chat.{q}.gguf" for q in ("Q2_K", "Q3_K_L", "Q3_K_M", "Q4_0", "Q4_K_M", "Q4_K_S", "Q5_0", "Q8_0")),
]
BARTOWSKI = [
    *("Meta-Llama-3.1-8B-Instruct-IQ4_XS.gguf", "Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"),
    *("Meta-Llama-3.1-8B-Instruct-Q4_K_M_L.gguf", "Meta-Llama-3.1-8B-Instruct-Q4_K_L.gguf"),
    *("Meta-Llama-3.1-8B-Instruct-f32.gguf", "Meta-Llama-3.1-8B-Instruct-bf16.gguf", "README.md"),
    "Meta-Llama-3.1-8B-Instruct.imatrix",
]
QWEN = [
    *("config.json", "qwen2.5-7b-instruct-q2_k.gguf"),
    *shards(2, "qwen2.5-7b-instruct-q4_k_m", "gguf"),
    *shards(4, "qwen2.5-7b-instruct-fp16", "gguf"),
]
UNSLOTH = [
    *("config.json", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf", "model-UD-IQ1_S.gguf"),
    *shards(2, "BF16/model-BF16", "gguf"),
    *shards(3, "UD-Q4_K_XL/model-UD-Q4_K_XL", "gguf"),
    *shards(3, "Q8_0/model", "gguf"),
]


@pytest.mark.parametrize(
    ("quant", "paths", "weights"),
    [
        ("Q4_K_M", THE_BLOKE, ["llama-2-7b-chat.Q4_K_M.gguf"]),
        ("q4_0", THE_BLOKE, ["llama-2-7b-chat.Q4_0.gguf"]),
        ("Q4_K_M", BARTOWSKI, ["Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf"]),
        ("Q4_K_M_L", BARTOWSKI, ["Meta-Llama-3.1-8B-Instruct-Q4_K_M_L.gguf"]),
        ("F32", BARTOWSKI, ["Meta-Llama-3.1-8B-Instruct-f32.gguf"]),
        ("Q4_K_M", QWEN, shards(2, "qwen2.5-7b-instruct-q4_k_m", "gguf")),
        ("FP16", QWEN, shards(4, "qwen2.5-7b-instruct-fp16", "gguf")),
        ("bf16", UNSLOTH, shards(2, "BF16/model-BF16", "gguf")),
        ("Q4_K_XL", UNSLOTH, shards(3, "UD-Q4_K_XL/model-UD-Q4_K_XL", "gguf")),
        ("Q8_0", UNSLOTH, shards(3, "Q8_0/model", "gguf")),
        ("IQ1_S", UNSLOTH, ["model-UD-IQ1_S.gguf"]),
    ],
)
def test_gguf_selects_the_one_quantisation_and_all_its_shards(quant, paths, weights):
    selection = chosen(f"gguf:{quant}", paths)
    assert {path for path in selection.paths if path.endswith("gguf")} == set(weights)
    assert {path for path in paths if path in ("config.json", "LICENSE.txt")} <= selection.paths
    assert "README.md" not in selection.paths
    assert (selection.format, selection.profile) == ("gguf", f"gguf:{quant.upper()}")


@pytest.mark.parametrize(
    ("quant", "paths", "named"),
    [
        ("Q6_K", THE_BLOKE, "llama-2-7b-chat.Q2_K.gguf"),
        ("Q4_K", THE_BLOKE, "llama-2-7b-chat.Q4_K_M.gguf"),
        ("F16", BARTOWSKI, "Meta-Llama-3.1-8B-Instruct-bf16.gguf"),
        ("F16", UNSLOTH, "model-UD-IQ1_S.gguf"),  # the projectors in F16 are not the model
        ("Q4_K_M", ["model.safetensors", "config.json"], "safetensors"),
        ("Q4_K_M", ["config.json"], "no weights"),
    ],
)
def test_a_quantisation_that_the_repository_lacks_is_refused_with_what_it_has(quant, paths, named):
    error = refusal(chosen, f"gguf:{quant}", paths)
    assert error.reason is Reason.EMPTY_SELECTION
    assert named in error.message


@pytest.mark.parametrize(
    "candidates",
    [
        ["small-Q4_K_M.gguf", "large-Q4_K_M.gguf"],
        ["model-Q4_K_M.gguf", "model-UD-Q4_K_M.gguf"],
        ["model-Q4_K_M.gguf", "Q4_K_M/model-Q4_K_M-00001-of-00001.gguf"],
        ["model-Q4_K_M.gguf", "model-Q4_K_M-00001-of-00001.gguf"],
    ],
)
def test_two_models_of_one_quantisation_are_refused_with_both_named(candidates):
    error = refusal(chosen, "gguf:Q4_K_M", candidates)
    assert error.reason is Reason.EMPTY_SELECTION
    for path in candidates:
        assert path.removesuffix("-00001-of-00001.gguf").removesuffix(".gguf") in error.message


def test_a_gguf_that_lacks_a_shard_is_refused():
    error = refusal(chosen, "gguf:Q4_K_M", shards(3, "m-Q4_K_M", "gguf")[:2])
    assert error.reason is Reason.INVALID_MANIFEST
    assert "one of 3 shards, of which 2 are there" in error.message


# --- patterns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude"),
    [
        (["*.json"], []),
        (["*.safetensors", "*.json"], ["original/*"]),
        ([], ["*.bin", "*.h5"]),
        (["onnx/"], []),
        ([], ["onnx/", "original/"]),
        (["*"], ["*/*"]),
        (["model-0000[12]-of-*.safetensors"], []),
        (["*.[!j]*"], []),
        (["?onfig.json", "TOKENIZER.JSON"], []),
        (["*onfig*"], ["config.json", "1_Pooling/*"]),
        (["[*.json", "config.json"], ["[]"]),
        (["config.json", "config.json"], ["*.md"]),
    ],
)
def test_patterns_mean_what_they_mean_to_huggingface_hub(include, exclude):
    paths = sorted({path for repo in VLLM.values() for path in repo.files})
    expected = set(filter_repo_objects(paths, allow_patterns=include or None, ignore_patterns=exclude or None))
    selection = select(parse_profile("", include, exclude), manifest(paths), None)
    assert expected
    assert selection.paths == expected
    assert selection.format == "any"


def test_patterns_that_match_nothing_are_refused_with_the_patterns_named():
    error = refusal(select, parse_profile("", ["*.nothing"], ["*.md"]), manifest(["config.json"]), None)
    assert error.reason is Reason.EMPTY_SELECTION
    assert "include=*.nothing,exclude=*.md" in error.message


# --- what may be asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("", DEFAULT_PROFILE),
        ("vllm", "vllm"),
        ("transformers", "transformers"),
        ("full", "full"),
        ("gguf:Q4_K_M", "gguf:Q4_K_M"),
        ("gguf:q4_k_m", "gguf:Q4_K_M"),
    ],
)
def test_a_profile_has_one_canonical_name(name, canonical):
    assert parse_profile(name, (), ()).canonical == canonical


def test_the_canonical_name_of_patterns_knows_no_order_and_no_repetition():
    assert parse_profile("", ["b", "a", "b"], ["c"]).canonical == parse_profile("", ["a", "b"], ["c"]).canonical


@pytest.mark.parametrize(
    "name",
    [
        *("VLLM", "gguf", "gguf:", "gguf:Q4-K", "gguf:Q4_K_M\n", "gguf:*", "gguf:Q4:K", "ggufQ4", "sglang", " "),
        *("gguf:" + "Q" * 33, "x" * 100_000, "\x1b[2J"),
    ],
)
def test_an_unknown_profile_is_refused_and_shown_safely(name):
    error = refusal(parse_profile, name, (), ())
    assert error.reason is Reason.INVALID_PATTERN
    assert len(error.message) < 300
    assert error.message.isprintable()


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "",
            "/etc/*",
            "../*",
            "a/../b",
            "..",
            "a/..",
            "a\\b",
            "a\x00",
            "a\nb",
            "\x1b[2J",
            "a\x7f",
            "\u2028",
            "\ud800",
        ),
        *("a,include=b", "x" * 257),
    ],
)
@pytest.mark.parametrize("side", ["include", "exclude"])
def test_a_pattern_that_is_none_is_refused_and_shown_safely(pattern, side):
    arguments = ([pattern], []) if side == "include" else ([], [pattern])
    error = refusal(parse_profile, "", *arguments)
    assert error.reason is Reason.INVALID_PATTERN
    assert error.message.isprintable()


def test_patterns_are_limited_in_length_and_number():
    parse_profile("", ["x" * 256], ())
    parse_profile("", ["a"] * 32, ["b"] * 32)
    error = refusal(parse_profile, "", ["a"] * 33, ["b"] * 32)
    assert error.reason is Reason.INVALID_PATTERN
    assert "65 patterns" in error.message


@pytest.mark.parametrize("name", ["vllm", "full", "gguf:Q4_K_M"])
def test_a_name_and_patterns_cannot_be_asked_for_together(name):
    error = refusal(parse_profile, name, ["*.json"], ())
    assert error.reason is Reason.INVALID_PATTERN
    assert name in error.message


@pytest.mark.parametrize(
    "profile",
    [
        Profile("vllm"),
        Profile("full"),
        Profile("gguf:Q4_K_M"),
        Profile("", ("*.json", "a=b.bin"), ()),
        Profile("", ("*.json",), ("deep/*", "*.md")),
        Profile("", (), ("*.md",)),
    ],
)
def test_what_a_selection_was_asked_for_by_can_be_asked_again(profile: Profile) -> None:
    parsed = parse_canonical(profile.canonical)
    assert parsed is not None
    assert parsed.canonical == profile.canonical


@pytest.mark.parametrize("name", ["adopted", "include=", "include=a,full", "something=else"])
def test_a_selection_that_nobody_asked_for_is_told_from_one(name: str) -> None:
    assert parse_canonical(name) is None

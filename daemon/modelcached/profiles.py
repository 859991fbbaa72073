"""Which files of a repository a runtime needs: a manifest, and one index file where there is one, become a selection.

Pure. An offline runtime loads what it finds in the snapshot's directory, so what
is selected here decides what is loaded. The order, for a named profile: choose
one kind of weights, narrow it by its index, add the weights that the runtime
reads by name, add every small file.

Facts are from the sources of vLLM 0.32.0 ("vllm/..."), transformers 5.23
("transformers/...") and sentence-transformers 6.2.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from modelcached.errors import CacheError, Reason
from modelcached.model import FileEntry, Manifest, Profile, Selection, shown

DEFAULT_PROFILE = "vllm"
MAX_PATTERNS = 64
MAX_PATTERN_CHARACTERS = 256
MAX_INDEX_BYTES = 64 * 1024 * 1024
"""The index of a model with 100,000 tensors has about 10 MiB."""

_QUANT = re.compile(r"[A-Za-z0-9_]{1,32}")
_GGUF_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_WEIGHT_INDEX = re.compile(r"\.(?:safetensors|bin)\.index\.json$")

_SAFETENSORS_INDEX = "model.safetensors.index.json"
_CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"

VLLM_SKIPPED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.mp3", "*.mp4", "*.wav", "*.flac"),
    *("*.parquet", "*.arrow", "*.ipynb", "*.zip", "*.tar*"),
)
"""What is no small file to vLLM: vllm/transformers_utils/repo_utils.py, _WEIGHT_FILE_PATTERNS, whole."""
VLLM_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""Left by a trainer: vllm/model_executor/model_loader/weight_utils.py, filter_files_not_needed_for_inference."""

_ALSO_SKIPPED = (
    # Other runtimes' weights under names that vLLM's list lacks, and a GGUF cut into pieces by hand.
    *("*.ot", "*.tflite", "*.litertlm", "*.task", "*.mlmodel", "*.mlpackage/*", "*.mlmodelc/*", "*.pb", "*.keras"),
    *("*.onnx.data", "*.onnx_data*", "*openvino*.xml", "*.ggml", "*.llamafile", "*.nemo", "*.pte", "*.engine"),
    *("*.pdparams", "*.pdiparams", "*.tensors", "*.distcp", "*.data-?????-of-?????", "*.gguf.*", "*.gguf-split-*"),
    # More assets. Not *.gz, *.npy, *.npz or *.csv: remote code reads vocabularies and filters from them.
    *("*.bmp", "*.tif", "*.tiff", "*.svg", "*.ico", "*.heic", "*.avif", "*.mov", "*.avi", "*.mkv", "*.webm"),
    *("*.m4a", "*.ogg", "*.opus", "*.aac", "*.pdf", "*.7z", "*.rar", "*.tgz"),
)
_OTHER_RUNTIMES = frozenset({"original", "onnx", "openvino", "coreml", "tflite"})
"""Root folders that hold the same model, with a tokenizer of its own, for something else."""

# No runtime needs a README, and an edit to one should not cost a file; a licence has to travel with its weights.
_DOCUMENT = re.compile(r"\.git[^/]*|.*\.md", re.IGNORECASE)
_LICENCE = re.compile(r"(?:licen[cs]e|notice|copying|use_policy).*", re.IGNORECASE)

_NOT_TORCH = ("openvino", "ggml")
"""A ``.bin`` so named is another runtime's; torch.load fails on it."""

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""vLLM takes the first that is there: vllm/lora/lora_model.py, LoRAModel.from_local_checkpoint."""
_ADAPTER_EMBEDDINGS = "new_embeddings.safetensors"
"""Read beside an adapter by earlier vLLM; 0.32 no longer looks for it."""
_TRAINER_CHECKPOINT = re.compile(r"(?:.*/)?checkpoint-\d+(?:/.*)?")
_SENTENCE_TRANSFORMERS_MODULE = re.compile(r"(?:.*/)?(?:\w+_)?\d+_[A-Za-z]\w*")
"""``2_Dense``, ``query_0_Transformer``: sentence_transformers/base/model.py (save), base/modules/router.py.
vLLM reads a Dense module's weights: vllm/model_executor/models/adapters.py, _load_dense_weights."""
_READ_BY_NAME = ("sparse_linear.pt", "colbert_linear.pt", "mask_embedding.pt", "joint_head.safetensors")
"""Beside the chosen kind: vllm/model_executor/models/ roberta.py (BGE-M3), qwen3_dflash.py, clef_omni.py."""
_FOLDERS_READ_TOGETHER = (("whisper-large-v3",), ("transformer", "vision_encoder"))
"""Second sources of weights: vllm/model_executor/models/ kimi_audio.py; cosmos3.py (allow_patterns_overrides).
Both Cosmos folders have to be there: any other diffusers pipeline is not vLLM's to load."""

_KINDS = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".tflite": "TFLite", ".ot": "Rust"} | {
    f".{kind}": kind for kind in ("safetensors", "bin", "pt", "pth", "ckpt", "gguf")
}


def _compiled(patterns: Iterable[str]) -> re.Pattern[str]:
    """Join patterns as huggingface_hub reads them: utils/_paths.py, filter_repo_objects."""
    return re.compile("|".join(fnmatch.translate(f"{text}*" if text.endswith("/") else text) for text in patterns))


_SKIPPED = _compiled(VLLM_SKIPPED + _ALSO_SKIPPED)


@dataclass(frozen=True, slots=True)
class _Weights:
    """One kind of weights in the root."""

    format: str
    names: frozenset[str]
    index: str | None = None
    """The index file of this kind, whether the repository has it or not."""
    narrowed: bool = True
    """The runtime loads only what the index names; otherwise the index only tells what must be there."""


def parse_profile(name: str, include: Sequence[str], exclude: Sequence[str]) -> Profile:
    """Turn a request's words into a profile; no name and no pattern means ``vllm``.

    Refuses (INVALID_PATTERN) an unknown name, a name beside patterns, more than
    64 patterns, and a pattern that is empty, longer than 256 characters or could
    match no path. A comma is refused because it would make Profile.canonical
    mean two things; ``?`` matches one.
    """
    if include or exclude:
        if name:
            raise _invalid(f"profile '{shown(name)}' and include/exclude patterns cannot be asked for together", name)
        if (count := len(include) + len(exclude)) > MAX_PATTERNS:
            raise _invalid(f"{count} patterns are more than the {MAX_PATTERNS} allowed", str(count))
        for pattern in (*include, *exclude):
            _check_pattern(pattern)
        return Profile("", tuple(include), tuple(exclude))
    if name in ("", "vllm", "transformers", "full"):
        return Profile(name or DEFAULT_PROFILE)
    kind, _, quant = name.partition(":")
    if kind != "gguf" or _QUANT.fullmatch(quant) is None:
        raise _invalid(f"'{shown(name)}' is not a profile", name)
    return Profile(f"gguf:{quant.upper()}")


def parse_canonical(text: str) -> Profile | None:
    """The inverse of ``Profile.canonical``; None for a selection's name that nobody can ask for."""
    parts = [part.partition("=") for part in text.split(",")]
    try:
        if all(kind in ("include", "exclude") and equals for kind, equals, _ in parts):
            chosen = {name: tuple(glob for kind, _, glob in parts if kind == name) for name in ("include", "exclude")}
            return parse_profile("", chosen["include"], chosen["exclude"])
        return parse_profile(text, (), ())
    except CacheError:
        return None


def index_file(profile: Profile, manifest: Manifest) -> FileEntry | None:
    """Name the one file whose content ``select`` needs; None where it needs none.

    Refuses (INVALID_MANIFEST) an index larger than 64 MiB.
    """
    weights = _root_weights(profile, manifest.files)
    entry = manifest.files.get(weights.index) if weights is not None and weights.index is not None else None
    if entry is not None and entry.size_bytes > MAX_INDEX_BYTES:
        raise _broken(manifest, f"{entry.path} has {entry.size_bytes} bytes, more than the {MAX_INDEX_BYTES} allowed")
    return entry


def select(profile: Profile, manifest: Manifest, index: bytes | None) -> Selection:
    """Choose the files that the profile needs; ``index`` is the content of ``index_file``.

    Raises EMPTY_SELECTION where the repository has nothing that the profile can
    use or where it would have to guess, INVALID_MANIFEST where an index can't be
    read or a weight is missing.
    """
    files = manifest.files
    if profile.include or profile.exclude or profile.name == "full":
        return Selection(profile.canonical, "any", _matching(profile, manifest))
    if profile.name.startswith("gguf:"):
        return Selection(profile.canonical, "gguf", _gguf(profile, manifest) | _small(files))

    weights = _root_weights(profile, files)
    beside = _read_by_name(files)
    if weights is None:
        if not beside:
            raise _empty(profile, manifest, f"it has no weights that this loads, only {_kinds(files)}")
        kind = next(kind for kind in ("safetensors", "bin", "pt") if any(path.endswith(kind) for path in beside))
        return Selection(profile.canonical, kind, beside | _small(files))
    chosen = weights.names
    if weights.index is not None and weights.index in files:
        named = _named(manifest, weights, index)
        chosen = (named if weights.narrowed else chosen) | {weights.index}
    return Selection(profile.canonical, weights.format, chosen | beside | _small(files))


def _root_weights(profile: Profile, files: Collection[str]) -> _Weights | None:
    """Choose the kind of weights that a named profile's runtime takes from the root."""
    if profile.include or profile.exclude or profile.name not in ("vllm", "transformers"):
        return None
    # glob("*") leaves out names that begin with a dot.
    root = {path for path in files if "/" not in path and not path.startswith(".")}
    return _vllm(root) if profile.name == "vllm" else _transformers(root)


def _vllm(root: Collection[str]) -> _Weights | None:
    """Follow vLLM's ``--load-format auto``: default_loader.py, DefaultModelLoader._prepare_weights.

    Consolidated files anywhere turn vLLM to Mistral's format, which it then looks
    for in the root alone; so those of a sub-folder are never selected.
    """
    safetensors, bins, pts = _by_suffix(root)
    if consolidated := frozenset(name for name in safetensors if name.startswith("consolidated")):
        return _Weights("consolidated", consolidated, _CONSOLIDATED_INDEX)
    if safetensors:
        return _Weights("safetensors", safetensors, _SAFETENSORS_INDEX)
    if bins:
        # vLLM reads every .bin and no index; the index still tells of a shard that is missing.
        return _Weights("bin", bins, None if "pytorch_model.bin" in bins else _BIN_INDEX, narrowed=False)
    return _Weights("pt", pts) if pts else None


def _transformers(root: Collection[str]) -> _Weights | None:
    """Follow ``from_pretrained``: transformers/modeling_utils.py, _get_resolved_checkpoint_files.

    Weights of other names come last: libraries on top of transformers name their own.
    """
    safetensors, bins, _ = _by_suffix(root)
    safetensors = frozenset(name for name in safetensors if not name.startswith("consolidated"))
    if "model.safetensors" in safetensors:
        return _Weights("safetensors", frozenset({"model.safetensors"}))
    if safetensors and _SAFETENSORS_INDEX in root:
        return _Weights("safetensors", safetensors, _SAFETENSORS_INDEX)
    if "pytorch_model.bin" in bins:
        return _Weights("bin", frozenset({"pytorch_model.bin"}))
    if bins and _BIN_INDEX in root:
        return _Weights("bin", bins, _BIN_INDEX)
    if safetensors or bins:
        return _Weights("safetensors" if safetensors else "bin", safetensors or bins)
    return None


def _by_suffix(names: Iterable[str]) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Sort into safetensors, ``.bin`` and ``.pt``, without what a trainer or another runtime left."""
    usable = [name for name in names if not name.endswith(VLLM_TRAINING)]
    return (
        frozenset(name for name in usable if name.endswith(".safetensors")),
        frozenset(name for name in usable if name.endswith(".bin") and not name.startswith(_NOT_TORCH)),
        frozenset(name for name in usable if name.endswith(".pt")),
    )


def _named(manifest: Manifest, weights: _Weights, index: bytes | None) -> frozenset[str]:
    """Read the weights that the index names: weight_utils.py, filter_duplicate_safetensors_files."""
    if index is None:
        raise ValueError(f"select needs the content of {weights.index}")
    try:
        values = list(json.loads(index)["weight_map"].values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise _broken(manifest, f"{weights.index} is not a weight index ({type(error).__name__})") from error
    if not values:
        raise _broken(manifest, f"{weights.index} names no weight")
    for value in values:
        if not isinstance(value, str) or "/" in value or "\\" in value or value in ("", ".", ".."):
            raise _broken(manifest, f"{weights.index} names '{shown(str(value))}', which is not a file of the root")
    named = frozenset(values)
    if missing := sorted(named - weights.names):
        told = f"{weights.index} names {len(missing)} weights that the repository lacks"
        raise _broken(manifest, f"{told}: {_listed(missing)}")
    return named


def _read_by_name(files: Collection[str]) -> frozenset[str]:
    """Find the weights that are read beside the root's: adapters, modules, second sources (with their indexes)."""
    folders: dict[str, set[str]] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    sources = {folder for group in _FOLDERS_READ_TOGETHER if set(group) <= folders.keys() for folder in group}
    if "modules.json" in files:
        sources.update(folder for folder in folders if _SENTENCE_TRANSFORMERS_MODULE.fullmatch(folder))

    found = {name for name in _READ_BY_NAME if name in files}
    for folder, names in folders.items():
        if folder.partition("/")[0] in _OTHER_RUNTIMES or _TRAINER_CHECKPOINT.fullmatch(folder):
            continue
        here: set[str] = set()
        if "adapter_config.json" in names:
            here.update([name for name in _ADAPTER_WEIGHTS if name in names][:1])
            here.update(names & {_ADAPTER_EMBEDDINGS})
        if folder in sources:
            kinds = _by_suffix(name for name in names if not name.startswith("consolidated"))
            here.update(next(filter(None, kinds), ()))
            here.update(name for name in names if here and _WEIGHT_INDEX.search(name))
        found.update(f"{folder}/{name}" if folder else name for name in here)
    return frozenset(found)


def _small(files: Iterable[str]) -> frozenset[str]:
    """Choose configs, tokenizers, templates, code: like vLLM, all that is not known to be something else."""
    return frozenset(path for path in files if _is_small(path))


def _is_small(path: str) -> bool:
    name = path.rpartition("/")[2]
    if path.partition("/")[0] in _OTHER_RUNTIMES or _SKIPPED.match(path.lower()):
        return False
    # The index of weights that are not selected would promise what the snapshot lacks.
    return bool(_LICENCE.fullmatch(name)) or not (_DOCUMENT.fullmatch(name) or _WEIGHT_INDEX.search(name))


def _matching(profile: Profile, manifest: Manifest) -> frozenset[str]:
    include, exclude = _compiled(profile.include or ("*",)), _compiled(profile.exclude)
    matched = frozenset(
        path for path in manifest.files if include.match(path) and not (profile.exclude and exclude.match(path))
    )
    if not matched:
        raise _empty(profile, manifest, f"none of its {len(manifest.files)} files matches")
    return matched


def _gguf(profile: Profile, manifest: Manifest) -> frozenset[str]:
    """Choose the one model of the quantisation: a file, or all shards of one.

    The quantisation is a whole word of the file's name or, where no name has it,
    of its folder's. Projectors (mmproj) are left out: repositories hold one a
    precision, which a quantisation doesn't tell apart, and text needs none. Two
    models are refused, since a choice would be a guess.
    """
    quant = profile.name.partition(":")[2]
    ggufs = [path for path in manifest.files if path.lower().endswith(".gguf") and "mmproj" not in path.lower()]
    found = [path for path in ggufs if quant in _words(path.rpartition("/")[2])]
    found = found or [path for path in ggufs if quant in _words(path.rpartition("/")[0])]
    if not found:
        raise _empty(profile, manifest, f"it has only {_listed(_models(ggufs)) or _kinds(manifest.files)}")
    if len(models := _models(found)) > 1:
        raise _empty(profile, manifest, f"{len(models)} models have that quantisation: {_listed(models)}")
    if (shard := _GGUF_SHARD.search(found[0])) and len(found) != int(shard[1]):
        raise _broken(manifest, f"{shown(found[0])} is one of {int(shard[1])} shards, of which {len(found)} are there")
    return frozenset(found)


def _models(ggufs: Iterable[str]) -> set[str]:
    return {_GGUF_SHARD.sub(r" in \1 shards", path) for path in ggufs}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Z0-9_]+", text.upper()))


def _listed(paths: Collection[str], limit: int = 8) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(shown(path) for path in sorted(paths)[:limit]) + more


def _kinds(files: Iterable[str]) -> str:
    """Name the kinds of weights that a repository holds, for a message."""
    kinds = set()
    for path in files:
        stem, dot, suffix = path.rpartition(".")
        if kind := _KINDS.get(dot + suffix.lower()):
            kinds.add(f"{kind} in sub-folders" if "/" in stem else kind)
    return ", ".join(sorted(kinds)) or "files that are no weights"


def _check_pattern(pattern: str) -> None:
    valid = (
        0 < len(pattern) <= MAX_PATTERN_CHARACTERS
        and pattern.isprintable()
        and not any(character in pattern for character in "\\,")
        and not pattern.startswith("/")
        and ".." not in pattern.split("/")
    )
    if not valid:
        raise _invalid(f"'{shown(pattern)}' is not a pattern for the paths of a repository", pattern)


def _invalid(message: str, value: str) -> CacheError:
    return CacheError(Reason.INVALID_PATTERN, message, metadata={"value": shown(value)})


def _empty(profile: Profile, manifest: Manifest, why: str) -> CacheError:
    asked = shown(profile.canonical, 200)
    message = f"profile {asked} selects nothing in {manifest.repo_id}: {why}"
    return CacheError(Reason.EMPTY_SELECTION, message, metadata={"profile": asked, "repo_id": manifest.repo_id})


def _broken(manifest: Manifest, what: str) -> CacheError:
    return CacheError(Reason.INVALID_MANIFEST, f"in {manifest.repo_id} {what}", metadata={"repo_id": manifest.repo_id})

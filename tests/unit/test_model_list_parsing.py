"""The model list as people write it: what is right is taken, and what is wrong is named by entry, key and value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from modelcached.model import Profile
from modelcached.modellist import MAX_BYTES, MAX_MODELS, ListedModel, ModelListError, parse, read

YAML = """
# what this node holds
models:
  - repo: org/name
  - {repo: gpt2, revision: v1.0, profile: "gguf:q4_k_m", priority: -3}
  - repo: org/name
    revision: dev
    include: ["*.json", "*.safetensors"]
    exclude: [original/*]
    priority: 10
"""
TOML = """
[[models]]
repo = "org/name"
[[models]]
repo = "gpt2"
revision = "v1.0"
profile = "gguf:q4_k_m"
priority = -3
[[models]]
repo = "org/name"
revision = "dev"
include = ["*.json", "*.safetensors"]
exclude = ["original/*"]
priority = 10
"""
LISTED = [
    ("org/name", "main", Profile("vllm"), 0),
    ("gpt2", "v1.0", Profile("gguf:Q4_K_M"), -3),
    ("org/name", "dev", Profile("", ("*.json", "*.safetensors"), ("original/*",)), 10),
]


def values(listed: tuple[ListedModel, ...]) -> list[tuple[str, str, Profile, int]]:
    return [(entry.repo_id, entry.revision, entry.profile, entry.priority) for entry in listed]


def refused(text: str, suffix: str = ".yaml") -> list[str]:
    with pytest.raises(ModelListError) as caught:
        parse(text, suffix)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("text", "suffix"), [(YAML, ".yaml"), (YAML, ".yml"), (TOML, ".toml"), (TOML, ".TOML")])
def test_a_list_is_what_it_says_in_its_order_and_with_defaults(text: str, suffix: str) -> None:
    assert values(parse(text, suffix)) == LISTED


@pytest.mark.parametrize(("text", "suffix"), [("models: []", ".yaml"), ("models = []", ".toml")])
def test_an_empty_list_says_so(text: str, suffix: str) -> None:
    assert parse(text, suffix) == ()


@pytest.mark.parametrize("text", ["", "\n", "models:", "# all gone\n", "- repo: org/name", "5"])
def test_a_file_that_is_not_yet_written_or_says_nothing_is_no_empty_list(text: str) -> None:
    (line,) = refused(text)
    assert line.startswith("says no models; an empty list is written as")
    assert refused("", ".toml") == [line]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("repo: a b", "model 2 (a b).repo: 'a b' is not a repository id"),
        ("repo: ../x", "model 2 (../x).repo: '../x' is not a repository id"),
        ("repo: 7", "model 2.repo: Input should be a valid string (it is 7)"),
        ("revision: main", "model 2.repo: Field required (it is a dict)"),
        ("{repo: org/a, revision: 1.0}", "model 2 (org/a).revision: Input should be a valid string (it is 1.0)"),
        ("{repo: org/a, revision: a..b}", "model 2 (org/a).revision: 'a..b' is not a revision"),
        ("{repo: org/a, revision: ''}", "model 2 (org/a).revision: String should have at least 1 character (it is '')"),
        ("{repo: org/a, profil: full}", "model 2 (org/a).profil: no such key"),
        ("{repo: org/a, profile: fast}", "model 2 (org/a): 'fast' is not a profile"),
        ("{repo: org/a, include: '*.json'}", "model 2 (org/a).include: Input should be a valid list (it is '*.json')"),
        ("{repo: org/a, include: ['a,b']}", "model 2 (org/a): 'a,b' is not a pattern for the paths of a repository"),
        (
            "{repo: org/a, profile: full, exclude: ['*.bin']}",
            "model 2 (org/a): profile 'full' and include/exclude patterns cannot be asked for together",
        ),
        ("{repo: org/a, priority: high}", "model 2 (org/a).priority: Input should be a valid integer (it is 'high')"),
        ("{repo: org/a, priority: true}", "model 2 (org/a).priority: Input should be a valid integer (it is True)"),
        ("{repo: org/a, priority: 1.5}", "model 2 (org/a).priority: Input should be a valid integer (it is 1.5)"),
        ("org/a", "model 2: is no model: write for example {repo: org/name} (it is 'org/a')"),
        ("{repo: org/first, revision: main, priority: 5}", "model 2: org/first@main (vllm) is model 1 already"),
        ("{repo: org/a, repo: org/b}", "line 3, column 18: the key 'repo' is there twice"),
        ("{repo: org/a", "line 4, column 1: expected ',' or '}', but got '<stream end>'"),
        ("{repo: !!python/object:os.system x}", "line 3, column 11: could not determine a constructor for the tag"),
    ],
)
def test_what_is_wrong_is_named_by_place_and_value(entry: str, told: str) -> None:
    (line,) = refused(f"models:\n - repo: org/first\n - {entry}\n")
    assert line.startswith(told)
    assert len(line) < len(told) + 60


def test_all_that_is_wrong_is_told_at_once_and_beside_the_models_too() -> None:
    assert refused("model: []\nmodels: [{repo: a b}, {repo: org/a, x: 1}]") == [
        "model 1 (a b).repo: 'a b' is not a repository id",
        "model 2 (org/a).x: no such key",
        "model: no such key",
    ]


def test_toml_that_is_none_is_told_by_its_line() -> None:
    (line,) = refused("[[models]]\nrepo = org/name\n", ".toml")
    assert line == "Invalid value (at line 2, column 8)"


def test_another_format_is_not_guessed_at() -> None:
    assert refused('{"models": []}', ".json") == ["its name must end in .toml, .yaml, .yml, not in '.json'"]


def test_the_same_repository_may_be_listed_by_other_revisions_and_profiles() -> None:
    text = "models: [{repo: org/a}, {repo: org/a, revision: dev}, {repo: org/a, profile: full}]"
    assert len({entry.key for entry in parse(text, ".yaml")}) == 3


def test_anchors_spare_repetition() -> None:
    text = "models:\n - &a {repo: org/a, priority: 4}\n - {<<: *a, repo: org/b}"
    assert values(parse(text, ".yaml"))[1] == ("org/b", "main", Profile("vllm"), 4)


def test_a_bomb_of_aliases_or_of_brackets_costs_nothing() -> None:
    layers = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    for use in ("models: *l29", "models: [*l29]", "models: [{repo: *l29, include: *l29}]"):
        lines = refused(f"l0: &l0 [x]\n{layers}{use}\n")
        assert len(lines) == 11
        assert max(map(len, lines)) < 200
    assert refused("[" * 100_000) == ["is nested too deeply"]
    assert refused(f"models = {'[' * 100_000}", ".toml")[0].startswith(("is nested too deeply", "TOML"))


def test_more_than_a_node_can_use_is_refused() -> None:
    many = "".join(f" - repo: org/m{number}\n" for number in range(MAX_MODELS + 1))
    (line,) = refused(f"models:\n{many}")
    assert line.startswith(f"models: List should have at most {MAX_MODELS} items")


# The file


def why(file: Path) -> str:
    with pytest.raises(ModelListError) as caught:
        read(file)
    return str(caught.value)


def test_a_file_is_read_by_its_suffix_through_links(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(TOML)
    (tmp_path / "models.toml").symlink_to("data")
    assert values(read(tmp_path / "models.toml")) == LISTED


def test_a_file_that_cannot_be_read_says_why_and_is_not_waited_for(tmp_path: Path) -> None:
    assert why(tmp_path / "none.yaml") == "no such file"
    (tmp_path / "directory.yaml").mkdir()
    assert why(tmp_path / "directory.yaml") == "not a file"
    os.mkfifo(tmp_path / "pipe.yaml")
    assert why(tmp_path / "pipe.yaml") == "not a file"
    (tmp_path / "dangling.yaml").symlink_to("none")
    assert why(tmp_path / "dangling.yaml") == "no such file"
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert why(tmp_path / "loop.yaml") in ("no such file", "Too many levels of symbolic links")
    (tmp_path / "latin.yaml").write_bytes(b"models: [{repo: \xff}]")
    assert why(tmp_path / "latin.yaml").startswith("is not UTF-8")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    assert why(tmp_path / "large.yaml") == f"is larger than {MAX_BYTES} bytes"

"""What comes from outside becomes a value, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from modelcached.errors import CacheError, Reason
from modelcached.model import (
    Algorithm,
    Digest,
    FileEntry,
    Manifest,
    Profile,
    as_commit,
    is_token,
    parse_path,
    parse_repo_id,
    parse_revision,
    repo_folder,
    repo_id_of_folder,
    shown,
)

SHA = "0123456789abcdef0123456789abcdef01234567"


def refusal(parse: Callable[[str], object], text: str) -> CacheError:
    with pytest.raises(CacheError) as caught:
        parse(text)
    return caught.value


@pytest.mark.parametrize("text", ["gpt2", "org/name", "Qwen/Qwen2.5-7B-Instruct", "a_b/c.d", "0/1", "o/" + "n" * 96])
def test_a_repository_id_of_the_hub_is_taken(text: str) -> None:
    assert parse_repo_id(text) == text
    assert repo_id_of_folder(repo_folder(parse_repo_id(text))) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "/", "org/", "/name", "a/b/c", "../../etc", "..", "org/..", "-org/name", "org/name-", "org/.name",
        "org/na--me", "org/na..me", "org/name.git", "org\\name", "org/na me", "org/na\x00me", "org/na\nme", "org/näme",
        "org/" + "n" * 97, "x" * 1_048_576, "org/name\n", "models--org--name/x",
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name_and_shown_safely(text: str) -> None:
    error = refusal(parse_repo_id, text)
    assert error.reason is Reason.INVALID_REPO_ID
    assert error.message.isprintable()
    assert len(error.message) < 300


@pytest.mark.parametrize("text", ["main", "v1.0", "refs/pr/1", "feature/x-y_z", SHA, "release+1", "a" * 255])
def test_a_revision_is_what_could_be_a_file_below_refs(text: str) -> None:
    assert parse_revision(text) == text


@pytest.mark.parametrize(
    "text", ["..", "a/../b", "/main", "main/", "a//b", ".hidden", "a.lock", "a\x00", "a b", "-x", "a" * 256]
)
def test_any_other_revision_is_refused(text: str) -> None:
    assert refusal(parse_revision, text).reason is Reason.INVALID_REVISION


def test_no_revision_is_main() -> None:
    assert parse_revision("") == "main"


@pytest.mark.parametrize("text", [SHA.upper(), SHA[:39], SHA + "0", "main", SHA + "\n", "g" * 40])
def test_a_commit_is_40_lower_case_hex_digits(text: str) -> None:
    assert as_commit(SHA) == SHA
    assert as_commit(text) is None


@pytest.mark.parametrize(
    "text", ["config.json", "a/b/c.bin", "model 1.bin", "ünïcode.txt", ".gitattributes", "x" * 255]
)
def test_a_path_that_stays_inside_is_taken(text: str) -> None:
    assert parse_path(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\x00b", "a\nb", "\x1b[2J", "x" * 256,
     "/".join(["d" * 200] * 6), "\ud800", "a\u2028b"],
)  # fmt: skip
def test_a_path_that_could_leave_or_is_no_file_name_is_refused(text: str) -> None:
    error = refusal(parse_path, text)
    assert error.reason is Reason.INVALID_MANIFEST
    assert error.message.isprintable()


def entry(path: str) -> FileEntry:
    return FileEntry(path, 1, Digest(Algorithm.GIT_SHA1, SHA), SHA)


@pytest.mark.parametrize(
    "paths", [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"], ["../x"], ["a\nb"], ["b", "a\nb"], ["a/../b"], ["x" * 256]]
)
def test_a_manifest_that_contradicts_itself_is_refused(paths: list[str]) -> None:
    commit = as_commit(SHA)
    assert commit is not None
    error = refusal(lambda _: Manifest.of(parse_repo_id("org/name"), commit, [entry(p) for p in paths]), "")
    assert error.reason is Reason.INVALID_MANIFEST


def test_a_digest_is_known_by_its_length() -> None:
    assert Digest.parse("a" * 64) == Digest(Algorithm.SHA256, "a" * 64)
    assert Digest.parse(SHA) == Digest(Algorithm.GIT_SHA1, SHA)
    for text in ("", "a" * 63, "A" * 64, "a" * 64 + "\n", f"{SHA}.incomplete"):
        assert Digest.parse(text) is None


def test_many_digests_are_known_as_each_is() -> None:
    texts = ["a" * 64, SHA, "", "a" * 63, "A" * 64, "b" * 64 + "\n", f"{SHA}.incomplete", "c" * 40]
    each = {text: digest for text in texts if (digest := Digest.parse(text)) is not None}
    assert Digest.parse_all(texts) == each
    assert Digest.parse_all(each) == each
    assert len(each) == 3


def test_paths_that_are_plain_and_others_make_one_manifest() -> None:
    commit = as_commit(SHA)
    assert commit is not None
    for paths in (["a", "b/c.json"], ["a", "model 1.bin", "ünïcode.txt"], []):
        manifest = Manifest.of(parse_repo_id("org/name"), commit, [entry(path) for path in paths])
        assert list(manifest.files) == paths


@pytest.mark.parametrize(
    "name", ["models--", "datasets--org--name", "models--a--b--c", "models--..", "x", "models----"]
)
def test_a_folder_that_is_no_repositorys_is_told(name: str) -> None:
    assert repo_id_of_folder(name) is None


def test_a_profile_has_one_text_a_meaning() -> None:
    assert Profile("gguf:Q4_K_M").canonical == "gguf:Q4_K_M"
    assert Profile(include=("b", "a", "a"), exclude=("c",)).canonical == "include=a,include=b,exclude=c"


@pytest.mark.parametrize("text", ["hf_abc123", "x" * 4096, "ey.J-_~+/="])
def test_a_token_is_one_word_of_visible_ascii(text: str) -> None:
    assert is_token(text)


@pytest.mark.parametrize("text", ["", "a b", "a\nb", "a\r", "snow\u2603", "a\x7f", "x" * 4097, "\x00"])
def test_what_could_be_no_header_is_no_token(text: str) -> None:
    assert not is_token(text)


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb", "\x9b2J", "x" * 10_000, "\u2028"])
def test_what_is_shown_is_short_and_on_one_line(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text)) < 200

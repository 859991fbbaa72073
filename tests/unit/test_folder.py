"""Where a model lies in a directory, and what that says of it: read from what the real library makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub._local_folder import write_download_metadata
from modelcached.errors import CacheError, Reason
from modelcached.model import Digest, FileEntry, RepoId, Revision
from modelcached.sources.folder import find, look
from modelcached.store.layout import link_text

REPO = RepoId("org/name")
MAIN = Revision("main")
ONE, TWO = "1" * 40, "2" * 40
LARGE, SMALL = "a" * 64, "b" * 40


def entry(path: str, size: int, digest: str) -> FileEntry:
    parsed = Digest.parse(digest)
    assert parsed is not None
    return FileEntry(path, size, parsed, digest)


WEIGHTS, CONFIG = entry("model.safetensors", 4, LARGE), entry("deep/config.json", 2, SMALL)


def cache(root: Path, *commits: str, main: str = ONE) -> Path:
    """As huggingface_hub lays it out (file_download.py)."""
    repo = root / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / LARGE).write_bytes(b"1234")
    (repo / "blobs" / SMALL).write_bytes(b"{}")
    for commit in commits:
        for file in (WEIGHTS, CONFIG):
            link = repo / "snapshots" / commit / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(link_text(file.path, file.digest))
    if main:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(main)
    return repo


def plain(folder: Path, *, told: bool = True, commit: str = ONE) -> Path:
    """As ``hf download --local-dir`` leaves it."""
    for file, content in ((WEIGHTS, b"1234"), (CONFIG, b"{}")):
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(content)
        if told:
            write_download_metadata(folder, file.path, commit, file.digest.hex)
    return folder


@pytest.mark.parametrize("at", ["", "hub"])
def test_a_cache_says_what_its_snapshot_is(tmp_path: Path, at: str) -> None:
    repo = cache(tmp_path / at, ONE, TWO, main=TWO)
    for path in (tmp_path, tmp_path / at, repo):
        folder = find(str(path), REPO, MAIN)
        assert (folder.commit, folder.repo) == (TWO, str(repo))
        says = folder.says(REPO)
        assert says is not None
        assert says.files == {file.path: file for file in (WEIGHTS, CONFIG)}
        assert says.local
        assert folder.locate(WEIGHTS) == f"{repo}/blobs/{LARGE}"
    assert find(str(tmp_path), REPO, Revision(ONE)).commit == ONE


def test_what_hf_download_left_says_it_too(tmp_path: Path) -> None:
    folder = find(str(plain(tmp_path)), REPO, MAIN)
    says = folder.says(REPO)
    assert (folder.commit, folder.repo) == (ONE, "")
    assert says is not None
    assert says.files == {file.path: file for file in (WEIGHTS, CONFIG)}
    (tmp_path / "mine.txt").write_text("not of the repository")
    assert set(folder.says(REPO).files) == {WEIGHTS.path, CONFIG.path}  # type: ignore[union-attr]
    write_download_metadata(tmp_path, CONFIG.path, TWO, CONFIG.digest.hex)
    assert find(str(tmp_path), REPO, MAIN).commit is None, "files of two commits are neither"


def test_a_folder_that_says_nothing_has_files_all_the_same(tmp_path: Path) -> None:
    folder = find(str(plain(tmp_path, told=False)), REPO, MAIN)
    assert folder.commit is None
    assert folder.says(REPO) is None
    assert folder.locate(WEIGHTS) == f"{tmp_path}/{WEIGHTS.path}"
    assert folder.locate(entry(WEIGHTS.path, 5, LARGE)) is None
    assert folder.locate(entry("none", 5, LARGE)) is None


def test_a_revision_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    cache(tmp_path, ONE, TWO)
    with pytest.raises(CacheError, match="has no snapshot of dev") as refused:
        find(str(tmp_path), REPO, Revision("dev"))
    assert refused.value.reason is Reason.INVALID_REQUEST
    assert refused.value.mend == f"its commits are: {ONE}, {TWO}"


def test_a_cache_without_refs_means_the_only_commit_it_has(tmp_path: Path) -> None:
    cache(tmp_path / "one", ONE, main="")
    assert find(str(tmp_path / "one"), REPO, MAIN).commit == ONE
    cache(tmp_path / "two", ONE, TWO, main="")
    with pytest.raises(CacheError):
        find(str(tmp_path / "two"), REPO, MAIN)


def test_directories_are_looked_through_in_their_order(tmp_path: Path) -> None:
    cached, tree = tmp_path / "cache", tmp_path / "tree"
    cache(cached, ONE)
    plain(tree / "org" / "name", commit=TWO)
    directories = [tmp_path / "none", tree, cached]
    assert [folder.commit for folder in look(directories, REPO, MAIN)] == [TWO, ONE]
    assert look(directories, RepoId("org/other"), MAIN) == []
    of_one = look(directories, REPO, Revision(ONE))
    assert [folder.commit for folder in of_one] == [None, ONE]
    of_none = look([cached], REPO, Revision("3" * 40))
    assert [folder.commit for folder in of_none] == [None]
    assert of_none[0].locate(WEIGHTS) == f"{cached}/models--org--name/blobs/{LARGE}", "the same blob in another commit"


def test_what_others_put_there_is_not_waited_for_or_followed(tmp_path: Path) -> None:
    repo = cache(tmp_path, ONE)
    ref, secret = repo / "refs" / "main", tmp_path / "secret"
    ref.unlink()
    os.mkfifo(ref)
    assert find(str(tmp_path), REPO, MAIN).commit == ONE, "its only commit; nobody waits for who never writes"
    ref.unlink()
    secret.write_text(TWO)
    ref.symlink_to(secret)
    assert find(str(tmp_path), REPO, MAIN).commit == ONE
    (repo / "snapshots" / ONE / "broken").symlink_to("nowhere")
    says = find(str(tmp_path), REPO, MAIN).says(REPO)
    assert says is not None
    assert set(says.files) == {WEIGHTS.path, CONFIG.path}

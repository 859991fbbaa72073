"""The JSON the Hub's API answers with, built from a commit. See protocol.py for who reads which field."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from .content import HubFile
from .repos import Commit, Repo

Json = dict[str, object]

_SAFE_SCAN: Json = {"status": "safe", "avScan": None, "pickleImportScan": None}
_INFO_DEFAULTS: Json = {"disabled": False, "downloads": 0, "likes": 0, "tags": ["region:us"], "spaces": []}


def timestamp(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def model_info(repo: Repo, commit: Commit, *, blobs: bool) -> Json:
    """`/api/models/{repo}`; with `blobs` each sibling carries size, blobId and lfs."""
    files = [*commit.files.items(), *((entry.path, file) for entry, file in repo.hostile)]
    return {
        "_id": hashlib.sha1(repo.repo_id.encode()).hexdigest()[:24],
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.repo_id.partition("/")[0],
        "sha": commit.sha,
        "lastModified": timestamp(commit),
        "createdAt": "2026-01-01T00:00:00.000Z",
        "private": repo.private,
        "gated": repo.gated,
        "usedStorage": sum(file.size for file in commit.files.values()),
        **_INFO_DEFAULTS,
        "siblings": [_sibling(path, file, blobs=blobs) for path, file in files],
    }


def _sibling(path: str, file: HubFile, *, blobs: bool) -> Json:
    sibling: Json = {"rfilename": path}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.git_sha1}
        if file.sha256 is not None:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return sibling


def tree(repo: Repo, commit: Commit, below: str, *, recursive: bool, expand: bool) -> list[Json] | None:
    """`/api/models/{repo}/tree/{rev}[/{below}]`: entries sorted by path, or None if there is no such folder."""
    prefix = f"{below.rstrip('/')}/" if below else ""
    inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
    if prefix and not inside:
        return None
    folders = sorted({folder for path in inside for folder in _folders(path, prefix)})
    entries = [(path, file_entry(path, file)) for path, file in inside.items()]
    entries += [(folder, _folder_entry(folder, commit.files)) for folder in folders]
    if not recursive:
        entries = [(path, entry) for path, entry in entries if "/" not in path.removeprefix(prefix)]
    listed = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
    if not prefix:
        listed += [
            file_entry(entry.path, file) if entry.entry_type == "file" else _folder_entry(entry.path, {})
            for entry, file in repo.hostile
        ]
    return [_expanded(entry, commit) for entry in listed] if expand else listed


def paths_info(commit: Commit, paths: list[str], *, expand: bool) -> list[Json]:
    """`POST /api/models/{repo}/paths-info/{rev}`: unknown paths are left out."""
    folders = {folder for path in commit.files for folder in _folders(path, "")}
    found = [
        file_entry(path, commit.files[path]) if path in commit.files else _folder_entry(path, commit.files)
        for path in paths
        if path in commit.files or path in folders
    ]
    return [_expanded(entry, commit) for entry in found] if expand else found


def file_entry(path: str, file: HubFile) -> Json:
    """One file of a tree listing."""
    entry: Json = {"type": "file", "oid": file.git_sha1, "size": file.size, "path": path}
    if file.sha256 is not None:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    if file.xet_hash is not None:
        entry["xetHash"] = file.xet_hash
    return entry


def _folder_entry(folder: str, files: Mapping[str, HubFile]) -> Json:
    inside = [f"{path}\0{file.git_sha1}" for path, file in files.items() if path.startswith(f"{folder}/")]
    oid = hashlib.sha1("\n".join([folder, *inside]).encode("utf-8", "surrogatepass")).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": folder}


def _folders(path: str, prefix: str) -> Iterator[str]:
    for parent in PurePosixPath(path).parents:
        folder = str(parent)
        if folder != "." and folder.startswith(prefix):
            yield folder


def _expanded(entry: Json, commit: Commit) -> Json:
    last = {"id": commit.sha, "title": commit.title, "date": timestamp(commit)}
    more: Json = {"lastCommit": last}
    if entry["type"] == "file":
        more["securityFileStatus"] = _SAFE_SCAN
    return entry | more


def refs(repo: Repo, *, include_pull_requests: bool) -> Json:
    """`/api/models/{repo}/refs`."""
    named = sorted(repo.branches.items())
    answer: Json = {
        "branches": [_ref(name, f"refs/heads/{name}", sha) for name, sha in named if not name.startswith("refs/")],
        "converts": [],
        "tags": [_ref(name, f"refs/tags/{name}", sha) for name, sha in sorted(repo.tags.items())],
    }
    if include_pull_requests:
        pulls = [(name, sha) for name, sha in named if name.startswith("refs/pr/")]
        answer["pullRequests"] = [_ref(name.removeprefix("refs/pr/"), name, sha) for name, sha in pulls]
    return answer


def _ref(name: str, ref: str, sha: str) -> Json:
    return {"name": name, "ref": ref, "targetCommit": sha}


def commit_entry(commit: Commit) -> Json:
    """One commit of `/api/models/{repo}/commits/{rev}`."""
    authors = [{"user": "test-hub"}]
    return {"id": commit.sha, "title": commit.title, "message": "", "authors": authors, "date": timestamp(commit)}


def whoami(token: str) -> Json:
    """`/api/whoami-v2` of a valid token."""
    name = hashlib.sha1(token.encode()).hexdigest()[:8]
    access = {"displayName": "test", "role": "read", "createdAt": "2026-01-01T00:00:00.000Z"}
    return {
        "type": "user",
        "id": name,
        "name": f"user-{name}",
        "fullname": f"User {name}",
        "email": None,
        "emailVerified": True,
        "canPay": False,
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": access},
    }

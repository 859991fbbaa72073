"""Gated, private, unknown: the errors the real huggingface_hub makes of the test Hub's answers."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub import Hub

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def api(hub: Hub) -> HfApi:
    hub.tokens |= {"hf_good", "hf_other"}
    return HfApi(hub.endpoint)


def test_a_gated_repo_wants_an_accepted_token(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    repo = hub.create_repo("org/gated", gated=True)
    repo.commit(FILES)
    repo.allow("hf_good")
    assert api.model_info("org/gated").gated == "auto"
    for token in (False, "hf_other"):
        with pytest.raises(GatedRepoError):
            api.auth_check("org/gated", token=token)
        with pytest.raises(GatedRepoError):
            hf_hub_download("org/gated", "config.json", token=token, cache_dir=tmp_path, endpoint=hub.endpoint)
        with pytest.raises(GatedRepoError):
            snapshot_download("org/gated", token=token, cache_dir=tmp_path, endpoint=hub.endpoint)
    statuses = {record.status for record in hub.requests() if record.file == "auth-check"}
    assert statuses == {401, 403}
    api.auth_check("org/gated", token="hf_good")
    snapshot_download("org/gated", token="hf_good", cache_dir=tmp_path, endpoint=hub.endpoint)
    repo.disallow("hf_good")
    with pytest.raises(GatedRepoError):
        api.auth_check("org/gated", token="hf_good")


def test_a_private_repo_looks_unknown(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    repo = hub.create_repo("org/private", private=True)
    repo.commit(FILES)
    repo.allow("hf_good")
    for name in ("org/private", "org/unknown"):
        for token, status in ((False, 401), ("hf_other", 404)):
            with pytest.raises(RepositoryNotFoundError) as raised:
                api.model_info(name, token=token)
            assert raised.value.response.status_code == status
            with pytest.raises(RepositoryNotFoundError):
                api.auth_check(name, token=token)
            with pytest.raises(RepositoryNotFoundError):
                snapshot_download(name, token=token, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert api.model_info("org/private", token="hf_good").private
    snapshot_download("org/private", token="hf_good", cache_dir=tmp_path, endpoint=hub.endpoint)


def test_a_bad_token_is_refused_even_for_a_public_repo(hub: Hub, api: HfApi) -> None:
    hub.create_repo("org/public").commit(FILES)
    with pytest.raises(HfHubHTTPError) as raised:
        api.model_info("org/public", token="hf_bad")
    assert raised.value.response.status_code == 401
    assert not isinstance(raised.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError):
        api.whoami(token="hf_bad")
    assert api.whoami(token="hf_good")["auth"]["accessToken"]["role"] == "read"


def test_unknown_revisions_and_files(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    sha = hub.create_repo("org/model").commit(FILES)
    for revision in ("nope", "feature/nope", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("org/model", revision=revision)
        with pytest.raises(RevisionNotFoundError):
            list(api.list_repo_tree("org/model", revision=revision))
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download("org/model", "config.json", revision=revision, cache_dir=tmp_path, endpoint=hub.endpoint)
    with pytest.raises(RemoteEntryNotFoundError) as raised:
        hf_hub_download("org/model", "nope.json", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert raised.value.response.headers["X-Repo-Commit"] == sha
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/model", "no/such/folder"))


def test_tokens_never_reach_the_cdn_and_would_be_seen_there(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    repo = hub.create_repo("org/gated", gated="manual")
    repo.commit(FILES)
    repo.allow("hf_good")
    snapshot_download("org/gated", token="hf_good", cache_dir=tmp_path, endpoint=hub.endpoint)
    by_kind = {kind: {r.authorization for r in hub.requests() if r.kind == kind} for kind in ("api", "resolve", "cdn")}
    assert by_kind == {"api": {"Bearer hf_good"}, "resolve": {"Bearer hf_good"}, "cdn": {None}}


def test_a_deleted_repo_is_unknown(hub: Hub, api: HfApi) -> None:
    hub.create_repo("org/model").commit(FILES)
    hub.delete_repo("org/model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/model", token="hf_good")

"""The double itself, through calls of `huggingface_hub` that the library does not use."""

from __future__ import annotations

import os

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.conftest import CLIENT, PROVIDER, READER


@pytest.fixture
def api(hub):
    api = HfApi(token=PROVIDER)
    api.create_repo("acme/x")
    return api


def test_accounts(hub):
    assert HfApi(token=CLIENT).whoami()["name"] == "carl"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_unknown").whoami()


def test_repositories_come_and_go(hub, api):
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("acme/x")
    assert api.repo_exists("acme/x") and not api.repo_exists("acme/y")
    for token in (CLIENT, READER):
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).create_repo("acme/y")
    api.delete_repo("acme/x")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("acme/x")
    api.delete_repo("acme/x", missing_ok=True)


def test_settings_make_private_and_gated(hub, api):
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="acme/x")
    api.update_repo_settings("acme/x", gated="manual")
    assert HfApi(token=CLIENT).model_info("acme/x").gated == "manual"
    with pytest.raises(GatedRepoError):
        get_hf_file_metadata(hf_hub_url("acme/x", "a.json"), token=CLIENT)
    api.update_repo_settings("acme/x", private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=CLIENT).model_info("acme/x")


def test_operations_of_a_commit(hub, api):
    content = os.urandom(1000)
    add = [CommitOperationAdd(name, content) for name in ("w.safetensors", "folder/a.json", "folder/b.json")]
    first = api.create_commit("acme/x", add, commit_message="add")
    change = [
        CommitOperationCopy("w.safetensors", "copy.safetensors"),
        CommitOperationCopy("folder/a.json", "c.json"),
        CommitOperationDelete("folder/"),
    ]
    api.create_commit("acme/x", change, commit_message="change")
    assert set(api.list_repo_files("acme/x")) == {".gitattributes", "w.safetensors", "copy.safetensors", "c.json"}
    assert [commit.title for commit in api.list_repo_commits("acme/x")] == ["change", "add", "initial commit"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("acme/x", [CommitOperationDelete("c.json")], commit_message="x", parent_commit=first.oid)
    with pytest.raises(EntryNotFoundError):
        api.create_commit("acme/x", [CommitOperationDelete("none.json")], commit_message="x")


def test_branches_and_tags(hub, api):
    api.create_branch("acme/x", branch="draft/one")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.json", repo_id="acme/x", revision="draft/one")
    api.create_tag("acme/x", tag="v1", revision="draft/one")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("acme/x", tag="v1")
    refs = api.list_repo_refs("acme/x")
    assert [branch.name for branch in refs.branches] == ["main", "draft/one"]
    assert api.file_exists("acme/x", "a.json", revision="v1") and not api.file_exists("acme/x", "a.json")
    api.delete_tag("acme/x", tag="v1")
    api.delete_branch("acme/x", branch="draft/one")
    assert not api.revision_exists("acme/x", "v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("acme/x", revision="v1")


def test_trees_paths_and_pages(hub, api, monkeypatch):
    names = [f"folder/sub/{number:02d}.json" for number in range(7)]
    api.create_commit("acme/x", [CommitOperationAdd(name, b"1") for name in names], commit_message="add")
    hub.page_size = 3
    assert [entry.path for entry in api.list_repo_tree("acme/x")] == [".gitattributes", "folder"]
    assert [entry.path for entry in api.list_repo_tree("acme/x", "folder/sub")] == names
    assert len(list(api.list_repo_tree("acme/x", recursive=True))) == len(names) + 3
    found = api.get_paths_info("acme/x", ["folder", names[0], "none"])
    assert [type(entry).__name__ for entry in found] == ["RepoFolder", "RepoFile"]
    info = api.model_info("acme/x", files_metadata=True)
    assert {sibling.size for sibling in info.siblings if sibling.rfilename in names} == {1}


def test_large_files_go_in_parts_and_come_from_another_host_without_the_token(hub, api):
    hub.multipart_bytes = 2**16
    content = os.urandom(200_000)
    api.upload_file(path_or_fileobj=content, path_in_repo="w.safetensors", repo_id="acme/x")
    assert len(hub.requests("PUT /lfs/.*/[0-9]+$")) == 7 and len(hub.requests("POST .*/complete")) == 1
    with open(api.hf_hub_download("acme/x", "w.safetensors"), "rb") as file:
        assert file.read() == content
    assert {seen.token for seen in hub.requests("/cdn/")} == {None}
    metadata = get_hf_file_metadata(hf_hub_url("acme/x", "w.safetensors"), token=PROVIDER)
    assert (metadata.size, len(metadata.etag)) == (len(content), 64)


def test_ranges_through_the_file_system(hub, api):
    content = os.urandom(10_000)
    api.upload_file(path_or_fileobj=content, path_in_repo="w.safetensors", repo_id="acme/x")
    system = HfFileSystem(endpoint=hub.url, token=PROVIDER, skip_instance_cache=True)
    with system.open("acme/x/w.safetensors", block_size=1000) as file:
        file.seek(5_000)
        assert file.read(10) == content[5_000:5_010]


def test_collections(hub, api):
    collection = api.create_collection("A pair", namespace="acme", description="Words")
    api.add_collection_item(collection.slug, "acme/x", "model", note="first")
    assert api.create_collection("A pair", namespace="acme", exists_ok=True).slug == collection.slug
    assert [item.item_id for item in api.get_collection(collection.slug).items] == ["acme/x"]

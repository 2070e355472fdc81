"""Versions: one commit and one tag, never moved, resolved once, checked by hash; nothing else is uploaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi

from grad_transformer import (
    GradTransformer,
    LoraAdapter,
    LoraDeltaTokenizer,
    pull_root,
    push_delta_dataset,
    push_folder,
)
from grad_transformer.errors import FormatVersionError, HubError, IncompleteArtifactError, UsageError
from grad_transformer.files import read_json, write_json_atomic
from grad_transformer.hub import fetch, publish, pull_folder, split_revision
from grad_transformer.shadow import load_delta_dataset
from tests.hub.conftest import CLIENT, READER
from tests.hub.worlds import client_adapter, delta_dataset, tiny_mapper, tiny_roots
from tests.worlds import moved


@pytest.fixture
def roots(tmp_path):
    return tiny_roots(tmp_path / "roots")


@pytest.fixture
def client(roots):
    return client_adapter(roots[0])


def put(repo_id, files, **kwargs):
    return publish(repo_id, lambda _: files, owned=lambda name: name.endswith(".json"), **kwargs)


def test_a_push_is_one_commit_and_one_tag(hub, client):
    first = client.push_to_hub("acme/client")
    repo = hub.store.repos[("model", "acme/client")]
    assert (first.revision, repo.tags) == ("v1.0", {"v1.0": first.sha})
    assert [commit.title for commit in repo.commits.values()] == ["initial commit", "Upload client adapter"]


def test_the_same_content_again_is_the_same_version(hub, client):
    first = client.push_to_hub("acme/client")
    again = client.push_to_hub("acme/client")
    assert (again.sha, again.revision, again.new) == (first.sha, "v1.0", False)
    assert len(hub.requests("POST .*/commit/")) == 1


def test_other_content_is_the_next_version_and_the_old_one_stays(hub, roots, client):
    client.push_to_hub("acme/client")
    second = client_adapter(roots[0], seed=2).push_to_hub("acme/client")
    assert second.revision == "v1.1"
    old = LoraAdapter.from_pretrained("acme/client@v1.0")
    assert all(torch.equal(old.tensors[key], tensor) for key, tensor in client.tensors.items())
    assert old.origin.sha != second.sha
    assert LoraAdapter.from_pretrained("acme/client").origin.sha == second.sha


def test_the_tag_of_an_existing_version_is_never_moved(hub, roots, client):
    first = client.push_to_hub("acme/client", revision="v2.0")
    with pytest.raises(UsageError, match="never moved"):
        client_adapter(roots[0], seed=2).push_to_hub("acme/client", revision="v2.0")
    assert hub.store.repos[("model", "acme/client")].tags == {"v2.0": first.sha}
    assert not client.push_to_hub("acme/client", revision="v2.0").new
    assert client_adapter(roots[0], seed=3).push_to_hub("acme/client").revision == "v2.1"


def test_a_moved_version_tag_is_noticed_by_who_loaded_it_before(hub, roots, client):
    client.push_to_hub("acme/client")
    LoraAdapter.from_pretrained("acme/client@v1.0")
    sha = client_adapter(roots[0], seed=2).push_to_hub("acme/client").sha
    hub.store.repos[("model", "acme/client")].tags["v1.0"] = sha
    with pytest.raises(HubError, match="tag was moved"):
        LoraAdapter.from_pretrained("acme/client@v1.0")


def test_files_that_left_a_version_go_and_strangers_files_stay(hub):
    put("acme/x", {"a.json": b"1", "b.json": b"2"})
    HfApi().upload_file(path_or_fileobj=b"text", path_in_repo="LICENSE", repo_id="acme/x")
    put("acme/x", {"a.json": b"1"})
    assert sorted(hub.store.repos[("model", "acme/x")].commit_at("main").tree) == [
        ".gitattributes",
        "LICENSE",
        "a.json",
    ]


@pytest.mark.parametrize("name", ["training_args.bin", "model.pt", "code.py", "rows.jsonl", "x.json.pkl", "notes.txt"])
def test_anything_but_the_allowed_kinds_of_files_is_refused(hub, client, tmp_path, name):
    folder = client.save_pretrained(tmp_path / "adapter")
    (folder / name).write_bytes(b"x")
    with pytest.raises(UsageError, match="never uploaded"):
        push_folder(folder, "acme/client")
    assert hub.requests("POST") == []
    with pytest.raises(UsageError, match="never uploaded"):
        put("acme/x", {name: b"x"})


def test_what_training_leaves_beside_a_mapper_stays_behind(hub, roots, tmp_path):
    tiny_mapper(roots).save_pretrained(tmp_path / "mapper")
    for name in ("checkpoint-10/optimizer.pt", "runs/events.out", "training_args.json", ".cache/x"):
        (tmp_path / "mapper" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mapper" / name).write_text("{}")
    push_folder(tmp_path / "mapper", "acme/mapper")
    names = hub.store.repos[("model", "acme/mapper")].commit_at("v1.0").tree
    assert not [name for name in names if "checkpoint" in name or "runs" in name or "training_args" in name]


def test_a_revision_is_resolved_once_and_kept(hub, roots):
    published = tiny_mapper(roots).push_to_hub("acme/mapper")
    hub.seen.clear()
    mapper = GradTransformer.from_pretrained("acme/mapper", revision="v1.0")
    assert len(hub.requests("GET .*/revision/")) == 1
    assert {seen.path.split("/")[4] for seen in hub.requests("/resolve/")} == {published.sha}
    assert mapper.origin.to_dict() == {"repo_id": "acme/mapper", "revision": "v1.0", "sha": published.sha}
    assert mapper.source_tokenizer.origin.sha == published.sha


def test_what_is_made_from_versions_names_their_commits(hub, roots, client):
    mapper_sha = tiny_mapper(roots).push_to_hub("acme/mapper").sha
    public = client.push_to_hub("acme/public", private=False)
    client_adapter(roots[0], seed=2).push_to_hub("acme/secret")
    mapper = GradTransformer.from_pretrained("acme/mapper@v1.0")
    adapter = mapper.generate_adapter(["acme/public@v1.0", "acme/secret"])
    made = adapter.metadata["generated"]
    assert made["mapper"]["sha"] == mapper_sha
    assert made["clients"][0] == {"repo_id": "acme/public", "revision": "v1.0", "sha": public.sha}
    adapter.push_to_hub("acme/generated")
    for name in ("README.md", "grad_transformer.json"):
        entry = hub.store.repos[("model", "acme/generated")].commit_at("v1.0").tree[name]
        text = hub.store.path(entry.oid).read_text()
        assert "acme/public" in text and "secret" not in text, "private clients are not named"
    assert made["clients"][1].keys() == {"sha256"}


def test_a_tokenizer_is_published_alone_and_loads_by_subfolder(hub, roots):
    tokenizer = tiny_mapper(roots).source_tokenizer
    tokenizer.push_to_hub("acme/tokenizer", subfolder="source")
    again = LoraDeltaTokenizer.from_pretrained("acme/tokenizer@v1.0", subfolder="source")
    assert torch.equal(again.mean_P, tokenizer.mean_P) and again.root.fingerprint == tokenizer.root.fingerprint


def test_a_root_is_pulled_alone(hub, roots, tmp_path):
    published = tiny_mapper(roots).push_to_hub("acme/mapper")
    hub.seen.clear()
    root = pull_root("acme/mapper@v1.0", output_dir=tmp_path / "root")
    assert (root.fingerprint, root.origin.sha) == (roots[0].fingerprint, published.sha)
    assert all("source/root/" in seen.path for seen in hub.requests("/resolve/"))
    assert (tmp_path / "root" / "root.json").is_file()


def test_a_delta_dataset_loads_with_plain_datasets(hub, roots, tmp_path):
    folder = delta_dataset(tmp_path / "deltas", roots)
    published = push_delta_dataset(folder, "acme/deltas")
    assert published.repo_type == "dataset"
    pulled, origin = pull_folder("acme/deltas", tmp_path / "pulled", kind="delta_dataset")
    assert origin["sha"] == published.sha
    splits = load_dataset(str(pulled), cache_dir=str(tmp_path / "datasets"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "validation": 2, "test": 2}


def test_a_delta_dataset_loads_by_version_whole_or_streaming(hub, roots, tmp_path):
    published = push_delta_dataset(delta_dataset(tmp_path / "deltas", roots), "acme/deltas")
    whole = load_delta_dataset("acme/deltas@v1.0")
    assert whole.origin.sha == published.sha and whole.source_root.fingerprint == roots[0].fingerprint
    assert whole.pairs("train").source.shape == (6, roots[0].layout.numel)
    streamed = load_delta_dataset("acme/deltas", revision="v1.0", streaming=True, cache_dir=tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.parquet")), "rows are read, not downloaded"
    row = next(iter(streamed.splits["test"]))
    assert row["shadow_id"] == "test-0" and row["source_blocks"] == whole.pairs("test").source[0].tolist()
    assert streamed.target_root.fingerprint == roots[1].fingerprint


def test_a_pulled_folder_remembers_its_commit(hub, roots, client, tmp_path):
    published = client.push_to_hub("acme/client")
    folder, _ = pull_folder("acme/client@v1.0", tmp_path / "client", kind="client_adapter")
    assert LoraAdapter.from_pretrained(folder).origin.sha == published.sha
    assert read_json(folder / "hub_origin.json")["revision"] == "v1.0"
    pull_folder("acme/client@v1.0", tmp_path / "client", kind="client_adapter")
    with pytest.raises(UsageError, match="something else"):
        pull_folder("acme/client@v1.0", tmp_path / "roots", kind="client_adapter")
    push_folder(folder, "acme/copy")
    assert "hub_origin.json" not in hub.store.repos[("model", "acme/copy")].commit_at("v1.0").tree


def test_a_changed_file_of_the_cache_is_noticed(hub, client):
    client.push_to_hub("acme/client")
    folder = fetch("acme/client@v1.0", allow_patterns=["*"]).folder
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = Path(os.path.realpath(folder / name))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(HubError, match=f"{name} is not the file"):
            LoraAdapter.from_pretrained("acme/client@v1.0")
        path.write_bytes(content)
    LoraAdapter.from_pretrained("acme/client@v1.0")


def test_newer_formats_are_refused_with_the_remedy(hub, roots, tmp_path):
    tiny_mapper(roots).save_pretrained(tmp_path / "mapper")
    config = read_json(tmp_path / "mapper" / "config.json")
    HfApi().create_repo("acme/mapper")
    write_json_atomic(tmp_path / "mapper" / "config.json", {**config, "format_version": 99, "novelty": {}})
    HfApi().upload_folder(repo_id="acme/mapper", folder_path=tmp_path / "mapper")
    with pytest.raises(FormatVersionError, match="pip install --upgrade"):
        GradTransformer.from_pretrained("acme/mapper")


def test_a_folder_without_a_manifest_is_not_published(hub, tmp_path):
    with pytest.raises(IncompleteArtifactError, match="nothing that is published"):
        push_folder(tmp_path / "hub-server", "acme/x")
    with pytest.raises(UsageError, match="did you mean .*hub-server"):
        push_folder(tmp_path / "hub-servr", "acme/x")
    assert hub.requests("POST") == []


def test_names_with_a_revision(tmp_path):
    assert split_revision("org/a@v1.0") == ("org/a", "v1.0")
    assert split_revision("org/a") == ("org/a", None)
    folder = tmp_path / "a@b"
    folder.mkdir()
    assert split_revision(folder) == (str(folder), None)


def test_two_revisions_are_refused(hub, client):
    client.push_to_hub("acme/client")
    with pytest.raises(UsageError, match="Two revisions"):
        LoraAdapter.from_pretrained("acme/client@v1.0", revision="main")


def test_private_repositories_open_to_their_tokens_alone(hub, client, monkeypatch):
    client.push_to_hub("acme/client")
    assert hub.store.repos[("model", "acme/client")].private
    assert LoraAdapter.from_pretrained("acme/client", token=READER).origin.private
    for token in (CLIENT, False):
        with pytest.raises(HubError, match="needs a token") as info:
            LoraAdapter.from_pretrained("acme/client", token=token, cache_dir=f"{hub.store.folder}/other-{token}")
        assert "hf_" not in str(info.value)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="write"):
        client.push_to_hub("acme/client", revision="v9.0")


def test_a_gated_repository_says_where_to_ask(hub, client):
    client.push_to_hub("acme/gated", private=False)
    hub.store.repos[("model", "acme/gated")].gated = "manual"
    with pytest.raises(HubError, match="ask for access"):
        LoraAdapter.from_pretrained("acme/gated", token=CLIENT)
    hub.store.repos[("model", "acme/gated")].granted.add("carl")
    assert LoraAdapter.from_pretrained("acme/gated", token=CLIENT).origin.private, "gated is not for everybody's eyes"


def test_a_token_or_a_path_of_this_machine_is_never_uploaded(hub, roots, tmp_path):
    adapter = moved(roots[0])
    adapter.metadata = {"note": "hf_" + "A" * 34}
    with pytest.raises(UsageError, match="access token") as info:
        adapter.push_to_hub("acme/client")
    assert "hf_A" not in str(info.value)
    adapter.metadata = {"note": f"see {Path.home()}/rows.jsonl"}
    with pytest.raises(UsageError, match="path of this machine"):
        adapter.push_to_hub("acme/client")
    adapter.metadata = {"base": str(tmp_path / "base")}
    adapter.push_to_hub("acme/client")
    assert LoraAdapter.from_pretrained("acme/client").metadata["base"] == "base"


def test_offline_the_cached_version_loads(hub, client, monkeypatch):
    published = client.push_to_hub("acme/client")
    with pytest.raises(HubError, match="not in the cache"):
        LoraAdapter.from_pretrained("acme/client@v1.0", local_files_only=True)
    LoraAdapter.from_pretrained("acme/client@v1.0")
    hub.seen.clear()
    assert LoraAdapter.from_pretrained("acme/client@v1.0", local_files_only=True).origin.sha == published.sha
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert LoraAdapter.from_pretrained("acme/client@v1.0").origin.sha == published.sha
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        LoraAdapter.from_pretrained("acme/other")
    assert hub.seen == []


def test_push_and_pull_as_commands(hub, roots, tmp_path, run_cli):
    tiny_mapper(roots).save_pretrained(tmp_path / "mapper")
    pushed = run_cli("push", tmp_path / "mapper", "acme/mapper", "--kind", "mapper", "--license", "mit", "--json")
    assert pushed.code == 0 and (pushed.json["revision"], pushed.json["new"]) == ("v1.0", True)
    for kind, manifest in (("mapper", "config.json"), ("root", "root.json")):
        pulled = run_cli(
            "pull", "acme/mapper@v1.0", "--kind", kind, "--output_dir", tmp_path / kind / "copy", "--json"
        )
        assert pulled.code == 0 and pulled.json["sha"] == pushed.json["sha"]
        assert (tmp_path / kind / "copy" / manifest).is_file()
    wrong = run_cli("push", tmp_path / "mapper", "acme/mapper", "--kind", "client_adapter")
    assert wrong.code == 2 and "holds something else" in wrong.stderr

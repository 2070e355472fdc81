"""Base models on the Hub: one commit, and nothing of it but what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from grad_transformer import LoraDeltaTokenizer, create_root
from grad_transformer.adapters.base_files import locate
from grad_transformer.client import finetune_client
from grad_transformer.errors import HubError, UsageError
from grad_transformer.finetuning import FineTuningRecipe, load_base, load_root_base, preview_base
from grad_transformer.lab import make_lab_tokenizer
from tests.hub_server import HubServer
from tests.hub_server.store import Entry
from tests.worlds import lora, tiny_qwen2


@pytest.fixture
def sha(hub: HubServer, tmp_path: Path) -> str:
    """Commit of `acme/tiny`: a model beside a program and a pickle."""
    folder = tiny_qwen2(tmp_path / "made" / "tiny")
    make_lab_tokenizer().save_pretrained(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit('code ran')\n")
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    api = HfApi()
    api.create_repo("acme/tiny")
    files = [CommitOperationAdd(path.name, str(path)) for path in folder.iterdir()]
    return str(api.create_commit("acme/tiny", files, commit_message="Upload").oid)


def test_a_base_model_is_one_commit_without_code_and_pickles(sha: str, tmp_path: Path) -> None:
    found = locate("acme/tiny")
    names = {path.name for path in found.folder.iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".py", ".bin", ".safetensors")) for name in names)
    root = create_root("acme/tiny", lora(), output_dir=tmp_path / "root")
    assert (root.base_model, root.base_revision, root.adapter.config["revision"]) == ("acme/tiny", sha, sha)
    names = {path.name for path in found.folder.iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".py", ".bin")) for name in names)
    assert preview_base(root).place == "cache"
    model, _ = load_root_base(root)
    assert model.config.name_or_path == "acme/tiny"


def test_a_client_downloads_what_only_its_mapper_names_after_a_yes(
    sha: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = create_root("acme/tiny", lora(), output_dir=tmp_path / "root")
    recipe = FineTuningRecipe(max_steps=1, warmup_steps=0, per_device_batch_size=2, max_length=16)
    mapper = LoraDeltaTokenizer(root, recipe=recipe.to_dict())
    rows = [{"prompt": "?1 >", "completion": "9"}] * 2
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another-machine"))
    with pytest.raises(UsageError, match="base model that the mapper names was not accepted") as caught:
        finetune_client(mapper, rows, tmp_path / "out")
    assert caught.value.found == f"acme/tiny at {sha}, to be downloaded from the Hub"
    assert not (tmp_path / "another-machine").exists() and not (tmp_path / "out").exists()
    adapter, _ = finetune_client(mapper, rows, tmp_path / "out", base_model="acme/tiny")
    assert adapter.base_model == "acme/tiny"
    finetune_client(mapper, rows, tmp_path / "out")  # it is on this machine now


def test_names_that_are_on_no_hub_are_typed_errors(sha: str, tmp_path: Path) -> None:
    with pytest.raises(HubError):
        locate("acme/mistyped")
    with pytest.raises(HubError):
        locate("acme/tiny", revision="v9.9")
    with pytest.raises(UsageError, match="no such model"):
        locate(tmp_path / "acme" / "tiny" / "x")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("model/../../evil.safetensors", 8, "not safe to write"), ("model-2.safetensors", 2**30, "larger than what may")],
)
def test_weights_are_held_to_what_the_config_describes_before_they_come(
    sha: str, hub: HubServer, name: str, size: int, message: str
) -> None:
    commit = hub.store.repos["model", "acme/tiny"].commit_at("main")
    hub.store.put("0" * 64, bytes(8))
    commit.tree[name] = Entry("0" * 64, size, True)
    with pytest.raises(HubError, match=message):
        load_base("acme/tiny")
    assert not any(path.name == "model.safetensors" for path in locate("acme/tiny").folder.iterdir())

"""Adapter folders, roots, atomic files, aggregation."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from grad_transformer import LoraAdapter, Root, aggregate_deltas, create_root
from grad_transformer.adapters.fingerprints import fingerprint_base_model
from grad_transformer.adapters.io import atomic_write, read_header, read_json, resolve_folder
from grad_transformer.adapters.roots import model_name
from grad_transformer.errors import (
    AdapterFormatError,
    BaseModelMismatchError,
    FormatVersionError,
    IncompleteArtifactError,
    RootMismatchError,
    UsageError,
)
from tests.worlds import lora, moved, tiny_qwen2, tiny_root


@pytest.fixture
def root(tmp_path):
    return tiny_root(tmp_path)


def test_root_loads_in_plain_peft_with_the_same_values(root, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "root"))
    state = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
    assert state.keys() == root.adapter.tensors.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in root.adapter.tensors.items())


def test_root_is_reproducible_by_seed_and_leaves_the_base_and_global_randomness_alone(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2(tmp_path / "base"))
    names = {name for name, _ in base.named_parameters()}
    torch.manual_seed(5)
    first = create_root(base, lora(), output_dir=tmp_path / "a", seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert {name for name, _ in base.named_parameters()} == names
    assert create_root(base, lora(), output_dir=tmp_path / "b", seed=1).fingerprint == first.fingerprint
    assert create_root(base, lora(), output_dir=tmp_path / "c", seed=2).fingerprint != first.fingerprint


def test_edited_root_is_refused(root, tmp_path):
    path = tmp_path / "root" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0] += 1e-3
    save_file(tensors, path)
    with pytest.raises(IncompleteArtifactError, match="not those that it was written with"):
        Root.from_pretrained(tmp_path / "root")


def test_base_fingerprint_ignores_dtype_but_not_weights(root, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert fingerprint_base_model(base.to(torch.bfloat16)) == root.base_fingerprint
    root.check_base(base)
    other = AutoModelForCausalLM.from_pretrained(tiny_qwen2(tmp_path / "other", seed=1))
    with pytest.raises(BaseModelMismatchError, match="not the one that the root was made for"):
        root.check_base(other)


def test_adapter_from_another_draw_of_A_is_refused_with_its_distance(root, tmp_path):
    stranger = create_root(tmp_path / "base", lora(), output_dir=tmp_path / "elsewhere", seed=7)
    root.check_descends(moved(root))
    with pytest.raises(RootMismatchError, match="times the root's norm away") as info:
        root.check_descends(moved(stranger), path="client")
    assert info.value.path == "client"


def test_adapter_that_declares_another_root_is_refused(root):
    adapter = moved(root)
    adapter.metadata = {"root": {"fingerprint": "0" * 64}}
    with pytest.raises(RootMismatchError):
        root.check_descends(adapter)


SNAPSHOT = "/home/me/.cache/huggingface/hub/models--acme--base/snapshots/" + "0" * 40


@pytest.mark.parametrize("name", ["somewhere/else/base", SNAPSHOT, r"C:\models\base", "/models/renamed", None])
def test_an_adapter_is_known_by_its_root_whatever_place_its_base_model_was_loaded_from(root, name):
    adapter = moved(root)
    adapter.config["base_model_name_or_path"] = name
    root.check_descends(adapter)
    assert name in (None, "/models/renamed") or model_name(name) == model_name(root.base_model)


def test_an_adapter_that_declares_another_base_model_is_refused(root):
    adapter = moved(root)
    adapter.metadata = {"root": {**root.facts(), "base_fingerprint": "v2:" + "0" * 64}}
    with pytest.raises(BaseModelMismatchError, match="another base model"):
        root.check_descends(adapter)


def test_an_adapter_that_never_left_the_root_is_refused(root):
    still = root.adapter.with_values(root.adapter.flat())
    with pytest.raises(RootMismatchError, match="never trained"):
        root.check_descends(still)
    for key, tensor in still.tensors.items():
        if "lora_A" in key:  # decayed, with B still zero: it does nothing
            still.tensors[key] = 0.9 * tensor
    with pytest.raises(RootMismatchError, match="never trained"):
        root.check_descends(still)


def test_adapter_round_trip_and_plain_peft(root, tmp_path):
    adapter = moved(root)
    adapter.metadata = {"note": "kept"}
    adapter.save_pretrained(tmp_path / "adapter")
    again = LoraAdapter.from_pretrained(tmp_path / "adapter", layout=root.layout)
    assert again.metadata == {"note": "kept"}
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))


def test_pickled_weights_are_never_read(root, tmp_path):
    folder = moved(root).save_pretrained(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="not stored as safetensors"):
        LoraAdapter.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(root, tmp_path, value):
    adapter = moved(root)
    adapter.tensors[next(iter(adapter.tensors))][0, 0] = value
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFormatError, match="NaN or infinite"):
        LoraAdapter.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 64, (10).to_bytes(8, "little") + b"not json.."])
def test_broken_safetensors_give_a_typed_error(root, tmp_path, content):
    folder = moved(root).save_pretrained(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterFormatError):
        LoraAdapter.from_pretrained(folder)


def test_truncated_weights_and_integer_tensors_are_refused(root, tmp_path):
    folder = moved(root).save_pretrained(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(AdapterFormatError):
        read_header(path)
    save_file({key: tensor.long() for key, tensor in moved(root).tensors.items()}, path)
    with pytest.raises(AdapterFormatError, match="not floating-point"):
        LoraAdapter.from_pretrained(folder)


def test_json_errors_are_typed_and_newer_formats_name_the_remedy(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(IncompleteArtifactError, match="missing"):
        read_json(path)
    for text in ("{", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(IncompleteArtifactError):
            read_json(path)
    path.write_text(json.dumps({"format_version": 99}))
    with pytest.raises(FormatVersionError, match="pip install --upgrade"):
        read_json(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_that_is_neither_folder_nor_repository_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="Neither a folder nor a Hub repository"):
        resolve_folder(tmp_path / "absent" / "twice", allow_patterns=["x"])


def test_aggregations_and_that_inputs_are_never_mutated():
    deltas = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    before = deltas.clone()
    assert aggregate_deltas(deltas).tolist() == [2.0, 4.0]
    assert aggregate_deltas(deltas, aggregation="sum").tolist() == [4.0, 8.0]
    assert aggregate_deltas(deltas, aggregation="weighted", weights=[3, 1]).tolist() == [1.5, 3.0]
    assert torch.equal(deltas, before)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("mean", [1, 1]),
        ("weighted", None),
        ("weighted", [1]),
        ("weighted", [0, 0]),
        ("weighted", [-1, 2]),
        ("max", None),
    ],
)
def test_aggregation_arguments_that_do_not_fit_are_refused(aggregation, weights):
    with pytest.raises(UsageError):
        aggregate_deltas(torch.zeros(2, 3), aggregation=aggregation, weights=weights)

"""Adapters as other tools save them: read where the tensors are the same, refused with a remedy where they are not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.fuzz.artifacts import make_tokenizer, write_client
from grad_transformer import LoraAdapter
from grad_transformer.adapters.keys import canonical_keys
from grad_transformer.adapters.layout import LoraLayout
from grad_transformer.errors import AdapterFormatError


TOKENIZER = make_tokenizer()
BASE = "base_model.model."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_client(tmp_path / "bank", TOKENIZER)
    return tmp_path / "bank"


def rename(folder: Path, change: Callable[[str], str]) -> dict[str, torch.Tensor]:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({change(key): value for key, value in tensors.items()}, path, {"format": "pt"})
    return tensors


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(BASE, f"{BASE}_orig_mod."),
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace(BASE, f"{BASE}_module."),
        lambda key: key.replace("layers.", "layers._fsdp_wrapped_module."),
        lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".bank_a.weight"),
    ],
)
def test_keys_with_wrappers_and_adapter_names_are_the_same_tensors(folder: Path, change: Callable[[str], str]) -> None:
    tensors = rename(folder, change)
    for adapter in (TOKENIZER.read_client(folder)[0], LoraAdapter.from_pretrained(folder)):
        assert adapter.tensors.keys() == tensors.keys()
        assert all(torch.equal(adapter.tensors[key], value) for key, value in tensors.items())


def test_names_of_embeddings_lose_the_adapter_too() -> None:
    key = f"{BASE}model.embed_tokens.lora_embedding_A"
    assert canonical_keys([f"{key}.default"]) == {key: f"{key}.default"}
    # A module that is called so is none of the wrappers.
    kept = f"{BASE}module.layers.0.lora_A.weight"
    assert canonical_keys([kept]) == {kept: kept}


def test_two_adapters_in_one_file_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    more = {key.replace(".weight", ".other.weight"): value.clone() for key, value in tensors.items()}
    save_file({**tensors, **more}, path)
    with pytest.raises(AdapterFormatError, match="of one module"):
        TOKENIZER.read_client(folder)


@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.embed_tokens.base_layer.weight", "lm_head.weight"]
)
def test_base_weights_saved_beside_are_to_be_saved_again_without(folder: Path, key: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), BASE + key: torch.zeros(4, 4)}, path)
    for read in (TOKENIZER.read_client, LoraAdapter.from_pretrained):
        with pytest.raises(AdapterFormatError, match="Weights of the base model") as info:
            read(folder)
        assert "save_embedding_layers=False" in str(info.value.remedy)


def test_the_folder_above_is_told_from_none(folder: Path) -> None:
    for read in (TOKENIZER.read_client, LoraAdapter.from_pretrained):
        with pytest.raises(AdapterFormatError) as info:
            read(folder.parent)
        assert info.value.remedy == f"did you mean {folder}?"


@pytest.mark.parametrize("value", [True, {"scale": 2}, "on", 3])
def test_a_field_that_is_not_known_is_refused_where_it_is_switched_on(folder: Path, value: object) -> None:
    edit_config(folder, use_newer_lora=value)
    for read in (TOKENIZER.read_client, LoraAdapter.from_pretrained):
        with pytest.raises(AdapterFormatError, match="use_newer_lora"):
            read(folder)


@pytest.mark.parametrize("value", [False, None, {}, [], 0])
def test_a_field_that_is_not_known_is_no_matter_where_it_is_off(folder: Path, value: object) -> None:
    edit_config(folder, use_newer_lora=value, qalora_group_size=16, megatron_core="megatron.core")
    TOKENIZER.read_client(folder)


def test_many_patterns_for_many_modules_are_refused_at_once() -> None:
    shapes = {
        f"{BASE}m.{index}.q.lora_{side}.weight": (2, 4) if side == "A" else (4, 2)
        for index in range(4000)
        for side in "AB"
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {f"a{index}": 2 for index in range(4000)}}
    started = time.perf_counter()
    with pytest.raises(AdapterFormatError, match="4000 patterns for 4000 modules"):
        LoraLayout.from_adapter_config(config, shapes)
    assert time.perf_counter() - started < 5

"""A client's fine-tune starts from the mapper's root, follows its recipe, and leaves nothing of the rows behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import logging

from grad_transformer import LoraAdapter, LoraDeltaTokenizer, create_root
from grad_transformer.client import finetune_client
from grad_transformer.errors import BaseModelMismatchError, DataError, IncompleteArtifactError
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.lab import make_lab_tokenizer
from tests.worlds import lora, tiny_qwen2


RECIPE = FineTuningRecipe(learning_rate=1e-2, max_steps=4, per_device_batch_size=4, warmup_steps=1, max_length=16)
ROWS = [{"prompt": f"?1 ?2 {row:04d} >", "completion": f"{9999 - row:04d}"} for row in range(12)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> LoraDeltaTokenizer:
    base = tiny_qwen2(tmp_path / "base")
    make_lab_tokenizer().save_pretrained(base)
    root = create_root(base, lora(), output_dir=tmp_path / "root")
    return LoraDeltaTokenizer(root, recipe=RECIPE.to_dict())


def test_the_adapter_descends_from_the_root_and_says_how_it_was_made(
    tokenizer: LoraDeltaTokenizer, tmp_path: Path
) -> None:
    _, result = finetune_client(tokenizer, ROWS, tmp_path / "client")
    adapter = LoraAdapter.from_pretrained(tmp_path / "client", layout=tokenizer.layout)
    assert tokenizer.delta(adapter).norm() > 0
    assert adapter.metadata["root"]["fingerprint"] == tokenizer.root.fingerprint
    assert adapter.metadata["recipe"] == RECIPE.to_dict()
    assert adapter.metadata["differential_privacy"] is None
    assert "num_examples" not in adapter.metadata
    assert len(result.losses) == 4
    expected = tokenizer.layout.flatten(result.tensors)
    assert torch.equal(adapter.flat(), expected)


def test_nothing_of_the_rows_is_written(tokenizer: LoraDeltaTokenizer, tmp_path: Path) -> None:
    finetune_client(tokenizer, ROWS, tmp_path / "client", state_num_examples=True)
    names = {path.name for path in (tmp_path / "client").rglob("*")}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "grad_transformer.json"}
    text = (tmp_path / "client" / "grad_transformer.json").read_text()
    assert json.loads(text)["num_examples"] == 12
    assert not any(row["completion"] in text for row in ROWS[:1])


def test_it_reads_root_and_recipe_from_the_mappers_folder(tokenizer: LoraDeltaTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "mapper" / "source")
    one, _ = finetune_client(tmp_path / "mapper", ROWS, tmp_path / "one")
    two, _ = finetune_client(tokenizer, ROWS, tmp_path / "two")
    assert torch.equal(one.flat(), two.flat())
    other, _ = finetune_client(tokenizer, ROWS, tmp_path / "three", seed=np.int64(1))
    assert not torch.equal(one.flat(), other.flat())


def test_a_local_copy_of_the_base_model_is_checked(tokenizer: LoraDeltaTokenizer, tmp_path: Path) -> None:
    other = tiny_qwen2(tmp_path / "other", seed=1)
    make_lab_tokenizer().save_pretrained(other)
    with pytest.raises(BaseModelMismatchError):
        finetune_client(tokenizer, ROWS, tmp_path / "client", base_model=str(other))
    assert not (tmp_path / "client").exists()


def test_missing_recipe_and_bad_rows_are_refused(tokenizer: LoraDeltaTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        finetune_client(tokenizer, [{"prompt": "?1"}], tmp_path / "client")
    tokenizer.recipe = None
    with pytest.raises(IncompleteArtifactError, match="recipe"):
        finetune_client(tokenizer, ROWS, tmp_path / "client")
    finetune_client(tokenizer, ROWS, tmp_path / "client", recipe=RECIPE)


def test_another_recipe_is_warned_of(
    tokenizer: LoraDeltaTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(logging.get_logger("grad_transformer.client.finetune"), "warning", said.append)
    finetune_client(tokenizer, ROWS, tmp_path / "client", recipe=RECIPE.replace(max_steps=3))
    assert len(said) == 1
    assert "recipe is not the one" in said[0]

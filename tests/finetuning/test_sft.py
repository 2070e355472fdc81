from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM, Trainer

from grad_transformer import LoraAdapter, Root, create_root
from grad_transformer.errors import AdapterFormatError, BaseModelMismatchError, DataError, RecipeError, UsageError
from grad_transformer.finetuning import (
    FineTuningRecipe,
    attach_root,
    check_rows,
    load_base,
    load_root_base,
    preview_base,
    read_adapter_tensors,
    row_order,
    run_sft,
    tokenize_rows,
    write_adapter_tensors,
)
from grad_transformer.hub import Origin
from tests.worlds import lora, tiny_qwen2, tiny_root


RECIPE = FineTuningRecipe(
    learning_rate=1e-2,
    max_steps=4,
    per_device_batch_size=2,
    gradient_accumulation_steps=3,
    warmup_steps=1,
    max_length=32,
    snapshot_last=2,
    snapshot_every=3,
)


def digit_rows(count: int = 7) -> Dataset:
    return check_rows(
        [
            {"prompt": f"?1 ?2 {row * 7919 % 10**6:06d} >", "completion": f"{row * 104729 % 10**6:06d}"}
            for row in range(count)
        ]
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Root]:
    folder = tmp_path_factory.mktemp("world")
    return folder / "base", tiny_root(folder)


@pytest.fixture
def model(world: tuple[Path, Root]) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(world[0])


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_base_model_is_loaded_frozen_in_its_own_dtype(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tiny_qwen2(tmp_path)
    with pytest.raises(UsageError, match="no such model"):
        load_base(tmp_path / "nowhere")
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_base(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.dtype == torch.float32
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert load_base(tmp_path, dtype=torch.float64)[0].dtype == torch.float64


def test_the_adapter_starts_with_exactly_the_values_of_the_root(
    model: Qwen2ForCausalLM, world: tuple[Path, Root]
) -> None:
    root = world[1]
    generator_before = torch.random.get_rng_state()
    peft_model = attach_root(model, root)
    assert torch.equal(torch.random.get_rng_state(), generator_before)
    tensors = read_adapter_tensors(peft_model, root=root)
    assert tensors.keys() == root.adapter.tensors.keys()
    assert all(torch.equal(value, root.adapter.tensors[key]) for key, value in tensors.items())
    trainable = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
    assert trainable == root.layout.numel


def test_another_base_model_is_refused(tmp_path: Path, world: tuple[Path, Root]) -> None:
    other = Qwen2ForCausalLM.from_pretrained(tiny_qwen2(tmp_path, seed=1))
    with pytest.raises(BaseModelMismatchError):
        attach_root(other, world[1])


def test_what_is_written_is_read_and_is_a_copy(model: Qwen2ForCausalLM, world: tuple[Path, Root]) -> None:
    peft_model = attach_root(model, world[1])
    values = {key: torch.randn_like(value) for key, value in world[1].adapter.tensors.items()}
    write_adapter_tensors(peft_model, values)
    read = read_adapter_tensors(peft_model)
    assert all(torch.equal(read[key], value) for key, value in values.items())
    next(iter(read.values())).zero_()
    assert all(torch.equal(read_adapter_tensors(peft_model)[key], value) for key, value in values.items())


def test_an_adapter_with_other_keys_is_never_written(model: Qwen2ForCausalLM, world: tuple[Path, Root]) -> None:
    peft_model = attach_root(model, world[1])
    with pytest.raises(AssertionError):
        write_adapter_tensors(peft_model, dict(list(world[1].adapter.tensors.items())[1:]))


def test_snapshots_are_taken_after_optimizer_steps(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, world: tuple[Path, Root]
) -> None:
    """Four optimizer steps of three micro-batches each: a run of fewer steps must end where the snapshot was taken."""
    root, heard = world[1], []

    def recorder(step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        heard.append(step)

    constant = RECIPE.replace(lr_scheduler_type="constant", warmup_steps=0)
    peft_model = attach_root(model, root)
    result = run_sft(peft_model, tokenizer, digit_rows(), constant, root=root, seed=3, recorder=recorder)
    assert result.steps == heard == [3, 4]
    assert len(result.losses) == 4
    short = constant.replace(max_steps=3, snapshot_last=1, snapshot_every=None)
    shorter = run_sft(peft_model, tokenizer, digit_rows(), short, root=root, seed=3)
    assert shorter.losses == result.losses[:3]
    for key, values in result.snapshots.items():
        assert values.shape == (2, *root.adapter.tensors[key].shape)
        assert torch.equal(values[0], shorter.tensors[key])


def test_one_base_model_serves_many_runs(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, world: tuple[Path, Root]
) -> None:
    """Each run starts at the root again, the base model stays as it was, and TRL's patches do not pile up."""
    root = world[1]
    before = state(model)
    peft_model = attach_root(model, root)
    results = [run_sft(peft_model, tokenizer, digit_rows(), RECIPE, root=root, seed=seed) for seed in (0, 1, 0)]
    assert "forward" not in model.__dict__
    assert results[0].losses == results[2].losses != results[1].losses
    for key in root.adapter.tensors:
        assert torch.equal(results[0].tensors[key], results[2].tensors[key])
    unloaded = peft_model.unload()
    assert unloaded is model
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_first_loss_is_the_token_mean_of_the_first_step(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, world: tuple[Path, Root]
) -> None:
    tokens = tokenize_rows(digit_rows(), tokenizer, RECIPE.max_length)
    first = tokens.select(row_order(len(tokens), RECIPE.rows_per_step, 5))
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
                torch.tensor(row["labels"][1:]),
                reduction="sum",
            )
            for row in first
        ]
    num_labels = sum(label != -100 for row in first for label in row["labels"])
    result = run_sft(attach_root(model, world[1]), tokenizer, tokens, RECIPE, root=world[1], seed=5)
    assert result.losses[0] == pytest.approx(float(sum(losses)) / num_labels, rel=1e-6)


def test_nothing_is_printed_or_written(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: tuple[Path, Root],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "save", lambda *args, **kwargs: saved.append(args))
    run_sft(attach_root(model, world[1]), tokenizer, digit_rows(), RECIPE, root=world[1], seed=0)
    assert capsys.readouterr().out == ""
    assert saved == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_is_refused(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    world: tuple[Path, Root],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Trainer.training_step

    def poisoned(self: Trainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, model, *args, **kwargs)
        next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(RecipeError, match="diverged"):
        run_sft(attach_root(model, world[1]), tokenizer, digit_rows(), RECIPE, root=world[1], seed=0)


def test_a_run_that_trained_nothing_is_refused(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, world: tuple[Path, Root]
) -> None:
    still = RECIPE.replace(learning_rate=1e-60)
    with pytest.raises(RecipeError, match=r"Run 7 changed nothing"):
        run_sft(attach_root(model, world[1]), tokenizer, digit_rows(), still, root=world[1], seed=0, name="run 7")


def test_an_adapter_on_the_head_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL reads the head's weight and not its adapter."""
    base = tiny_qwen2(tmp_path / "base")
    root = create_root(base, lora(target_modules=["q_proj", "lm_head"]), output_dir=tmp_path / "root")
    model = Qwen2ForCausalLM.from_pretrained(base)
    with pytest.raises(RecipeError, match="output head"):
        run_sft(attach_root(model, root), tokenizer, digit_rows(), RECIPE, root=root, seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adapters_are_at_least_float32(
    world: tuple[Path, Root], tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(world[0], dtype=dtype)
    result = run_sft(attach_root(model, world[1]), tokenizer, digit_rows(), RECIPE, root=world[1], seed=0)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {values.dtype for values in result.snapshots.values()} == {expected}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.(q_proj|v_proj)|(([a-z_0-9]+\.?)+)+!"},
        {"exclude_modules": r"(([a-z_0-9]+\.?)+)+!"},
        {"layers_pattern": "(a+)+$", "layers_to_transform": [0]},
        {"target_modules": ["nothing"]},
        {"task_type": "SEQ_CLS", "init_lora_weights": "eva"},
    ],
)
def test_what_is_adapted_is_what_the_root_holds_and_no_pattern_of_its_config_is_matched(
    model: Qwen2ForCausalLM, world: tuple[Path, Root], config: dict[str, Any]
) -> None:
    root = world[1]
    adapter = LoraAdapter({**root.adapter.config, **config}, root.adapter.tensors, root.layout)
    peft_model = attach_root(model, replace(root, adapter=adapter))
    assert read_adapter_tensors(peft_model).keys() == root.adapter.tensors.keys()


@pytest.mark.parametrize("dropout", [1.0, -1.0, "x"])
def test_a_dropout_that_is_none_is_refused(model: Qwen2ForCausalLM, world: tuple[Path, Root], dropout: object) -> None:
    root = world[1]
    adapter = LoraAdapter({**root.adapter.config, "lora_dropout": dropout}, root.adapter.tensors, root.layout)
    with pytest.raises(AdapterFormatError, match="cannot be put on"):
        attach_root(model, replace(root, adapter=adapter))


def test_tokens_beyond_the_embedding_are_refused_before_the_first_step(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, world: tuple[Path, Root]
) -> None:
    tokens = Dataset.from_dict({"input_ids": [[1, 2], [3, 32]], "labels": [[-100, 2], [-100, 32]]})
    with pytest.raises(DataError, match="Row 1 has a token that the base model does not know"):
        run_sft(attach_root(model, world[1]), tokenizer, tokens, RECIPE, root=world[1], seed=0)


def test_float16_trains_from_a_root_of_a_float32_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    root = tiny_root(tmp_path)
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, text_tokenizer = load_root_base(root, dtype="float16")
    result = run_sft(attach_root(loaded, root), text_tokenizer, digit_rows(), RECIPE, root=root, seed=0)
    assert loaded.dtype == torch.float16
    assert all(values.isfinite().all() for values in result.snapshots.values())


def test_a_mapper_from_the_hub_names_no_path_of_this_machine(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    root = tiny_root(tmp_path)
    tokenizer.save_pretrained(tmp_path / "base")
    assert preview_base(root).place == "folder"
    fetched = replace(root, origin=Origin("acme/mapper", None, "0" * 40))
    for name in (str(tmp_path / "base"), "../base", "~/base", "a\\b", "a/b/c", "x" * 200, "a b"):
        with pytest.raises(UsageError, match="names a path"):
            load_root_base(replace(fetched, base_model=name))
    assert load_root_base(fetched, base_model=tmp_path / "base")[0].dtype == torch.float32
    hub = replace(fetched, base_model="acme/tiny", base_revision="1" * 40)
    assert preview_base(hub).describe() == f"acme/tiny at {'1' * 40}, to be downloaded from the Hub"
    # Named by the client too, it is the same version of it.
    assert preview_base(hub, base_model="acme/tiny").revision == "1" * 40
    assert preview_base(hub, base_model="acme/other@v1").revision == "v1"
    with pytest.raises(UsageError, match="did you mean .*base"):
        preview_base(hub, base_model=tmp_path / "bose")


def test_another_base_model_is_refused_before_its_tokenizer_is_read(tmp_path: Path, world: tuple[Path, Root]) -> None:
    other = tiny_qwen2(tmp_path, seed=1)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelMismatchError):
        load_root_base(world[1], base_model=other)

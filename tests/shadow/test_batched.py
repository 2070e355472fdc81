"""Many adapters at once must be what TRL gives one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grad_transformer import Root, create_root
from grad_transformer.errors import BaseModelMismatchError, RecipeError
from grad_transformer.finetuning import check_rows, tokenize_rows
from grad_transformer.lab import make_lab_tokenizer
from grad_transformer.shadow import FineTuneJob, fine_tune_many, run_batched
from tests.shadow.engines import (
    FAMILIES,
    IDS,
    RECIPE,
    TOKENIZER,
    deltas,
    distance,
    jobs,
    make_base,
    ragged_rows,
    run_one_after_the_other,
)
from tests.worlds import lora


@pytest.fixture
def opt(tmp_path: Path) -> tuple[PreTrainedModel, Root]:
    return make_base("opt", tmp_path, torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
def test_the_result_is_that_of_trl(tmp_path: Path, family: str, dtype: torch.dtype, tolerance: float) -> None:
    """In float32 against TRL's own loss; in float64 against the plain one, since TRL's head sums in float32."""
    model, root = make_base(family, tmp_path, dtype)
    ours = run_batched(model, TOKENIZER, root, jobs(), RECIPE)
    for result, reference in zip(ours, run_one_after_the_other(model, root, jobs(), RECIPE), strict=True):
        assert distance(root, result, reference) < tolerance
        assert result.losses == pytest.approx(reference.losses, rel=tolerance)
        assert result.steps == reference.steps == [2, 4, 5, 6]
        assert {key: value.shape for key, value in result.snapshots.items()} == {
            key: value.shape for key, value in reference.snapshots.items()
        }


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
        {"lr_scheduler_type": "constant", "max_grad_norm": 0.0},
        {"adam_epsilon": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.7, "gradient_accumulation_steps": 1},
        {"max_length": 7},
    ],
    ids=str,
)
def test_every_field_of_the_recipe_counts(opt: tuple[PreTrainedModel, Root], changes: dict[str, Any]) -> None:
    model, root = opt
    recipe = RECIPE.replace(**changes)
    # Up to three digits: a prompt fits into seven tokens, its completion does not.
    rows = check_rows([row for row in ragged_rows(40, 0).to_list() if len(row["completion"]) <= 3])
    work = [FineTuneJob(rows, seed=4)]
    (ours,) = run_batched(model, TOKENIZER, root, work, recipe)
    (unchanged,) = run_batched(model, TOKENIZER, root, work, RECIPE)
    (reference,) = run_one_after_the_other(model, root, work, recipe)
    assert distance(root, ours, reference) < 1e-9
    assert distance(root, unchanged, reference) > 1e-3


def test_clipping_is_for_each_adapter_alone(opt: tuple[PreTrainedModel, Root]) -> None:
    """One norm for all adapters together would shrink each one's gradient more than its own fine-tune does."""
    model, root = opt
    alone = [run_batched(model, TOKENIZER, root, [job], RECIPE)[0] for job in jobs()]
    together = run_batched(model, TOKENIZER, root, jobs(), RECIPE)
    unclipped = run_batched(model, TOKENIZER, root, jobs(), RECIPE.replace(max_grad_norm=0.0))
    for one, many, free in zip(alone, together, unclipped, strict=True):
        assert distance(root, many, one) < 1e-12
        assert distance(root, free, one) > 1e-2


def test_changing_one_row_of_one_adapter_changes_no_other(opt: tuple[PreTrainedModel, Root]) -> None:
    model, root = opt
    work = [FineTuneJob(tokenize_rows(job.rows, TOKENIZER, 32), job.seed, job.name) for job in jobs(4)]
    before = run_batched(model, TOKENIZER, root, work, RECIPE)
    rows = work[1].rows.to_list()
    rows[2] = {**rows[2], "input_ids": [rows[2]["input_ids"][0] ^ 1, *rows[2]["input_ids"][1:]]}
    work[1] = FineTuneJob(Dataset.from_list(rows), work[1].seed)
    after = run_batched(model, TOKENIZER, root, work, RECIPE)
    changes = [float((deltas(root, a) - deltas(root, b)).abs().max()) for a, b in zip(after, before, strict=True)]
    assert changes[1] > 1e-6
    assert changes[0] == changes[2] == changes[3] == 0.0


def test_the_grouping_does_not_matter(opt: tuple[PreTrainedModel, Root]) -> None:
    model, root = opt
    together = list(fine_tune_many(model, TOKENIZER, root, jobs(5), RECIPE, adapters_per_batch=5))
    for engine, size in (("batched", 2), ("trl", 1)):
        again = fine_tune_many(model, TOKENIZER, root, jobs(5), RECIPE, engine=engine, adapters_per_batch=size)  # type: ignore[arg-type]
        for result, reference in zip(again, together, strict=True):
            assert distance(root, result, reference) < 1e-9


def test_progress_is_told_after_every_optimizer_step(opt: tuple[PreTrainedModel, Root]) -> None:
    heard: list[tuple[int, float]] = []
    model, root = opt
    results = run_batched(
        model, TOKENIZER, root, jobs(2), RECIPE, progress=lambda step, loss: heard.append((step, float(loss)))
    )
    assert [step for step, _ in heard] == [1, 2, 3, 4, 5, 6]
    means = [sum(losses) / 2 for losses in zip(*(result.losses for result in results), strict=True)]
    assert [loss for _, loss in heard] == pytest.approx(means)


def test_no_jobs_give_no_results(opt: tuple[PreTrainedModel, Root]) -> None:
    assert run_batched(opt[0], TOKENIZER, opt[1], [], RECIPE) == []


def snapshot(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], list[tuple[Any, ...]]]:
    modules = [
        (name, module, module.__dict__.get("forward"), module.training) for name, module in model.named_modules()
    ]
    modules += [(name, len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    modules += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return {name: value.clone() for name, value in model.state_dict().items()}, modules


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "interrupted"])
def test_the_base_model_comes_out_unchanged(opt: tuple[PreTrainedModel, Root], fails: bool) -> None:
    model, root = opt
    model.train().requires_grad_(True)
    weights, modules = snapshot(model)

    def interrupt(step: int, loss: torch.Tensor) -> None:
        if fails and step == 2:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run_batched(model, TOKENIZER, root, jobs(), RECIPE, progress=interrupt)
    else:
        run_batched(model, TOKENIZER, root, jobs(), RECIPE)
    after, modules_after = snapshot(model)
    assert modules_after == modules
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_bases_get_float32_adapters(tmp_path: Path) -> None:
    model, root = make_base("qwen2", tmp_path, torch.bfloat16)
    (ours,) = run_batched(model, TOKENIZER, root, jobs(1), RECIPE)
    (reference,) = run_one_after_the_other(model, root, jobs(1), RECIPE)
    assert {value.dtype for value in ours.snapshots.values()} == {torch.float32}
    # bfloat16 keeps three digits of every activation, and the two engines round in other places.
    assert distance(root, ours, reference) < 0.1


def test_another_base_model_is_refused(opt: tuple[PreTrainedModel, Root]) -> None:
    opt[0].get_input_embeddings().weight.data.add_(1.0)
    with pytest.raises(BaseModelMismatchError):
        run_batched(opt[0], TOKENIZER, opt[1], jobs(), RECIPE)


def refuses(model: PreTrainedModel, root: Root, message: str) -> None:
    before = snapshot(model)[1]
    with pytest.raises(RecipeError, match=message) as error:
        run_batched(model, TOKENIZER, root, jobs(1), RECIPE)
    assert "--engine trl" in str(error.value)
    assert snapshot(model)[1] == before


def test_dropout_of_the_base_model_is_refused(opt: tuple[PreTrainedModel, Root]) -> None:
    model, root = opt
    model.config.attention_dropout = 0.1
    refuses(model, root, "has dropout")
    model.config.attention_dropout = 0.0
    model.add_module("dropout", nn.Dropout(0.1))
    refuses(model, root, "has dropout")


def test_layers_that_are_not_plain_are_refused(opt: tuple[PreTrainedModel, Root], tmp_path: Path) -> None:
    """A quantised layer is a subclass of nn.Linear, and positions are one of nn.Embedding."""

    class Quantised(nn.Linear):
        pass

    model, root = opt
    on_embedding = create_root(
        tmp_path / "base", lora(target_modules=["embed_positions"]), output_dir=tmp_path / "other_root"
    )
    refuses(model, on_embedding, "is not plain")
    next(module for name, module in model.named_modules() if name.endswith("q_proj")).__class__ = Quantised
    refuses(model, root, "is not plain")


def test_routed_experts_are_refused(tmp_path: Path) -> None:
    """TRL adds the router's loss, which couples the rows of a batch."""
    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        **IDS,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    root = create_root(tmp_path / "base", lora(target_modules=["q_proj"]), output_dir=tmp_path / "root")
    refuses(model, root, "experts")


def test_an_adapter_that_diverges_is_named(opt: tuple[PreTrainedModel, Root]) -> None:
    model, root = opt
    with pytest.raises(RecipeError, match="Run 0 diverged"):
        run_batched(model, TOKENIZER, root, jobs(2), RECIPE.replace(adam_epsilon=0.0, max_grad_norm=0.0))


def test_the_tokenizer_may_lack_a_padding_token(opt: tuple[PreTrainedModel, Root]) -> None:
    model, root = opt
    bare: PreTrainedTokenizerBase = make_lab_tokenizer()
    bare.pad_token = None
    (reference,), (ours,) = (run_batched(model, t, root, jobs(1), RECIPE) for t in (TOKENIZER, bare))
    assert distance(root, ours, reference) < 1e-12

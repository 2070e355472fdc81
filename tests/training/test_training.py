"""Training the mapper: held-out figures mean something, checkpoints resume, nothing is pickled that is published."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch

from grad_transformer import GradTransformer
from grad_transformer.adapters.rows import DeltaRows
from grad_transformer.adapters.statistics import permutation_without_fixed_run, r2_around_mean
from grad_transformer.errors import DeltaDatasetError, UsageError
from grad_transformer.training import (
    DeltaPairRows,
    GradTransformerTrainingArguments,
    MapperArguments,
    build_mapper,
    evaluate_heldout,
    train_mapper,
)
from grad_transformer.training.backbone import backbone_or_config
from tests.worlds import tiny_root


TASKS = 6
SMALL = MapperArguments(d_model=32, d_ff=64, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    path = tmp_path_factory.mktemp("roots")
    return tiny_root(path / "tiny", layers=2), tiny_root(path / "large", layers=3, hidden=32)


def make_pairs(roots, *, runs=72, noise=0.1, seed=0, permute=False):
    """Pairs whose target is a fixed linear map of the source, plus noise: what a mapper can learn."""
    source_size, target_size = (root.layout.numel for root in roots)
    fixed = torch.Generator().manual_seed(7)
    directions = torch.randn(TASKS, source_size, generator=fixed)
    targets = torch.randn(TASKS, target_size, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    task = torch.arange(runs) % TASKS
    source = directions[task] + noise * torch.randn(runs, source_size, generator=generator)
    target = targets[task] + noise * torch.randn(runs, target_size, generator=generator)
    if permute:
        # Among runs, so that every task's inputs meet every task's targets equally often.
        group = torch.arange(runs) // TASKS
        source = source[group * TASKS + (task + group) % TASKS]
    return source, target, [f"task-{index}" for index in task.tolist()]


def split(source, target, tasks, *, prefix):
    features = datasets.Features(
        {
            "shadow_id": datasets.Value("string"),
            "task": datasets.Value("string"),
            "step": datasets.Value("int32"),
            "source_blocks": datasets.List(datasets.Value("float32"), length=source.shape[1]),
            "target_blocks": datasets.List(datasets.Value("float32"), length=target.shape[1]),
        }
    )
    columns = {
        "shadow_id": [f"{prefix}-{index}" for index in range(len(source))],
        "task": tasks,
        "step": [1] * len(source),
        "source_blocks": source.numpy(),
        "target_blocks": target.numpy(),
    }
    return datasets.Dataset.from_dict(columns, features=features)


def make_splits(roots, *, permute=False):
    return {
        "train": split(*make_pairs(roots, permute=permute), prefix="train"),
        "validation": split(*make_pairs(roots, runs=12, seed=1), prefix="validation"),
        "test": split(*make_pairs(roots, runs=12, seed=2), prefix="test"),
    }


def arguments(output_dir, **overrides):
    settings = {
        "max_steps": 120,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 40,
        "save_steps": 40,
        "disable_tqdm": True,
        "use_cpu": True,
        "mixup_alpha": 0.0,
        "seed": 0,
    }
    return GradTransformerTrainingArguments(output_dir=str(output_dir), **{**settings, **overrides})


def train(roots, splits, output_dir, *, mapper=SMALL, **overrides):
    model = build_mapper(splits["train"], *roots, mapper, seed=0)
    return train_mapper(model, splits, arguments(output_dir, **overrides))


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_a_trained_mapper_reads_its_input(roots, tmp_path, decoding):
    mapper = MapperArguments(d_model=32, d_ff=64, num_layers=1, num_heads=2, decoding=decoding)
    trainer, heldout = train(roots, make_splits(roots), tmp_path, mapper=mapper)
    assert heldout.r2_ceiling > 0.9
    assert heldout.r2 > 0.9 * heldout.r2_ceiling
    assert heldout.r2_teacher_forced > 0.9 * heldout.r2_ceiling
    assert heldout.r2_permuted_inputs <= 0
    assert max(heldout.block_mse) < 0.2
    logged = [entry for entry in trainer.state.log_history if "eval_r2" in entry]
    assert len(logged) == 3
    assert {"eval_loss", "eval_r2_teacher_forced", "eval_r2_permuted_inputs", "eval_block_mse_2"} <= logged[0].keys()


def test_permuted_pairs_teach_nothing(roots, tmp_path):
    """The held-out R² means something: break the link between inputs and targets, and it falls to 0 or below.

    The teacher-forced one does not: the true blocks before a block tell its task. So free-running comes first.
    """
    _, heldout = train(roots, make_splits(roots, permute=True), tmp_path)
    assert heldout.r2 <= 0
    assert heldout.r2_ceiling > 0.9
    assert heldout.r2_teacher_forced > 0.5


def test_resuming_gives_the_same_mapper_as_an_uninterrupted_run(roots, tmp_path):
    splits = make_splits(roots)
    train(roots, splits, tmp_path / "whole")
    model = build_mapper(splits["train"], *roots, SMALL, seed=0)
    args = arguments(tmp_path / "parts")

    class Interrupt(Exception):
        pass

    from transformers import TrainerCallback

    from grad_transformer.training import GradTransformerTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 50:
                raise Interrupt

    trainer = GradTransformerTrainer(
        model, args, train_dataset=splits["train"], eval_dataset=splits["validation"], callbacks=[Stop()]
    )
    with pytest.raises(Interrupt):
        trainer.train()
    train(roots, splits, tmp_path / "parts")
    one, two = (GradTransformer.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_saved_mapper_is_the_best_one_and_holds_no_pickle(roots, tmp_path):
    splits = make_splits(roots)
    trainer, heldout = train(roots, splits, tmp_path)
    loaded = GradTransformer.from_pretrained(tmp_path)
    source, target = (torch.from_numpy(np.stack(splits["test"].with_format("numpy")[name][:])) for name in BLOCKS)
    again = evaluate_heldout(loaded, source, target, list(splits["test"]["shadow_id"]))
    assert abs(again.r2 - heldout.r2) < 1e-5
    assert trainer.state.best_metric == max(
        entry["eval_r2"] for entry in trainer.state.log_history if "eval_r2" in entry
    )
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"config.json", "model.safetensors", "training_args.json"}
    assert json.loads((tmp_path / "training_args.json").read_text())["learning_rate"] == 3e-3


BLOCKS = ("source_blocks", "target_blocks")


def test_early_stopping_ends_a_run_that_no_longer_improves(roots, tmp_path):
    trainer, _ = train(
        roots,
        make_splits(roots, permute=True),
        tmp_path,
        max_steps=400,
        eval_steps=20,
        save_steps=20,
        early_stopping_patience=2,
    )
    assert trainer.state.global_step < 400


def test_gradient_accumulation_does_not_change_the_loss(roots, tmp_path):
    splits = make_splits(roots)
    losses = []
    for batch, steps in ((16, 1), (4, 4)):
        trainer, _ = train(
            roots,
            splits,
            tmp_path / str(batch),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
        )
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=0.15)


def test_mixup_and_noise_keep_shapes_and_leave_evaluation_alone(roots, tmp_path):
    trainer, heldout = train(roots, make_splits(roots), tmp_path, mixup_alpha=0.4, source_noise=0.5)
    assert heldout.r2 > 0.5
    again = trainer.measure(make_splits(roots)["test"])
    assert again == heldout


def test_held_out_figures_are_those_of_whole_matrices_however_they_are_read(roots, tmp_path):
    """Batch by batch from disk, or from tensors at once: the formulas of the figures hold."""
    splits = make_splits(roots)
    trainer, heldout = train(roots, splits, tmp_path, max_steps=40)
    model = trainer.model
    pairs = DeltaPairRows(splits["test"])
    source, target = pairs.source[:], pairs.target[:]
    known = evaluate_heldout(
        model,
        source,
        target,
        pairs.shadow_ids,
        tasks=pairs.tasks,
        train_target_NP=DeltaPairRows(splits["train"]).target,
        train_tasks=list(splits["train"]["task"]),
        batch_size=5,
    )
    for name, value in heldout.to_dict().items():
        assert getattr(known, name) == pytest.approx(value, rel=1e-6)
    mean = model.tokenizers()[1].mean_P
    predicted = model.generate_deltas(source)
    assert known.r2 == pytest.approx(r2_around_mean(predicted, target, mean), abs=1e-6)
    permuted = predicted[permutation_without_fixed_run(pairs.shadow_ids, 0)]
    assert known.r2_permuted_inputs == pytest.approx(r2_around_mean(permuted, target, mean), abs=1e-6)
    widths = model.tokenizers()[1].layout.widths
    parts = zip(predicted.split(widths, 1), target.split(widths, 1), mean.split(widths), strict=True)
    assert known.block_mse == pytest.approx([1 - r2_around_mean(*part) for part in parts], abs=1e-6)
    assert not model.training


def test_no_step_of_training_or_evaluation_reads_more_than_a_batch(roots, tmp_path, monkeypatch):
    """What bounds memory: nobody asks for many rows at once."""
    asked = []
    read = DeltaRows.__getitem__

    def watched(self, rows):
        values = read(self, rows)
        asked.append(values.numel() // self.shape[1])
        return values

    splits = make_splits(roots)
    monkeypatch.setattr(DeltaRows, "__getitem__", watched)
    monkeypatch.setattr("grad_transformer.adapters.rows.CHUNK_VALUES", 2000)
    train(roots, splits, tmp_path, max_steps=10, eval_steps=10, save_steps=10, per_device_eval_batch_size=5)
    assert 5 <= max(asked) <= 16
    assert sum(asked) > 10 * 16


def test_a_run_on_both_sides_of_the_split_is_refused(roots, tmp_path):
    splits = make_splits(roots)
    splits["validation"] = splits["train"]
    with pytest.raises(DeltaDatasetError, match="on both sides"):
        train(roots, splits, tmp_path)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(UsageError, match="do not divide"):
        backbone_or_config(MapperArguments(d_model=10, num_heads=4))

"""Train the mapper on a delta dataset, and measure it on shadow runs that it never saw.

    grad-transformer train --dataset deltas --output_dir mapper --backbone google/flan-t5-large
    grad-transformer train --dataset acme/qwen2.5-3b-to-7b-deltas@v1.0 --output_dir mapper
    grad-transformer train --dataset deltas --output_dir mapper --d_model 128 --max_steps 600 --learning_rate 1e-3
    accelerate launch -m grad_transformer.cli train --config train.yaml

Also takes every argument of transformers' TrainingArguments. The first number of the result is the held-out R² around
the mean shadow: at or below 0 the mapper ignores its input. Interrupted, it goes on from its last checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.io import write_json_atomic
from ..adapters.shift import MINIMUM_SHADOWS, ShiftReference
from ..constants import HELDOUT_NAME, TRAINING_LOG_NAME
from ..evaluation.clients import score_heldout
from ..evaluation.controls import fit_controls
from ..shadow import load_delta_dataset
from ..training import build_mapper, train_mapper
from ..training.arguments import GradTransformerTrainingArguments, MapperArguments
from ._common import CommandParser, CommandResult, format_table


@dataclass(frozen=True)
class TrainArguments:
    """Arguments of `grad-transformer train`, beside those of mapper and training."""

    dataset: str = field(metadata={"help": "Delta dataset: the folder that `build` wrote, or a Hub repository."})


def make_parser() -> CommandParser:
    return CommandParser(
        TrainArguments, MapperArguments, GradTransformerTrainingArguments, command="train", description=__doc__
    )


def main(
    args: TrainArguments, mapper_args: MapperArguments, training_args: GradTransformerTrainingArguments
) -> CommandResult:
    data = train(args.dataset, mapper_args, training_args)
    heldout = data["heldout"]
    rows = [[name, heldout[name]] for name in HEADLINE if name in heldout]
    text = f"Mapper: {data['output_dir']}  ({data['parameters']:,} parameters, {data['steps']} steps)\n" + (
        format_table(["R² on held-out shadow runs", "value"], rows) if rows else "No test runs: nothing was held out."
    )
    return CommandResult(data, text)


HEADLINE = ("r2", "r2_teacher_forced", "r2_permuted_inputs", "r2_ceiling", "r2_ridge", "r2_nearest_shadow")


def train(
    dataset_dir: str | Path, mapper_args: MapperArguments, training_args: GradTransformerTrainingArguments
) -> dict[str, Any]:
    """Train on a delta dataset; writes the mapper, its held-out figures and its training log."""
    deltas = load_delta_dataset(dataset_dir)
    recipes = deltas.manifest["recipes"]
    model = build_mapper(
        deltas.splits["train"],
        deltas.source_root,
        deltas.target_root,
        mapper_args,
        source_recipe=recipes["source"],
        target_recipe=recipes["target"],
        seed=training_args.seed,
    )
    if deltas.origin is not None:
        model.config.delta_dataset = deltas.origin.to_dict()
    trainer, heldout = train_mapper(model, deltas.splits, training_args)
    data: dict[str, Any] = {
        "output_dir": training_args.output_dir,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "heldout": {},
    }
    if heldout is not None:
        train_pairs, test = deltas.pairs("train"), deltas.pairs("test")
        validation = deltas.pairs("validation") if "validation" in deltas.splits else test
        predictors = fit_controls(
            train_pairs.source,
            train_pairs.target,
            validation=(validation.source, validation.target),
            source_widths=deltas.source_layout.widths,
        )
        mean_Y = model.tokenizers()[1].mean_P
        assert mean_Y is not None
        scores = score_heldout(heldout, predictors, test.source, test.target, mean_Y)
        controls = {f"r2_{name}": value for name, value in scores.controls.items()}
        data["heldout"] = {**heldout.to_dict(), **controls}
        if trainer.is_world_process_zero() and len(train_pairs.source) >= MINIMUM_SHADOWS:
            unseen_runs = deltas.pairs(*(name for name in deltas.splits if name != "train")).source
            shift = ShiftReference.fit(train_pairs.source, unseen_runs, layout=deltas.source_layout)
            shift.save_pretrained(training_args.output_dir)
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        write_json_atomic(folder / TRAINING_LOG_NAME, {"log_history": trainer.state.log_history})
        write_json_atomic(folder / HELDOUT_NAME, data["heldout"])
    return data

"""Train the mapper on a delta dataset, and measure it on shadow runs that it never saw.

    grad-transformer train --dataset deltas --output_dir mapper --backbone google/flan-t5-large
    grad-transformer train --dataset acme/qwen2.5-3b-to-7b-deltas@v1.0 --output_dir mapper
    grad-transformer train --dataset deltas --output_dir mapper --d_model 128 --max_steps 600 --learning_rate 1e-3
    accelerate launch -m grad_transformer.cli train --config train.yaml

Also takes every argument of transformers' TrainingArguments; --help_all lists them. The first number of the result is
the held-out R² around the mean shadow: at or below 0 the mapper ignores its input. Interrupted, it goes on from its
last whole checkpoint. A folder belongs to one dataset and one set of arguments: others are refused, unless with
--overwrite_output_dir.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..constants import HELDOUT_NAME, TRAINING_LOG_NAME
from ..errors import UsageError
from ..locks import sole_writer
from ..outputs import prepare_output
from ..training.arguments import MapperArguments, TrainingOptions
from ._common import CommandParser, CommandResult, format_table


if TYPE_CHECKING:
    from ..shadow import DeltaDataset
    from ..training import GradTransformerTrainer, GradTransformerTrainingArguments, HeldoutMetrics, TrainingIdentity


@dataclass(frozen=True)
class TrainArguments:
    """Arguments of `grad-transformer train`, beside those of mapper and training."""

    dataset: str = field(metadata={"help": "Delta dataset: the folder that `build` wrote, or a Hub repository."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train anew: remove what an earlier training left in the folder."}
    )


def make_parser() -> CommandParser:
    return CommandParser(
        TrainArguments,
        MapperArguments,
        TrainingOptions,
        command="train",
        description=__doc__,
        everything=all_argument_types,
    )


def all_argument_types() -> tuple[type, ...]:
    """With transformers' own, whose import takes seconds."""
    from ..training import GradTransformerTrainingArguments

    return TrainArguments, MapperArguments, GradTransformerTrainingArguments


def main(
    args: TrainArguments, mapper_args: MapperArguments, training_args: GradTransformerTrainingArguments
) -> CommandResult:
    data = train(args.dataset, mapper_args, training_args, overwrite=args.overwrite_output_dir)
    heldout = data["heldout"]
    rows = [[name, heldout[name]] for name in HEADLINE if name in heldout]
    before = " It was finished before: nothing was trained now." if data["finished_before"] else ""
    text = f"Mapper: {data['output_dir']}  ({data['parameters']:,} parameters, {data['steps']} steps){before}\n"
    if rows:
        text += format_table(["R² on held-out shadow runs", "value"], rows) + "\n"
    return CommandResult(data, text + verdict(heldout, data["validation_r2"], data["output_dir"]))


HEADLINE = ("r2", "r2_teacher_forced", "r2_permuted_inputs", "r2_ceiling", "r2_ridge", "r2_nearest_shadow")


def verdict(heldout: dict[str, Any], validation_r2: float | None, output_dir: str) -> str:
    """What the figures mean, and what to do next."""
    if not heldout:
        known = "" if validation_r2 is None else f" On the validation runs that chose it, R² is {validation_r2:.3f}."
        return (
            f"No test runs were held out, so how good the mapper is was not measured.{known} "
            "To know, plan runs with --test_fraction."
        )
    r2, permuted, ceiling = (heldout.get(name) for name in ("r2", "r2_permuted_inputs", "r2_ceiling"))
    assert r2 is not None
    if r2 <= 0:
        return (
            "The mapper does no better than the mean shadow, so it ignores its input: do not use it. Train longer or "
            "with another --learning_rate, or plan more shadow runs."
        )
    if permuted is not None and permuted >= r2 / 2:
        return (
            "The mapper does as well with another run's input, so it hardly reads its own: do not use it. Train "
            "longer, or plan more shadow runs."
        )
    share = "" if ceiling is None or ceiling <= 0 else f", {min(r2 / ceiling, 1):.0%} of what tasks alone explain"
    better = max(
        (name for name in ("ridge", "nearest_shadow") if heldout.get(f"r2_{name}", -1) > r2),
        key=lambda name: float(heldout[f"r2_{name}"]),
        default=None,
    )
    if better is not None:
        return (
            f"The mapper reads its input (R² {r2:.3f}{share}), but {better.replace('_', ' ')} does better: train "
            f"longer, or use `generate --method {better}`."
        )
    read = "reads its input" if permuted is not None else "beats the mean shadow"
    return f"The mapper {read} (R² {r2:.3f}{share}). Next: grad-transformer client --mapper {output_dir}"


def train(
    dataset_dir: str | Path,
    mapper_args: MapperArguments,
    training_args: GradTransformerTrainingArguments,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train on a delta dataset; writes the mapper, its held-out figures and its training log.

    The same call again goes on where the first was interrupted, or says again what it found at its end.

    Raises:
        [`OutputError`]: the folder holds something else, or the mapper of another training and not `overwrite`; it
            cannot be written to; or another process trains there.
        [`UsageError`]: a tracker of `report_to` is not known or not installed.
    """
    from ..shadow import load_delta_dataset
    from ..training import TrainingIdentity, remove_training

    _check_trackers(training_args.report_to)
    folder = prepare_output(training_args.output_dir, "mapper", inputs=[dataset_dir, mapper_args.backbone])
    deltas = load_delta_dataset(dataset_dir)
    identity = TrainingIdentity.of(deltas.identity, mapper_args, training_args)
    first = training_args.process_index == 0
    with sole_writer(folder) if first else nullcontext():
        # The others look once the first process has made its claim.
        with training_args.main_process_first(local=False):
            if overwrite and first:
                remove_training(folder)
            finished = identity.check(folder)
            if first and finished is None:
                identity.write(folder)
        if finished is not None:
            return {**finished, "output_dir": training_args.output_dir, "finished_before": True}
        data = _train(deltas, identity, mapper_args, training_args)
        if first:
            identity.write(folder, data)
    return data


def _train(
    deltas: DeltaDataset,
    identity: TrainingIdentity,
    mapper_args: MapperArguments,
    training_args: GradTransformerTrainingArguments,
) -> dict[str, Any]:
    from ..adapters.io import write_json_atomic
    from ..training import build_mapper, train_mapper

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
    model.config.delta_dataset = {**deltas.identity, **({} if deltas.origin is None else deltas.origin.to_dict())}
    model.config.training_fingerprint = identity.fingerprint
    trainer, heldout = train_mapper(model, deltas.splits, training_args)
    data: dict[str, Any] = {
        "output_dir": training_args.output_dir,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
        "heldout": _score(deltas, trainer, heldout),
        "validation_r2": trainer.state.best_metric if training_args.metric_for_best_model == "r2" else None,
        "finished_before": False,
    }
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        write_json_atomic(folder / TRAINING_LOG_NAME, {"log_history": trainer.state.log_history})
        write_json_atomic(folder / HELDOUT_NAME, data["heldout"])
    return data


def _score(deltas: DeltaDataset, trainer: GradTransformerTrainer, heldout: HeldoutMetrics | None) -> dict[str, Any]:
    """The held-out figures beside those of the controls; writes the shift reference where runs were held out."""
    from ..evaluation.clients import score_heldout
    from ..evaluation.controls import fit_controls
    from ..evaluation.shift import MINIMUM_SHADOWS, ShiftReference

    unseen = [name for name in deltas.splits if name != "train"]
    if not unseen:
        return {}
    train_pairs, widths = deltas.pairs("train"), deltas.source_layout.widths
    if trainer.is_world_process_zero() and len(train_pairs.source) >= MINIMUM_SHADOWS:
        shift = ShiftReference.fit(train_pairs.source, deltas.pairs(*unseen).source, widths=widths)
        shift.save_pretrained(trainer.args.output_dir)
    if heldout is None:
        return {}
    predictors = fit_controls(
        train_pairs.source, train_pairs.target, validation=deltas.tuning_pairs(), source_widths=widths
    )
    test = deltas.pairs("test")
    mean_Y = trainer.data_collator.target_tokenizer.mean_P
    assert mean_Y is not None
    scores = score_heldout(heldout, predictors, test.source, test.target, mean_Y)
    return {**heldout.to_dict(), **{f"r2_{name}": value for name, value in scores.controls.items()}}


def _check_trackers(report_to: str | list[str] | None) -> None:
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(
                "There is no such experiment tracker.", expected=", ".join(INTEGRATION_TO_CALLBACK), found=name
            )
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise UsageError(
                "The experiment tracker is not installed.",
                expected=f"the package of {name}",
                found="none",
                remedy="install it, or leave --report_to out",
            )

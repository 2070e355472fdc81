"""What `train` does: a mapper on a delta dataset, in a folder that is its own, measured beside the controls."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..adapters.io import write_json_atomic
from ..adapters.shift import MINIMUM_SHADOWS, ShiftReference
from ..constants import HELDOUT_NAME, TRAINING_LOG_NAME
from ..errors import UsageError
from ..evaluation.clients import score_heldout
from ..evaluation.controls import fit_controls
from ..locks import sole_writer
from ..outputs import prepare_output
from ..shadow import DeltaDataset, load_delta_dataset
from ..training import (
    GradTransformerTrainer,
    GradTransformerTrainingArguments,
    HeldoutMetrics,
    MapperArguments,
    TrainingIdentity,
    build_mapper,
    remove_training,
    train_mapper,
)


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
    unseen = [name for name in deltas.splits if name != "train"]
    if not unseen:
        return {}
    train_pairs, widths = deltas.pairs("train"), deltas.source_layout.widths
    if trainer.is_world_process_zero() and len(train_pairs.source) >= MINIMUM_SHADOWS:
        shift = ShiftReference.fit(train_pairs.source, deltas.pairs(*unseen).source, layout=deltas.source_layout)
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
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(
                "There is no such experiment tracker.",
                expected=", ".join(INTEGRATION_TO_CALLBACK),
                found=name,
                remedy="check the spelling, or leave --report_to out",
            )
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise UsageError(
                "The experiment tracker is not installed.",
                expected=f"the package of {name}",
                found="none",
                remedy="install it, or leave --report_to out",
            )

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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..training.arguments import MapperArguments, TrainingOptions
from ._common import CommandParser, CommandResult, format_table


if TYPE_CHECKING:
    from ..training import GradTransformerTrainingArguments


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
    from ._training import train

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
    read = "reads its input" if permuted is not None else "beats the mean shadow"
    if better is not None:
        return (
            f"The mapper {read} (R² {r2:.3f}{share}), but {better.replace('_', ' ')} does better: train "
            f"longer, or use `generate --method {better}`."
        )
    return f"The mapper {read} (R² {r2:.3f}{share}). Next: grad-transformer client --mapper {output_dir}"

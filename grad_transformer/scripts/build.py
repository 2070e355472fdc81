"""Turn the finished runs of a plan into a delta dataset: pairs of TinyLM and LLM deltas, split by run.

    grad-transformer build shadows --output_dir deltas

The result loads with plain `datasets.load_dataset("deltas")`. Building again is safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..outputs import prepare_output
from ._common import CommandParser, CommandResult, format_table


@dataclass(frozen=True)
class BuildArguments:
    """Arguments of `grad-transformer build`."""

    plan_dir: str = field(metadata={"help": "Folder of the plan and its runs.", "positional": True})
    output_dir: str = field(metadata={"help": "Folder for the delta dataset."})
    allow_missing: bool = field(default=False, metadata={"help": "Leave unfinished runs out instead of refusing."})


def make_parser() -> CommandParser:
    return CommandParser(BuildArguments, command="build", description=__doc__)


def main(args: BuildArguments) -> CommandResult:
    from ..shadow import build_delta_dataset

    prepare_output(args.output_dir, "delta_dataset", inputs=[args.plan_dir])
    manifest = build_delta_dataset(args.plan_dir, args.output_dir, allow_missing=args.allow_missing)
    rows = [[split, count["runs"], count["pairs"]] for split, count in manifest["splits"].items()]
    data = {"output_dir": args.output_dir, "splits": manifest["splits"], "missing_runs": manifest["missing_runs"]}
    text = (
        f"{format_table(['split', 'runs', 'pairs'], rows)}\n"
        f"Next: grad-transformer train --dataset {args.output_dir} --output_dir mapper"
    )
    return CommandResult(data, text)

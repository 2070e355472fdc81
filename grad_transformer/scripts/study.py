"""Run a study: experiments × seeds, planned first, shared wherever they need the same, resumed where they stopped.

    grad-transformer study --output_dir study --dry_run
    grad-transformer study --output_dir study --seeds 0 --experiments single_client privacy
    grad-transformer study --config examples/paper/gsm8k.yaml --output_dir paper

Without a config it is the lab's study, of small models made on the spot; the paper's are in examples/paper of this
library's source. It ends in study.json, study.md and pictures.
Interrupted, the same command goes on; another study in the same folder shares the stages that both need.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UsageError
from ..outputs import prepare_output
from ..study.spec import StudySpec
from ..wording import describe_bytes, describe_seconds
from ._common import CommandParser, CommandResult, format_table


@dataclass(frozen=True)
class StudyArguments:
    """Arguments of `grad-transformer study`, beside what is studied."""

    output_dir: str = field(metadata={"help": "Folder for stages, study.json, study.md and pictures."})
    dry_run: bool = field(default=False, metadata={"help": "Show stages and what they cost; run nothing."})
    num_workers: int = field(
        default=1, metadata={"help": "Processes; with more than one, each computes with one thread."}
    )
    gpu: str = field(
        default="cpu", metadata={"help": "What --dry_run estimates for: cpu, A100, H100, H200, L40S, RTX4090."}
    )


def make_parser() -> CommandParser:
    return CommandParser(StudyArguments, StudySpec, command="study", description=__doc__)


def main(args: StudyArguments, given: StudySpec) -> CommandResult:
    from pathlib import Path

    from transformers.utils import logging

    from ..study.builders import StudyBuilder
    from ..study.cost import estimate
    from ..study.experiments import EXPERIMENTS, experiments_of
    from ..study.runner import run_stages
    from ..study.schema import check_study
    from ..study.stages import in_order
    from ..study.summary import STUDY_MARKDOWN_NAME, write_study
    from ..study.tables import verdicts

    if args.num_workers < 1:
        raise UsageError("There must be a process.", expected="--num_workers of at least 1", found=args.num_workers)
    spec = check_study(given.filled(list(EXPERIMENTS)))
    experiments = experiments_of(spec.experiments)
    needed = {
        experiment.name: [
            stage
            for seed in spec.seeds
            for line in experiment.build(StudyBuilder(spec, seed))
            for stage in line.stages
        ]
        for experiment in experiments
    }
    stages = in_order(stage for found in needed.values() for stage in found)
    if args.dry_run:
        costs = estimate(spec, stages, args.output_dir, gpu=args.gpu)
        rows = [
            [
                cost.kind,
                cost.number,
                cost.finished,
                describe_seconds(3600 * cost.hours),
                describe_bytes(2**30 * cost.disk_gib),
                describe_bytes(2**30 * cost.memory_gib),
            ]
            for cost in costs
        ]
        listed = [[e.name, e.paper, len(in_order(needed[e.name]))] for e in experiments]
        total = sum(cost.hours for cost in costs)
        disk = sum(cost.disk_gib for cost in costs)
        memory = max(cost.memory_gib for cost in costs)
        text = "\n\n".join(
            [
                format_table(["experiment", "of the paper", "stages"], listed),
                format_table(["stage", "number", "finished", "time", "disk", "memory"], rows),
                f"{len(stages)} stages, each once, for {len(spec.seeds)} seed(s): about "
                f"{describe_seconds(3600 * total)} of one {'core' if args.gpu == 'cpu' else args.gpu}, "
                f"{describe_bytes(2**30 * disk)} of disk,\nat most {describe_bytes(2**30 * memory)} of memory. "
                "Nothing was run (--dry_run); without it, the same command starts.",
            ]
        )
        data = {
            "stages": len(stages),
            "hours": total,
            "disk_gib": disk,
            "memory_gib": memory,
            "gpu": args.gpu,
            "experiments": {name: len(in_order(found)) for name, found in needed.items()},
            "costs": [cost.to_dict() for cost in costs],
        }
        return CommandResult(data, text)
    prepare_output(args.output_dir, "study")
    # Models of a moment's loading; the study's own bar says what is going on.
    logging.disable_progress_bar()
    run_stages(stages, args.output_dir, num_workers=args.num_workers)
    study = write_study(spec, experiments, args.output_dir)
    main_lines = verdicts(study["experiments"]["single_client"]) if "single_client" in study["experiments"] else []
    text = "\n".join([*main_lines, f"Report: {Path(args.output_dir) / STUDY_MARKDOWN_NAME}"])
    return CommandResult(study, text)

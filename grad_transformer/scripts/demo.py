"""The whole method on a small self-made world, on a laptop: three phases, a table, pictures, and PEFT adapters.

    grad-transformer demo --output_dir demo_output --preset quick
    grad-transformer demo --output_dir demo_full --preset full --seed 1

Base models are pretrained on the spot; shadows, mapper, clients and controls are what the other commands make, in the
same folders, which `grad-transformer inspect` reads. Interrupted, it goes on from what is finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..outputs import prepare_output
from ._common import CommandParser, CommandResult


@dataclass(frozen=True)
class DemoArguments:
    """Arguments of `grad-transformer demo`."""

    output_dir: str = field(default="demo_output", metadata={"help": "Folder for everything that the demo makes."})
    preset: str = field(
        default="quick",
        metadata={"help": "quick: a few minutes; full: the README's figures.", "choices": ["quick", "full"]},
    )
    seed: int = field(default=0, metadata={"help": "Another seed gives another world."})


def make_parser() -> CommandParser:
    return CommandParser(DemoArguments, command="demo", description=__doc__)


def main(args: DemoArguments) -> CommandResult:
    from transformers.utils import logging

    from ..evaluation.report import summary_table
    from ..lab import LabWorld
    from ._demo import Demo

    # Models of a moment's loading; the demo's own bars say what is going on.
    logging.disable_progress_bar()
    prepare_output(args.output_dir, "demo")
    demo = Demo(LabWorld(args.seed, args.preset), Path(args.output_dir))
    report = demo.run()
    text = (
        f"{summary_table(report)}\n\n"
        f"Report and pictures: {demo.folder / 'report.md'}\n"
        f"LLM adapters:        {demo.folder / 'clients'}/*/refined and .../generated\n"
        f"                     for plain peft on {demo.folder}/base_models/llm\n"
        f"Next: open the report, or look at a part of it: grad-transformer inspect {demo.folder / 'mapper'}"
    )
    return CommandResult(report.to_dict(), text)

"""Split public data into shadow subsets, freeze them in plan.json beside both roots, and show what they will cost.

    grad-transformer plan --data public.jsonl --source_model Qwen/Qwen2.5-3B-Instruct \\
        --target_model Qwen/Qwen2.5-7B-Instruct --num_runs 300 --rows_per_run 1024 --output_dir shadows
    grad-transformer plan --config plan.yaml --dry_run
    grad-transformer plan --config plan.yaml --estimate --estimate_device H100

Rows have a `prompt` and a `completion` (or `messages`, or Alpaca's columns), and optionally a `task`. All of them are
rendered and tokenised for both models here: what a chat template refuses fails now. The root of each model, the
adapter that all its runs start from, is drawn here once. Fine-tuning arguments hold for both models; those with
`target_` are the LLM's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..outputs import prepare_output
from ._common import CommandParser, CommandResult, format_table
from ._rows import RowFlags


@dataclass(frozen=True)
class PlanArguments:
    """Arguments of `grad-transformer plan`."""

    data: str = field(
        metadata={
            "help": "Public rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a Hub dataset: "
            "org/name, org/name:configuration or org/name@revision."
        }
    )
    source_model: str = field(metadata={"help": "TinyLM: folder or Hub repository of a causal language model."})
    target_model: str = field(metadata={"help": "LLM: likewise."})
    output_dir: str = field(metadata={"help": "Folder for plan, roots and, later, runs."})
    data_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    data_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    source_revision: str | None = field(default=None, metadata={"help": "Revision of the TinyLM."})
    target_revision: str | None = field(default=None, metadata={"help": "Revision of the LLM."})
    dry_run: bool = field(default=False, metadata={"help": "Show the plan; load no weights, write nothing."})
    estimate: bool = field(
        default=False, metadata={"help": "Predict hours, disk and memory from the models' configs; write nothing."}
    )
    estimate_device: str = field(
        default="H100",
        metadata={"help": "What to predict for.", "choices": ["A100", "H100", "H200", "L40S", "RTX4090"]},
    )
    estimate_mfu: float = field(default=0.35, metadata={"help": "Share of the device's FLOP/s that is reached."})

    # Subsets
    num_runs: int = field(default=300, metadata={"help": "Number of shadow subsets (paper: 300)."})
    rows_per_run: int = field(default=1024, metadata={"help": "Rows of each subset (paper: 1,024)."})
    strategy: str | None = field(
        default=None,
        metadata={
            "help": "mixed: rows of all tasks; per_task: of one. Default: per_task where every row has a task.",
            "choices": ["mixed", "per_task"],
        },
    )
    with_overlap: bool = field(default=True, metadata={"help": "Whether subsets may share rows."})
    validation_fraction: float = field(default=0.05, metadata={"help": "Share of the runs for validation."})
    test_fraction: float = field(default=0.05, metadata={"help": "Share of the runs held out to the end."})
    seed: int = field(default=0, metadata={"help": "Seed of subsets, data orders and roots."})

    # Adapters
    lora_r: int = field(default=2, metadata={"help": "Rank (paper: 2)."})
    lora_alpha: int = field(default=32, metadata={"help": "Alpha (paper: 32)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA (paper: 0.05)."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Modules to adapt; all-linear for all."}
    )

    # Fine-tuning
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps of a run."})
    per_device_batch_size: int = field(default=16, metadata={"help": "Rows of a micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of an optimizer step."})
    adam_epsilon: float = field(
        default=1e-8, metadata={"help": "AdamW's epsilon; a large one (0.1) makes deltas of one task agree."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping; 0 switches it off."})
    warmup_steps: int = field(default=10, metadata={"help": "Warm-up of the learning rate."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a row."})
    snapshot_last: int = field(default=1, metadata={"help": "Record the adapter after the last so many steps."})
    snapshot_every: int | None = field(default=None, metadata={"help": "Also record it after every so many steps."})
    early_stopping_window: int | None = field(
        default=None, metadata={"help": "End a run whose mean loss of so many steps no longer falls."}
    )
    early_stopping_threshold: float = field(default=0.01, metadata={"help": "Relative fall that counts as progress."})
    target_learning_rate: float | None = field(default=None, metadata={"help": "The LLM's own learning rate."})
    target_max_steps: int | None = field(default=None, metadata={"help": "The LLM's own number of steps."})


def make_parser() -> CommandParser:
    return CommandParser(PlanArguments, RowFlags, command="plan", description=__doc__)


_RECIPE = (
    "learning_rate",
    "max_steps",
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "lr_scheduler_type",
    "max_length",
    "snapshot_last",
    "snapshot_every",
    "early_stopping_window",
    "early_stopping_threshold",
)


def main(args: PlanArguments, columns: RowFlags) -> CommandResult:
    import dataclasses
    import tempfile
    from pathlib import Path

    from peft import LoraConfig

    from ..adapters import create_root
    from ..adapters.bases import load_tokenizer
    from ..errors import UsageError
    from ..finetuning import FineTuningRecipe, RowSource, load_source
    from ..shadow import plan_shadows
    from ..shadow.estimate import DEVICES, assumptions, estimate_side, estimate_table, outline_root
    from ..shadow.planning import check_plan_rows, check_plan_sizes
    from ..shadow.run import root_folder

    if not (args.dry_run or args.estimate):
        prepare_output(args.output_dir, "shadow_plan", inputs=[args.data, args.source_model, args.target_model])
    shared: dict[str, Any] = {name: getattr(args, name) for name in _RECIPE}
    recipes = {"source": FineTuningRecipe(**shared), "target": FineTuningRecipe(**shared)}
    own = {"learning_rate": args.target_learning_rate, "max_steps": args.target_max_steps}
    recipes["target"] = recipes["target"].replace(**{name: value for name, value in own.items() if value is not None})
    check_plan_sizes(
        num_runs=args.num_runs,
        rows_per_run=args.rows_per_run,
        seed=args.seed,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
    )
    modules: str | list[str] = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
    adapter = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    models = {
        "source": (_absolute(args.source_model), args.source_revision),
        "target": (_absolute(args.target_model), args.target_revision),
    }
    if args.estimate:
        if not 0 < args.estimate_mfu <= 1:
            raise UsageError("That is no share.", expected="--estimate_mfu above 0, up to 1", found=args.estimate_mfu)
        sides = {
            role: estimate_side(
                *outline_root(name, adapter, revision=revision),
                recipes[role],
                num_runs=args.num_runs,
                device=DEVICES[args.estimate_device],
                mfu=args.estimate_mfu,
            )
            for role, (name, revision) in models.items()
        }
        assumed = assumptions(args.estimate_device, args.estimate_mfu)
        text = (
            f"{args.num_runs} runs of each model\n{format_table(['', 'TinyLM', 'LLM'], estimate_table(sides))}\n\n"
            "Assumptions\n" + "\n".join(f"  {name}: {value}" for name, value in assumed)
        )
        facts = {role: dataclasses.asdict(side) for role, side in sides.items()}
        return CommandResult({**facts, "assumptions": dict(assumed)}, f"{text}\nNothing was written (--estimate).")
    source = RowSource.of(
        args.data, split=args.data_split, revision=args.data_revision, **columns.arguments()
    ).pinned()
    rows = load_source(source)
    # Everything that can be wrong is found before weights are loaded: models are outlines without them till then.
    outlines = {role: outline_root(name, adapter, revision=revision) for role, (name, revision) in models.items()}
    plan = plan_shadows(
        rows,
        num_runs=args.num_runs,
        rows_per_run=args.rows_per_run,
        source_root=outlines["source"][1],
        target_root=outlines["target"][1],
        source_recipe=recipes["source"],
        target_recipe=recipes["target"],
        data=source.to_dict(),
        seed=args.seed,
        strategy=args.strategy,  # type: ignore[arg-type]
        with_overlap=args.with_overlap,
        validation_fraction=args.validation_fraction,
        test_fraction=args.test_fraction,
    )
    counts = {
        role: check_plan_rows(
            rows, load_tokenizer(name, revision=revision), outlines[role][0], recipes[role].max_length
        )
        for role, (name, revision) in models.items()
    }
    layouts = {role: root.layout for role, (_, root) in outlines.items()}
    if not args.dry_run:
        with tempfile.TemporaryDirectory() as staging:
            roots = {
                role: create_root(name, adapter, output_dir=Path(staging) / role, seed=args.seed, revision=revision)
                for role, (name, revision) in models.items()
            }
        plan = dataclasses.replace(
            plan,
            source=dataclasses.replace(plan.source, root=roots["source"].facts()),
            target=dataclasses.replace(plan.target, root=roots["target"].facts()),
        )
        # First, so that another plan in the folder is refused before its roots are touched.
        plan.save(args.output_dir)
        for role, root in roots.items():
            root.save_pretrained(root_folder(args.output_dir, role))
    data = {
        "output_dir": None if args.dry_run else args.output_dir,
        # Of a plan whose roots are not drawn there is none yet.
        "fingerprint": None if args.dry_run else plan.fingerprint,
        "num_runs": len(plan.runs),
        "strategy": plan.strategy,
        "rows": {role: dataclasses.asdict(count) for role, count in counts.items()},
        "blocks": {role: layout.num_blocks for role, layout in layouts.items()},
        "widths": {role: sorted(set(layout.widths)) for role, layout in layouts.items()},
    }
    end = "Nothing was written (--dry_run)." if args.dry_run else f"Next: grad-transformer shadow {args.output_dir}"
    tokens = "".join(
        f"\n{name}: {counts[role].truncated:,} of {counts[role].rows:,} rows lose their end to max_length "
        f"{recipes[role].max_length}; the longest has {counts[role].longest:,} tokens"
        for role, name in (("source", "TinyLM"), ("target", "LLM"))
    )
    return CommandResult(data, f"{plan.describe()}{tokens}\n{end}")


def _absolute(model: str) -> str:
    """A base model by a name that holds in every folder of this machine."""
    return os.path.realpath(model) if os.path.isdir(model) else model

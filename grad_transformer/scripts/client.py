"""Fine-tune the TinyLM on a client's own rows, from the mapper's root: only the adapter is meant to leave.

    grad-transformer client --mapper acme/qwen2.5-3b-to-7b --data private.jsonl --output_dir bank-a
    grad-transformer client --mapper mapper --data private.jsonl --output_dir bank-a --dp_epsilon 1.0 --dp_delta 1e-5
    grad-transformer client --mapper mapper --data private.jsonl --output_dir ceiling --role target

Rows have a `prompt` and a `completion`, or `messages`, or Alpaca's columns; a file is read strictly, line by line, and
nothing of it is cached. Root, recipe and base model come with the mapper; they are shown before anything starts. Where
they are unusual, or the base model has to be downloaded and `--base_model` does not name it, the command asks, or
needs `--accept_recipe`. An adapter can reveal rows it was trained on: sending only the adapter is no privacy
guarantee, `--dp_epsilon` is. Where people have several rows each, `--dp_group_column patient` protects all rows of
one. `--role target` fine-tunes the LLM in the same way, for comparison.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..outputs import prepare_output
from ._common import CommandParser, CommandResult, check_device
from ._rows import RowFlags


if TYPE_CHECKING:
    from ..adapters import LoraAdapter, PrivacyStatement
    from ..client.terms import ClientTerms
    from ..finetuning import SftResult


@dataclass(frozen=True)
class ClientArguments:
    """Arguments of `grad-transformer client`."""

    mapper: str = field(metadata={"help": "Folder or Hub repository of the mapper."})
    data: str = field(
        metadata={"help": "Rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a Hub dataset."}
    )
    output_dir: str = field(
        metadata={"help": "Folder for the adapter: new, empty, or with an adapter that is to be replaced."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    mapper_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mapper."})
    role: str = field(
        default="source",
        metadata={"help": "source: the TinyLM. target: the LLM, as a reference.", "choices": ["source", "target"]},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Another place of the same base model, for instance a local copy; checked."}
    )
    accept_recipe: bool = field(
        default=False,
        metadata={
            "help": "Accept unusual terms (the mapper's recipe, budget spent in this folder before), and the "
            "download of a base model that the mapper names and --base_model does not."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data order."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the frozen base model; auto: as it is stored."})
    device: str | None = field(default=None, metadata={"help": "Device; default: the first GPU, or the CPU."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations: slower, with less memory."}
    )
    state_num_examples: bool = field(
        default=False,
        metadata={"help": "Write into the adapter how many rows it was fine-tuned on; never with --dp_epsilon."},
    )
    dp_epsilon: float | None = field(
        default=None, metadata={"help": "Fine-tune with DP-SGD and spend this epsilon, 0.01 to 100; needs --dp_delta."}
    )
    dp_delta: float | None = field(
        default=None, metadata={"help": "Delta of the budget: well below one over the number of rows."}
    )
    dp_max_grad_norm: float = field(
        default=1.0, metadata={"help": "Norm that the gradient of each example is clipped to."}
    )
    dp_batch_size: int | None = field(
        default=None,
        metadata={"help": "Expected rows of a noisy step; default: the recipe's. Larger ones bear noise better."},
    )
    dp_group_column: str | None = field(
        default=None, metadata={"help": "Rows with one value in this column (a patient) are protected as a whole."}
    )
    dp_max_rows_per_group: int = field(
        default=8,
        metadata={"help": "Rows of a group that a step reads at most; not to be chosen by looking at the rows."},
    )
    dp_physical_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one forward pass; changes speed and memory alone."}
    )
    dp_gradients: str = field(
        default="hooks",
        metadata={
            "help": "hooks keeps each example's gradient; ghost needs less memory. The same mechanism.",
            "choices": ["hooks", "ghost"],
        },
    )
    dp_accountant: str = field(
        default="prv", metadata={"help": "What computes epsilon; rdp is looser.", "choices": ["prv", "rdp"]}
    )
    dp_checkpoint_dir: str | None = field(
        default=None, metadata={"help": "Keep checkpoints here, and go on from the last one. They are private."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "With --eval_data: stop when its loss has not fallen for so many tenths of the steps."},
    )
    eval_data: str | None = field(default=None, metadata={"help": "Rows that decide when to stop."})
    dp_allow_early_stopping: bool = field(
        default=False, metadata={"help": "Stop early although the bound does not cover the rows of --eval_data."}
    )


def make_parser() -> CommandParser:
    return CommandParser(ClientArguments, RowFlags, command="client", description=__doc__)


def main(args: ClientArguments, columns: RowFlags) -> CommandResult:
    from ..client import finetune_client
    from ..errors import UsageError
    from ..finetuning.data import load_rows

    check_device(args.device, args.dtype)
    if (args.dp_epsilon is None) != (args.dp_delta is None):
        raise UsageError(
            "A privacy budget has two parts.",
            expected="--dp_epsilon and --dp_delta, or neither",
            found=f"dp_epsilon={args.dp_epsilon}, dp_delta={args.dp_delta}",
        )
    if args.dp_epsilon is None and (args.early_stopping_patience is not None or args.eval_data is not None):
        raise UsageError(
            "Without a privacy budget the recipe's steps are taken.",
            expected="--early_stopping_patience and --eval_data only with --dp_epsilon",
            found=f"early_stopping_patience={args.early_stopping_patience}",
        )
    prepare_output(args.output_dir, "client_adapter", inputs=[args.mapper, args.data, args.base_model, args.eval_data])
    if args.dp_epsilon is None and args.dp_group_column is not None:
        raise UsageError(
            "Rows are grouped for differential privacy alone.",
            expected="--dp_group_column only with --dp_epsilon",
            found=f"dp_group_column={args.dp_group_column}",
            remedy="leave --dp_group_column out, or give --dp_epsilon and --dp_delta",
        )
    # Private rows: no table of them is left in a cache.
    reading = {"split": args.data_split, "keep_cache": False, **columns.arguments()}
    rows = load_rows(args.data, keep_column=args.dp_group_column, **reading)
    arguments = {
        "role": args.role,
        "base_model": args.base_model,
        "state_num_examples": args.state_num_examples,
        "dtype": args.dtype,
        "device": args.device,
        "hub_kwargs": {"revision": args.mapper_revision},
        "gradient_checkpointing": args.gradient_checkpointing,
        "accept_recipe": args.accept_recipe or _ask,
        "disable_tqdm": False,
    }
    statement = None
    if args.dp_epsilon is not None:
        try:
            from ..client.private import PrivacyArguments, finetune_client_privately
        except ModuleNotFoundError as cause:
            raise UsageError(
                "Differential privacy needs packages that are not installed.",
                found=cause,
                remedy='pip install "grad-transformer[dp]"',
            ) from cause

        assert args.dp_delta is not None
        adapter, result, statement = finetune_client_privately(
            args.mapper,
            rows,
            args.output_dir,
            privacy=PrivacyArguments(
                epsilon=args.dp_epsilon,
                delta=args.dp_delta,
                max_grad_norm=args.dp_max_grad_norm,
                batch_size=args.dp_batch_size,
                gradients=args.dp_gradients,  # type: ignore[arg-type]
                accountant=args.dp_accountant,  # type: ignore[arg-type]
                group_column=args.dp_group_column,
                max_rows_per_group=args.dp_max_rows_per_group,
                allow_early_stopping=args.dp_allow_early_stopping,
            ),
            physical_batch_size=args.dp_physical_batch_size,
            checkpoint_dir=args.dp_checkpoint_dir,
            eval_rows=None if args.eval_data is None else load_rows(args.eval_data, **reading),
            early_stopping_patience=args.early_stopping_patience,
            **arguments,  # type: ignore[arg-type]
        )
    else:
        adapter, result = finetune_client(args.mapper, rows, args.output_dir, seed=args.seed, **arguments)  # type: ignore[arg-type]
    return _result(args, len(rows), adapter, result, statement)


def _ask(terms: ClientTerms) -> bool:
    """Ask on a terminal; without one, such terms need `--accept_recipe`."""
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        return False
    try:
        # stdout is kept for the result while a command runs: the question goes to stderr.
        return input("Do you accept these terms? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _result(
    args: ClientArguments, num_rows: int, adapter: LoraAdapter, result: SftResult, statement: PrivacyStatement | None
) -> CommandResult:
    data = {
        "output_dir": args.output_dir,
        "base_model": adapter.base_model,
        "rows": num_rows,
        "steps": len(result.losses),
        "first_loss": result.losses[0] if result.losses else None,
        "last_loss": result.losses[-1] if result.losses else None,
        "seconds": result.seconds,
        "privacy": None if statement is None else statement.to_dict(),
    }
    losses = f": loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}" if result.losses else ", all steps resumed"
    text = f"Fine-tuned {adapter.base_model} on {num_rows} rows in {result.seconds:.1f} s{losses}\n"
    text += f"Adapter: {args.output_dir}"
    if statement is not None:
        text += f"\nPrivacy: {statement.statement()}\nNot covered: see {args.output_dir}/README.md"
    else:
        text += (
            "\nPrivacy: none is promised. An adapter can reveal rows it was trained on, even if only the adapter "
            "leaves; only differential privacy (--dp_epsilon, --dp_delta) bounds what it reveals."
        )
    return CommandResult(data, text)

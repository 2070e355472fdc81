"""Fine-tune the TinyLM on a client's own rows, from the mapper's root: only the adapter is meant to leave.

    grad-transformer client --mapper acme/qwen2.5-3b-to-7b --data private.jsonl --output_dir bank-a
    grad-transformer client --mapper mapper --data private.jsonl --output_dir ceiling --role target

Rows have a `prompt` and a `completion`. Root and recipe come with the mapper. An adapter can reveal rows it was
trained on: sending only the adapter is no privacy guarantee. `--role target` fine-tunes the LLM in the same way, for
comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ._common import CommandParser, CommandResult


@dataclass(frozen=True)
class ClientArguments:
    """Arguments of `grad-transformer client`."""

    mapper: str = field(metadata={"help": "Folder or Hub repository of the mapper."})
    data: str = field(metadata={"help": "Rows: a .jsonl, .json, .csv or .parquet file, a folder, or a Hub dataset."})
    output_dir: str = field(metadata={"help": "Folder for the adapter."})
    data_split: str = field(default="train", metadata={"help": "Split of a dataset."})
    mapper_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mapper."})
    role: str = field(
        default="source",
        metadata={"help": "source: the TinyLM. target: the LLM, as a reference.", "choices": ["source", "target"]},
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Another place of the same base model, for instance a local copy; checked."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data order."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the frozen base model; auto: as it is stored."})
    device: str | None = field(default=None, metadata={"help": "Device; default: the first GPU, or the CPU."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations: slower, with less memory."}
    )
    state_num_examples: bool = field(
        default=False, metadata={"help": "Write into the adapter how many rows it was fine-tuned on."}
    )


def make_parser() -> CommandParser:
    return CommandParser(ClientArguments, command="client", description=__doc__)


def main(args: ClientArguments) -> CommandResult:
    from ..client import finetune_client
    from ..finetuning import load_rows

    rows = load_rows(args.data, split=args.data_split)
    adapter, result = finetune_client(
        args.mapper,
        rows,
        args.output_dir,
        role=args.role,  # type: ignore[arg-type]
        base_model=args.base_model,
        seed=args.seed,
        state_num_examples=args.state_num_examples,
        dtype=args.dtype,
        device=args.device,
        hub_kwargs={"revision": args.mapper_revision},
        gradient_checkpointing=args.gradient_checkpointing,
    )
    data = {
        "output_dir": args.output_dir,
        "base_model": adapter.base_model,
        "rows": len(rows),
        "steps": len(result.losses),
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "seconds": result.seconds,
    }
    text = (
        f"Fine-tuned {adapter.base_model} on {len(rows)} rows in {result.seconds:.1f} s: "
        f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}\nAdapter: {args.output_dir}"
    )
    return CommandResult(data, text)

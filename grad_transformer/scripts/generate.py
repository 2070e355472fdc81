"""Map client adapters of the TinyLM to one PEFT adapter for the LLM.

    grad-transformer generate --mapper acme/qwen2.5-3b-to-7b --adapters bank-a bank-b --output_dir llm-adapter
    grad-transformer generate --mapper mapper --adapters a b --aggregation weighted --weights 300 700 --output_dir out

Several adapters become one delta before it is mapped. The result loads with plain peft:
`PeftModel.from_pretrained(llm, "llm-adapter")`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ._common import CommandParser, CommandResult


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `grad-transformer generate`."""

    mapper: str = field(metadata={"help": "Folder or Hub repository of the mapper."})
    adapters: list[str] = field(metadata={"help": "Client adapters: folders or Hub repositories."})
    output_dir: str = field(metadata={"help": "Folder for the LLM's adapter."})
    aggregation: str = field(
        default="mean",
        metadata={"help": "How several deltas become one.", "choices": ["mean", "sum", "weighted"]},
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each adapter, with --aggregation weighted."}
    )
    mapper_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mapper."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the mapper."})
    device: str | None = field(default=None, metadata={"help": "Device of the mapper; default: the CPU."})


def make_parser() -> CommandParser:
    return CommandParser(GenerateArguments, command="generate", description=__doc__)


def main(args: GenerateArguments) -> CommandResult:
    from ..modeling_grad_transformer import GradTransformer

    mapper = GradTransformer.from_pretrained(args.mapper, revision=args.mapper_revision, dtype=args.dtype)
    if args.device is not None:
        mapper.to(args.device)
    started = time.perf_counter()
    adapter = mapper.generate_adapter(args.adapters, aggregation=args.aggregation, weights=args.weights)
    seconds = time.perf_counter() - started
    adapter.save_pretrained(args.output_dir)
    norm = float((adapter.flat() - mapper.tokenizers()[1].root.adapter.flat()).norm())
    data = {
        "output_dir": args.output_dir,
        "base_model": adapter.base_model,
        "num_clients": len(args.adapters),
        "aggregation": args.aggregation,
        "delta_norm": norm,
        "seconds": seconds,
    }
    text = (
        f"{len(args.adapters)} client adapter(s) -> adapter for {adapter.base_model}, delta norm {norm:.4g}, "
        f"{seconds:.2f} s\nPeftModel.from_pretrained(llm, {args.output_dir!r})"
    )
    return CommandResult(data, text)

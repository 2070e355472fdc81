"""Map client adapters of the TinyLM to one PEFT adapter for the LLM.

    grad-transformer generate --mapper acme/qwen2.5-3b-to-7b --adapters bank-a bank-b --output_dir llm-adapter
    grad-transformer generate --mapper mapper --adapters a b --aggregation weighted --weights 300 700 --output_dir out
    grad-transformer generate --mapper mapper --adapters a b c d e --aggregation multi_krum --num_dishonest 1 \
        --disjoint_clients --output_dir out

Several adapters become one delta before it is mapped, or after (`--order map_first`). mean, weighted and sum trust
every client; median, trimmed_mean, krum, multi_krum and fltrust bear some that do not deserve it. Adapters are read as
a stranger's: nothing in them is executed, and what did not start from the mapper's root is refused. The result loads
with plain peft: `PeftModel.from_pretrained(llm, "llm-adapter")`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..adapters.aggregation import AGGREGATIONS
from ._common import CommandParser, CommandResult


FACTS = ("aggregation", "order", "remaining_error")


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `grad-transformer generate`."""

    mapper: str = field(metadata={"help": "Folder or Hub repository of the mapper."})
    adapters: list[str] = field(metadata={"help": "Client adapters: folders or Hub repositories."})
    output_dir: str = field(metadata={"help": "Folder for the LLM's adapter."})
    aggregation: str = field(
        default="mean",
        metadata={"help": "How several deltas become one.", "choices": list(AGGREGATIONS)},
    )
    order: str = field(
        default="aggregate_first",
        metadata={
            "help": "Aggregate the clients' deltas and map the result, or map each and aggregate the LLM's deltas.",
            "choices": ["aggregate_first", "map_first"],
        },
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each adapter, with --aggregation weighted."}
    )
    num_dishonest: int | None = field(
        default=None,
        metadata={"help": "Clients that may send anything, for trimmed_mean, krum, multi_krum; default: the most."},
    )
    max_norm: float | None = field(
        default=None, metadata={"help": "Norm to shorten deltas to, for norm_clipping; default: the median norm."}
    )
    reference: str | None = field(
        default=None,
        metadata={"help": "For fltrust: an adapter of the TinyLM that you fine-tuned from the root on public rows."},
    )
    disjoint_clients: bool = field(
        default=False,
        metadata={"help": "The clients declare that nobody's data is with two of them: privacy composes in parallel."},
    )
    mapper_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mapper."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the mapper."})
    device: str | None = field(default=None, metadata={"help": "Device of the mapper; default: the CPU."})


def make_parser() -> CommandParser:
    return CommandParser(GenerateArguments, command="generate", description=__doc__)


def main(args: GenerateArguments) -> CommandResult:
    from ..adapters.privacy import STATEMENT_KEY
    from ..modeling_grad_transformer import GradTransformer

    mapper = GradTransformer.from_pretrained(args.mapper, revision=args.mapper_revision, dtype=args.dtype)
    if args.device is not None:
        mapper.to(args.device)
    started = time.perf_counter()
    adapter = mapper.generate_adapter(
        args.adapters,
        aggregation=args.aggregation,
        order=args.order,
        weights=args.weights,
        num_dishonest=args.num_dishonest,
        max_norm=args.max_norm,
        reference=args.reference,
        disjoint_clients=args.disjoint_clients,
    )
    seconds = time.perf_counter() - started
    adapter.save_pretrained(args.output_dir)
    norm = float((adapter.flat() - mapper.tokenizers()[1].root.adapter.flat()).norm())
    data = {
        "output_dir": args.output_dir,
        "base_model": adapter.base_model,
        "num_clients": len(args.adapters),
        **{name: value for name, value in adapter.metadata["generated"].items() if name in FACTS},
        "privacy": adapter.metadata.get(STATEMENT_KEY),
        "delta_norm": norm,
        "seconds": seconds,
    }
    text = (
        f"{len(args.adapters)} client adapter(s) -> adapter for {adapter.base_model}, delta norm {norm:.4g}, "
        f"{seconds:.2f} s\nPeftModel.from_pretrained(llm, {args.output_dir!r})"
    )
    if data["privacy"] is not None:
        text += f"\nPrivacy: {data['privacy']['statement']}"
    return CommandResult(data, text)

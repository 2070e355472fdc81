"""Map client adapters of the TinyLM to one PEFT adapter for the LLM.

    grad-transformer generate --mapper acme/qwen2.5-3b-to-7b --adapters bank-a bank-b --output_dir llm-adapter
    grad-transformer generate --mapper mapper --adapters a b --aggregation weighted --weights 300 700 --output_dir out
    grad-transformer generate --mapper mapper --adapters a b c d e --aggregation multi_krum --num_dishonest 1 \\
        --disjoint_clients --output_dir out

    grad-transformer generate --mapper mapper --adapters bank-a --dataset deltas --method best \\
        --refine_data public.jsonl --output_dir out

With `--refine_data` the clients' TinyLMs complete public prompts, and the LLM's adapter is refined: with `--dataset`,
the mapper's training pairs, towards what those of its shadows say that know the skill in other words, else towards
the posterior of TinyLM and LLM. No private row is seen, and what a private fine-tune guarantees still holds
(post-processing). With `--dataset`, nearest shadow and regressions can also take the mapper's place (`--method`);
`best` lets agreement on the public prompts decide, client by client.

Each client is checked, and what was found is printed and kept in the adapter: how far it lies from the shadows that
the mapper has learned from, and how long A and B of each block are beside theirs (`--max_shift` refuses what is far
beyond; `--max_shift inf` nothing); whether its recipe is the mapper's (`--allow_other_recipe`); and whether another
client sent the same adapter, which then counts once (`--allow_duplicates`).

Several adapters become one delta before it is mapped, or after (`--order map_first`). mean, weighted and sum trust
every client; median, trimmed_mean, krum, multi_krum and fltrust bear some that do not deserve it. Adapters are read as
a stranger's: nothing in them is executed, and what did not start from the mapper's root is refused. The result loads
with plain peft: `PeftModel.from_pretrained(llm, "llm-adapter")`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..constants import AGGREGATIONS, MAXIMUM_SHIFT, MAXIMUM_SIZE
from ..outputs import prepare_output
from ..refinement.arguments import CANDIDATES
from ._common import CommandParser, CommandResult, check_device
from ._refinement import RefinementFlags, describe_refinement
from ._rows import RowFlags


if TYPE_CHECKING:
    from ..adapters.checks import ClientCheck

FACTS = ("num_counted", "aggregation", "order", "remaining_error")


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
    method: str = field(
        default="mapper",
        metadata={
            "help": "How a TinyLM delta becomes an LLM delta; all but mapper need --dataset, and best --refine_data.",
            "choices": [*CANDIDATES, "best"],
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "The delta dataset that the mapper was trained on: folder or Hub repository."},
    )
    source_model: str | None = field(
        default=None, metadata={"help": "For refinement: another place of the TinyLM; checked."}
    )
    target_model: str | None = field(
        default=None, metadata={"help": "For refinement: another place of the LLM; checked."}
    )
    max_shift: float | None = field(
        default=None,
        metadata={
            "help": "Refuse clients that lie farther from the shadows; one in twenty held-out shadow runs exceeds 1. "
            f"Default: {MAXIMUM_SHIFT:g}, where the mapper has a record of its shadows. A and B of each block must "
            f"not be longer than {MAXIMUM_SIZE:g}, in the same sense. inf: refuse none."
        },
    )
    disjoint_clients: bool = field(
        default=False,
        metadata={"help": "The clients declare that nobody's data is with two of them: privacy composes in parallel."},
    )
    allow_duplicates: bool = field(
        default=False, metadata={"help": "Count an adapter that several clients sent as often as it was sent."}
    )
    allow_other_recipe: bool = field(
        default=False,
        metadata={"help": "Map clients that were fine-tuned by another recipe than the mapper's shadows."},
    )
    mapper_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mapper."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the mapper."})
    device: str | None = field(default=None, metadata={"help": "Device of the mapper; default: the CPU."})


def make_parser() -> CommandParser:
    return CommandParser(GenerateArguments, RefinementFlags, RowFlags, command="generate", description=__doc__)


def main(args: GenerateArguments, refinement: RefinementFlags, columns: RowFlags) -> CommandResult:
    from ..adapters.privacy import STATEMENT_KEY
    from ..modeling_grad_transformer import GradTransformer
    from ._prediction import Prediction

    check_device(args.device, args.dtype)
    given = [args.mapper, *args.adapters, args.dataset, args.reference, args.source_model, args.target_model]
    prepare_output(args.output_dir, "generated_adapter", inputs=given)
    # Resolved once: weights, tokenizers and the record of the shadows are those of one commit.
    mapper = GradTransformer.from_pretrained(args.mapper, revision=args.mapper_revision, dtype=args.dtype)
    if args.device is not None:
        mapper.to(args.device)
    prediction = Prediction(
        mapper,
        args.method,
        args.dataset,
        refinement,
        columns,
        source_model=args.source_model,
        target_model=args.target_model,
        device=args.device,
    )
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
        allow_duplicates=args.allow_duplicates,
        allow_other_recipe=args.allow_other_recipe,
        max_shift=args.max_shift,
        predict=prediction,
    )
    seconds = time.perf_counter() - started
    generated = adapter.metadata["generated"]
    generated["method"] = args.method
    # With `map_first` and a reference, the last is the reference's.
    refined = prediction.facts[: generated["num_counted"]]
    if refined:
        generated["refinement"] = refined
    adapter.save_pretrained(args.output_dir)
    checks = checks_of(generated)
    named = list(zip(args.adapters, checks, strict=True))
    norm = float((adapter.flat() - mapper.tokenizers()[1].root.adapter.flat()).norm())
    data = {
        "output_dir": args.output_dir,
        "base_model": adapter.base_model,
        "num_clients": len(args.adapters),
        **{name: generated[name] for name in FACTS if name in generated},
        "verdict": verdict(args.adapters, checks),
        "checks": [{"client": name, "words": check.describe(), **check.to_dict()} for name, check in named],
        "shift": generated["shift"],
        "method": args.method,
        "refinement": refined or None,
        "privacy": adapter.metadata.get(STATEMENT_KEY),
        "delta_norm": norm,
        "seconds": seconds,
    }
    lines = [data["verdict"], *(f"  {n}. {name}: {check.describe()}" for n, (name, check) in enumerate(named, 1))]
    lines += [describe_refinement(facts) for facts in refined]
    if data["privacy"] is not None:
        lines.append(f"Privacy: {data['privacy']['statement']}")
    lines += [
        f"{generated['num_counted']} client adapter(s) -> adapter for {adapter.base_model}, delta norm {norm:.4g}, "
        f"{seconds:.2f} s",
        f"Use it: PeftModel.from_pretrained(llm, {args.output_dir!r})",
    ]
    return CommandResult(data, "\n".join(lines))


def checks_of(generated: Mapping[str, Any]) -> list[ClientCheck]:
    """The checks of the clients, in their order, from an adapter's metadata."""
    from ..adapters import ShiftReport
    from ..adapters.checks import ClientCheck

    shifts = generated["shift"] or [None] * len(generated["checks"])
    return [
        ClientCheck(**check, shift=None if shift is None else ShiftReport(**shift))
        for check, shift in zip(generated["checks"], shifts, strict=True)
    ]


def verdict(names: Sequence[str], checks: Sequence[ClientCheck]) -> str:
    """What the checks say of the adapter, and what to do."""
    shifts = [check.shift for check in checks]
    far = [name for name, shift in zip(names, shifts, strict=True) if shift is not None and shift.shift > 1]
    copies = sum(check.duplicate_of is not None for check in checks)
    if None in shifts:
        first = "Whether the mapper can read these clients is not known: it was saved without a record of its shadows."
    elif not far:
        first = "The mapper was trained on adapters like these: each is as near its shadows as held-out runs are."
    elif len(far) == len(checks):
        first = "The adapter is a guess: no client resembles what the mapper was trained on."
    else:
        first = f"The adapter is in part a guess: {', '.join(far)} lies far from what the mapper was trained on."
    said = "" if not copies else f" {copies} of {len(checks)} adapters were sent before."
    return f"{first}{said} Score it on rows of the clients' tasks before anybody relies on it."

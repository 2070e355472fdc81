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

Each client's shift, its distance from the shadows that the mapper has learned from, is printed and kept in the
adapter; `--max_shift 2` refuses clients beyond.

Several adapters become one delta before it is mapped, or after (`--order map_first`). mean, weighted and sum trust
every client; median, trimmed_mean, krum, multi_krum and fltrust bear some that do not deserve it. Adapters are read as
a stranger's: nothing in them is executed, and what did not start from the mapper's root is refused. The result loads
with plain peft: `PeftModel.from_pretrained(llm, "llm-adapter")`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..constants import AGGREGATIONS, SHIFT_NAME
from ..errors import UsageError
from ..refinement.arguments import CANDIDATES
from ._common import CommandParser, CommandResult, check_device
from ._refinement import RefinementFlags, describe_refinement


if TYPE_CHECKING:
    import torch

    from ..evaluation.shift import ShiftReport

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
            "help": "Refuse clients that lie farther from the shadows; one in twenty held-out shadow runs exceeds 1."
        },
    )
    disjoint_clients: bool = field(
        default=False,
        metadata={"help": "The clients declare that nobody's data is with two of them: privacy composes in parallel."},
    )
    mapper_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the mapper."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the mapper."})
    device: str | None = field(default=None, metadata={"help": "Device of the mapper; default: the CPU."})


def make_parser() -> CommandParser:
    return CommandParser(GenerateArguments, RefinementFlags, command="generate", description=__doc__)


def main(args: GenerateArguments, refinement: RefinementFlags) -> CommandResult:
    import torch

    from ..adapters.privacy import STATEMENT_KEY
    from ..modeling_grad_transformer import GradTransformer
    from ._prediction import Prediction

    check_device(args.device, args.dtype)
    mapper = GradTransformer.from_pretrained(args.mapper, revision=args.mapper_revision, dtype=args.dtype)
    if args.device is not None:
        mapper.to(args.device)
    checked = [mapper.tokenizers()[0].read_client(path) for path in args.adapters]
    shifts = measure_shifts(args, torch.stack([delta_P for _, delta_P in checked]))
    prediction = Prediction(
        mapper,
        args.method,
        args.dataset,
        refinement,
        source_model=args.source_model,
        target_model=args.target_model,
        device=args.device,
    )
    started = time.perf_counter()
    adapter = mapper.generate_adapter(
        [client for client, _ in checked],
        aggregation=args.aggregation,
        order=args.order,
        weights=args.weights,
        num_dishonest=args.num_dishonest,
        max_norm=args.max_norm,
        reference=args.reference,
        disjoint_clients=args.disjoint_clients,
        predict=prediction,
    )
    seconds = time.perf_counter() - started
    adapter.metadata["generated"]["method"] = args.method
    if prediction.facts:
        adapter.metadata["generated"]["refinement"] = prediction.facts
    adapter.metadata["generated"]["shift"] = None if shifts is None else [shift.to_dict() for shift in shifts]
    adapter.save_pretrained(args.output_dir)
    norm = float((adapter.flat() - mapper.tokenizers()[1].root.adapter.flat()).norm())
    data = {
        "output_dir": args.output_dir,
        "base_model": adapter.base_model,
        "num_clients": len(args.adapters),
        **{name: value for name, value in adapter.metadata["generated"].items() if name in FACTS},
        "shift": adapter.metadata["generated"]["shift"],
        "method": args.method,
        "refinement": prediction.facts or None,
        "privacy": adapter.metadata.get(STATEMENT_KEY),
        "delta_norm": norm,
        "seconds": seconds,
    }
    text = (
        f"{len(args.adapters)} client adapter(s) -> adapter for {adapter.base_model}, delta norm {norm:.4g}, "
        f"{seconds:.2f} s\nPeftModel.from_pretrained(llm, {args.output_dir!r})"
    )
    for path, shift in zip(args.adapters, shifts or (), strict=False):
        text += f"\n{path}: {shift.describe()}"
    for facts in prediction.facts:
        text += f"\n{describe_refinement(facts)}"
    if shifts is None:
        text += "\nShift: not measured, the mapper says nothing of its shadows."
    if data["privacy"] is not None:
        text += f"\nPrivacy: {data['privacy']['statement']}"
    return CommandResult(data, text)


def measure_shifts(args: GenerateArguments, deltas_CP: torch.Tensor) -> list[ShiftReport] | None:
    """How far each client lies from the mapper's shadows; `None` where the mapper says nothing of them.

    Raises:
        [`UsageError`]: farther than `--max_shift`, or `--max_shift` with a mapper that says nothing.
    """
    from ..evaluation.shift import load_shift_reference

    reference = load_shift_reference(args.mapper, revision=args.mapper_revision)
    if reference is None:
        if args.max_shift is not None:
            raise UsageError(
                "The shift of the clients cannot be measured.",
                path=args.mapper,
                expected=f"{SHIFT_NAME} beside the mapper",
                remedy="train the mapper again, or leave --max_shift out",
            )
        return None
    shifts = reference.measure(deltas_CP)
    for path, shift in zip(args.adapters, shifts, strict=True):
        if args.max_shift is not None and not shift.shift <= args.max_shift:
            raise UsageError(
                "A client lies too far from what the mapper has learned.",
                path=path,
                expected=f"a shift of at most {args.max_shift:g}",
                found=shift.describe(),
                remedy="raise --max_shift, leave the client out, or train the mapper on shadows like it",
            )
    return shifts

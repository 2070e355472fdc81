"""Score generated adapters beside every control and both references; write the report with its pictures.

    grad-transformer evaluate --mapper mapper --dataset deltas --clients clients.yaml --output_dir report

`clients.yaml` is a list; `id`, `adapter` and `test_data` are required, the rest makes the report say more:

    - id: bank-a
      adapter: bank-a/tinylm-adapter        # folder or Hub repository
      test_data: bank-a/test.jsonl          # rows with prompt and completion
      llm_adapter: bank-a/ceiling           # the ceiling: the LLM on the same rows (client --role target)
      kind: seen                            # seen, mixture or unseen by the shadows; default other
      task: summaries                       # another client's delta is taken from a client of another task

The delta dataset is the one that the mapper was trained on: mean shadow, nearest shadow and ridge are fitted on it.
With `--refine_data public.jsonl` three more ways stand in the report: the best of several candidates, that one refined
on public prompts, and weak-to-strong training on these prompts without a mapper.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeltaDatasetError, UsageError
from ..outputs import prepare_output
from ._common import CommandParser, CommandResult, check_device
from ._refinement import RefinementFlags
from ._rows import RowFlags


if TYPE_CHECKING:
    from ..adapters import LoraAdapter
    from ..evaluation.clients import AdapterScorer, ClientCase
    from ..evaluation.records import Report
    from ..evaluation.scoring import Rows
    from ..modeling_grad_transformer import GradTransformer
    from ..refinement import RefinementArguments
    from ..shadow import DeltaDataset


@dataclass(frozen=True)
class EvaluateArguments:
    """Arguments of `grad-transformer evaluate`."""

    mapper: str = field(metadata={"help": "Folder or Hub repository of the mapper."})
    dataset: str = field(metadata={"help": "The delta dataset that the mapper was trained on."})
    clients: str = field(metadata={"help": "YAML or JSON file: the list of clients."})
    output_dir: str = field(metadata={"help": "Folder for report.json, report.md and pictures."})
    source_model: str | None = field(default=None, metadata={"help": "Another place of the TinyLM; checked."})
    target_model: str | None = field(default=None, metadata={"help": "Another place of the LLM; checked."})
    batch_size: int = field(default=64, metadata={"help": "Prompts generated for at once."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the base models."})
    device: str | None = field(default=None, metadata={"help": "Device; default: the first GPU, or the CPU."})
    seed: int = field(default=0, metadata={"help": "Seed of random deltas and bootstrap."})


def make_parser() -> CommandParser:
    return CommandParser(EvaluateArguments, RefinementFlags, RowFlags, command="evaluate", description=__doc__)


def main(args: EvaluateArguments, refinement: RefinementFlags, columns: RowFlags) -> CommandResult:
    from ..evaluation.report import summary_table
    from ..finetuning import load_rows
    from ..modeling_grad_transformer import GradTransformer
    from ..shadow import check_dataset_of, load_delta_dataset

    check_device(args.device, args.dtype)
    entries = read_clients(args.clients)
    adapters = [entry.get(name) for entry in entries for name in ("adapter", "llm_adapter")]
    prepare_output(args.output_dir, "report", inputs=[args.mapper, args.dataset, *adapters])
    mapper = GradTransformer.from_pretrained(args.mapper)
    deltas = load_delta_dataset(args.dataset)
    check_dataset_of(mapper, deltas)
    heldout_split(deltas)
    cases = [_case(entry, mapper, columns) for entry in entries]
    methods = {}
    if refinement.refine_data is not None:
        methods = refined_methods(
            mapper,
            deltas,
            [case.adapter for case in cases],
            load_rows(refinement.refine_data, **columns.arguments()),
            refinement.arguments(seed=args.seed),
            source_model=args.source_model,
            target_model=args.target_model,
            dtype=args.dtype,
            device=args.device,
        )
    scorers = [
        make_scorer(mapper, role, name, args.batch_size, dtype=args.dtype, device=args.device)
        for role, name in (("source", args.source_model), ("target", args.target_model))
    ]
    report, _ = make_report(
        mapper,
        deltas,
        cases,
        *scorers,
        output_dir=args.output_dir,
        preset="own",
        seed=args.seed,
        wall_seconds={},
        methods=methods,
    )
    text = f"{summary_table(report)}\n\nReport: {Path(args.output_dir) / 'report.md'}"
    return CommandResult(report.to_dict(), text)


def read_clients(path: str | Path) -> list[dict[str, Any]]:
    """The list of clients in a YAML or JSON file.

    Raises:
        [`UsageError`]: it cannot be read, is no list, an entry has missing or unknown keys or values of another type,
            or two have the same id.
    """
    # pydantic is not loaded for --help.
    from ..files import read_yaml
    from ..schemas import ClientList

    entries = read_yaml(path, ClientList)
    ids = [entry["id"] for entry in entries]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise UsageError("Two clients have the same id.", path=path, expected="ids of their own", found=twice[0])
    return [dict(entry) for entry in entries]


def make_scorer(
    mapper: GradTransformer,
    role: str,
    base_model: str | None,
    batch_size: int,
    *,
    dtype: str = "auto",
    device: str | None = None,
) -> AdapterScorer:
    """One of the mapper's two base models, with its root attached, ready to score adapters."""
    from ..evaluation.clients import AdapterScorer
    from ..finetuning import attach_root, load_base

    root = mapper.tokenizers()[role == "target"].root
    model, tokenizer = load_base(
        base_model or root.base_model, revision=None if base_model else root.base_revision, dtype=dtype, device=device
    )
    return AdapterScorer(attach_root(model, root), tokenizer, batch_size)


def make_report(
    mapper: GradTransformer,
    deltas: DeltaDataset,
    cases: Sequence[ClientCase],
    tinylm: AdapterScorer,
    llm: AdapterScorer,
    *,
    output_dir: str | Path,
    preset: str,
    seed: int,
    wall_seconds: Mapping[str, float],
    training_log: Sequence[Mapping[str, Any]] | None = None,
    methods: Mapping[str, Sequence[LoraAdapter]] | None = None,
) -> tuple[Report, list[LoraAdapter]]:
    """Held-out figures, controls and clients into `report.json`, `report.md` and pictures.

    `wall_seconds` holds the stages before; this one is added as `evaluate`. `methods` holds adapters that were made in
    other ways, see [`evaluate_clients`]. Returns the generated adapters too.
    """
    from ..adapters.statistics import block_cosine_and_norm, delta_reproducibility
    from ..evaluation.clients import evaluate_clients, score_heldout
    from ..evaluation.controls import fit_controls
    from ..evaluation.report import build_report, write_report
    from ..training import evaluate_heldout

    started = time.perf_counter()
    train, test = deltas.pairs("train"), deltas.pairs(heldout_split(deltas))
    predictors = fit_controls(
        train.source, train.target, validation=deltas.tuning_pairs(), source_widths=deltas.source_layout.widths
    )
    heldout = evaluate_heldout(
        mapper,
        test.source,
        test.target,
        test.shadow_ids,
        tasks=test.tasks,
        train_target_NP=train.target,
        train_tasks=train.tasks,
    )
    target_tokenizer = mapper.tokenizers()[1]
    mean_Y = target_tokenizer.mean_P
    assert mean_Y is not None
    reports, adapters = evaluate_clients(mapper, cases, predictors, tinylm=tinylm, llm=llm, methods=methods, seed=seed)
    blocks = block_cosine_and_norm(
        mapper.generate_deltas(test.source), test.target, target_tokenizer.layout.widths, mean_D=mean_Y
    )
    reproducibility = {
        name: delta_reproducibility(values, train.tasks, run_ids=train.shadow_ids)
        for name, values in (("tinylm", train.source), ("llm", train.target))
    }
    report = build_report(
        preset=preset,
        seed=seed,
        wall_seconds={**wall_seconds, "evaluate": time.perf_counter() - started},
        heldout=score_heldout(heldout, predictors, test.source, test.target, mean_Y),
        reproducibility=reproducibility,
        clients=reports,
        blocks=blocks,
    )
    write_report(report, output_dir, training_log=training_log)
    return report, adapters


def heldout_split(deltas: DeltaDataset) -> str:
    """The runs that tell whether the mapper reads its input: test runs, or else, which is said, validation runs.

    Raises:
        [`DeltaDatasetError`]: no run was held out.
    """
    if "test" in deltas.splits:
        return "test"
    if "validation" not in deltas.splits:
        raise DeltaDatasetError(
            "No shadow run was held out, so whether the mapper reads its input cannot be measured.",
            path=deltas.folder,
            expected="a test or validation split",
            found=", ".join(deltas.splits),
            remedy="plan runs with --test_fraction, and train a mapper on them; `generate` works without",
        )
    from transformers.utils import logging

    logging.get_logger(__name__).warning(
        "There are no test runs: held-out figures are of the validation runs, which chose the checkpoint."
    )
    return "validation"


def refined_methods(
    mapper: GradTransformer,
    deltas: DeltaDataset,
    clients: Sequence[LoraAdapter],
    prompts: Rows,
    arguments: RefinementArguments,
    **models: str | None,
) -> dict[str, list[LoraAdapter]]:
    """The clients' adapters by [`METHODS`]: best candidate, refined, and the baseline without a mapper."""
    from ..refinement import fit_candidates, refine_clients, refinement_metadata, shadow_annotators

    refined, baseline = refine_clients(
        mapper,
        fit_candidates(deltas),
        clients,
        prompts,
        arguments,
        annotators=shadow_annotators(deltas, arguments),
        baseline=True,
        **models,  # type: ignore[arg-type]
    )
    decode = mapper.tokenizers()[1].decode_delta
    adapters = [decode(refinement.delta_P) for refinement in refined]
    for adapter, refinement in zip(adapters, refined, strict=True):
        adapter.metadata["generated"] = {"refinement": [refinement_metadata(refinement, arguments)]}
    return {
        "candidate": [decode(refinement.candidate_delta_P) for refinement in refined],
        "refined": adapters,
        "public_weak_to_strong": [decode(refinement.delta_P) for refinement in baseline],
    }


def _case(entry: Mapping[str, Any], mapper: GradTransformer, columns: RowFlags) -> ClientCase:
    from ..adapters import LoraAdapter
    from ..evaluation.clients import ClientCase
    from ..finetuning import load_rows

    source, target = mapper.tokenizers()
    task = str(entry.get("task") or "")
    ceiling = entry.get("llm_adapter")
    return ClientCase(
        id=str(entry["id"]),
        adapter=LoraAdapter.from_pretrained(entry["adapter"], layout=source.layout),
        test_rows=list(load_rows(entry["test_data"], split="test", **columns.arguments())),
        llm_adapter=None if ceiling is None else LoraAdapter.from_pretrained(ceiling, layout=target.layout),
        kind=str(entry.get("kind") or "other"),
        task=task,
        tasks=frozenset({task} if task else ()),
    )

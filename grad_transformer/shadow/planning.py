"""Making a plan: subsets of the public rows, drawn from a seed, and refused where they could not be run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapters import Root
from ..errors import PlanError
from ..finetuning import FineTuningRecipe, TokenCounts, count_tokens
from ..finetuning.models import check_token
from .plan import SPLITS, PlanSide, ShadowPlan, ShadowRun, Strategy, fingerprint_rows


logger = logging.get_logger(__name__)

MAX_RUNS, MAX_ROWS = 100_000, 5_000_000


def plan_shadows(
    rows: datasets.Dataset,
    *,
    num_runs: int,
    rows_per_run: int,
    source_root: Root,
    target_root: Root,
    source_recipe: FineTuningRecipe,
    target_recipe: FineTuningRecipe,
    data: Mapping[str, Any],
    seed: int = 0,
    strategy: Strategy | None = None,
    with_overlap: bool = True,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    tasks: Sequence[str] | None = None,
) -> ShadowPlan:
    """Split public rows into shadow subsets.

    Args:
        rows (`datasets.Dataset`): public rows, with a `task` column for `strategy="per_task"`.
        num_runs (`int`): number of subsets N (paper: 300).
        rows_per_run (`int`): rows of each subset (paper: 1,024).
        source_root, target_root ([`Root`]), source_recipe, target_recipe ([`FineTuningRecipe`]): TinyLM's and LLM's.
        data (`Mapping`): where the rows come from: a [`RowSource`] as a dict, `pinned` so that it is found again.
        seed (`int`, *optional*, defaults to 0).
        strategy (`str`, *optional*): `"mixed"` draws each subset from all rows, `"per_task"` from the rows of one
            task, tasks in turn. Default: `"per_task"` where every row has a task.
        with_overlap (`bool`, *optional*, defaults to `True`): whether subsets may share rows.
        validation_fraction, test_fraction (`float`, *optional*, default to 0.05): share of the *runs* held out (paper:
            a 95:5 split, by pairs).
        tasks (`Sequence[str]`, *optional*): for `"per_task"`, only these.

    Raises:
        [`PlanError`]: sizes out of range, no training run, too few rows, no tasks, or snapshots that cannot be paired.
    """
    counts = check_plan_sizes(
        num_runs=num_runs,
        rows_per_run=rows_per_run,
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    steps = [len(recipe.snapshot_steps()) for recipe in (source_recipe, target_recipe)]
    if steps[0] != steps[1]:
        raise PlanError(
            "TinyLM and LLM record different numbers of snapshots, so they cannot be paired.",
            expected="equal snapshot_last, or as many steps of snapshot_every",
            found=f"{steps[0]} and {steps[1]}",
        )
    if strategy is None:
        has_tasks = "task" in rows.column_names and None not in set(rows["task"])
        strategy = "per_task" if has_tasks else "mixed"
    pools = _pools(rows, strategy, tasks)
    generator = np.random.default_rng(seed)
    # Tasks in turn, in a new random order each round: any stretch of runs holds tasks evenly, held-out ones too.
    labels: list[str | None] = []
    while len(labels) < num_runs:
        labels.extend(generator.permutation(np.array(list(pools), dtype=object)).tolist())
    labels = labels[:num_runs]
    if num_runs < len(pools):
        logger.warning(f"{num_runs} runs are too few for {len(pools)} tasks: {len(pools) - num_runs} have none.")
    subsets = _draw(pools, labels, rows_per_run, with_overlap, generator)
    splits = [split for split in SPLITS for _ in range(counts[split])]
    runs = tuple(
        ShadowRun(f"shadow-{index:05d}", label, split, int(generator.integers(2**31)), tuple(subset))
        for index, (label, split, subset) in enumerate(zip(labels, splits, subsets, strict=True))
    )
    facts = {**data, "num_rows": len(rows), "fingerprint": fingerprint_rows(rows)}
    return ShadowPlan(
        source=PlanSide(source_root.facts(), source_recipe, source_root.layout.numel),
        target=PlanSide(target_root.facts(), target_recipe, target_root.layout.numel),
        data=facts,
        seed=seed,
        strategy=strategy,
        with_overlap=with_overlap,
        runs=runs,
    )


def check_plan_sizes(
    *,
    num_runs: int,
    rows_per_run: int,
    seed: int = 0,
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
) -> dict[str, int]:
    """Refuse sizes that no plan can have, before anything is loaded.

    Returns:
        `dict[str, int]`: how many runs each split gets.

    Raises:
        [`PlanError`]
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    ranges = [
        ("num_runs", num_runs, 1 <= num_runs <= MAX_RUNS, f"1 to {MAX_RUNS:,}"),
        ("rows_per_run", rows_per_run, rows_per_run >= 1, "1 or more"),
        # All of them stand in plan.json.
        ("num_runs x rows_per_run", num_runs * rows_per_run, num_runs * rows_per_run <= MAX_ROWS, f"{MAX_ROWS:,}"),
        ("seed", seed, 0 <= seed < 2**63, "0 or more"),
        *((f"{name}_fraction", value, 0 <= value < 1, "0 or more, below 1") for name, value in fractions.items()),
    ]
    for name, value, holds, expected in ranges:
        if not holds:
            raise PlanError(f"`{name}` of the plan is out of range.", expected=expected, found=value)
    # A split that is asked for gets a run where there are three or more.
    heldout = {name: round(num_runs * value) or int(value > 0 and num_runs > 2) for name, value in fractions.items()}
    counts = {"train": num_runs - sum(heldout.values()), **heldout}
    if counts["train"] < 1:
        raise PlanError(
            "No run is left to train on.",
            expected="more runs than are held out",
            found=f"{num_runs} runs, of which {counts['validation']} for validation and {counts['test']} for the test",
            remedy="plan more runs, or lower validation_fraction and test_fraction",
        )
    return counts


def check_plan_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> TokenCounts:
    """Render and tokenise every row for one of the models, so that nothing is refused in the middle of the runs.

    Args:
        rows (`datasets.Dataset`): the public rows.
        tokenizer (`PreTrainedTokenizerBase`), model (`PreTrainedModel`): of the base model, which needs no weights.
        max_length (`int`): tokens of a row.

    Raises:
        [`DataError`]: a row that the model cannot be fine-tuned on.
    """
    counts = count_tokens(rows, tokenizer, max_length)
    check_token(counts.largest_id, model, row=counts.row_of_largest_id)
    return counts


def _pools(rows: datasets.Dataset, strategy: Strategy, tasks: Sequence[str] | None) -> dict[str | None, np.ndarray]:
    if strategy == "mixed":
        return {None: np.arange(len(rows))}
    if strategy != "per_task" or "task" not in rows.column_names:
        raise PlanError(
            "The subsets cannot be drawn task by task.",
            expected="strategy mixed, or per_task and rows with a column `task`",
            found=f"strategy {strategy!r}, columns {', '.join(rows.column_names)}",
        )
    column = np.array(rows["task"], dtype=object)
    names = sorted(set(column.tolist()), key=str)
    unknown = set(tasks or ()) - set(names)
    if unknown or None in names:
        raise PlanError(
            "Some tasks are not in the data." if unknown else "Some rows have no task.",
            expected=", ".join(str(name) for name in names),
            found=", ".join(sorted(unknown)) or None,
        )
    return {name: np.flatnonzero(column == name) for name in names if tasks is None or name in tasks}


def _draw(
    pools: Mapping[str | None, np.ndarray],
    labels: Sequence[str | None],
    rows_per_run: int,
    with_overlap: bool,
    generator: np.random.Generator,
) -> list[list[int]]:
    for label, pool in pools.items():
        needed = rows_per_run * (1 if with_overlap else labels.count(label))
        if len(pool) < needed:
            raise PlanError(
                "There are not enough rows" + (f" of task {label}." if label is not None else "."),
                expected=f"{needed} rows" + ("" if with_overlap else " for subsets that share none"),
                found=len(pool),
                remedy="plan fewer or smaller subsets"
                + ("" if with_overlap else ", or allow overlap")
                + (", or strategy mixed, of all tasks" if label is not None else ""),
            )
    if with_overlap:
        return [generator.choice(pools[label], rows_per_run, replace=False).tolist() for label in labels]
    shuffled = {label: generator.permutation(pool) for label, pool in pools.items()}
    used = dict.fromkeys(pools, 0)
    subsets = []
    for label in labels:
        subsets.append(shuffled[label][used[label] : used[label] + rows_per_run].tolist())
        used[label] += rows_per_run
    return subsets

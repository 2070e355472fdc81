"""The shadow plan: which subsets of the public data are fine-tuned, from which roots, by which recipes.

Planning is pure and frozen: `plan.json`, with both roots beside it, is all that the runs need; they only execute it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from transformers.utils import logging

from ..adapters import Root
from ..adapters.io import read_record, write_json_atomic
from ..constants import FORMAT_VERSION, PLAN_NAME, SOURCE_FOLDER, TARGET_FOLDER
from ..errors import PlanError
from ..finetuning import FineTuningRecipe
from ..schemas import PlanRecord
from ..wording import describe_bytes, one_line


logger = logging.get_logger(__name__)

Strategy = Literal["per_task", "mixed"]
SPLITS = ("train", "validation", "test")
ROLES = (SOURCE_FOLDER, TARGET_FOLDER)
# A plan names every row of every subset.
MAX_PLAN_BYTES, MAX_PLAN_VALUES = 2**28, 2**24


@dataclass(frozen=True)
class ShadowRun:
    """One shadow subset, to be fine-tuned by both models.

    Args:
        shadow_id (`str`): for instance `shadow-00042`.
        task (`str`, *optional*): the task of its rows; None where they are mixed or have none.
        split (`str`): `train`, `validation` or `test`, of the delta dataset.
        seed (`int`): of the data order, the same for both models.
        row_indices (`tuple[int, ...]`): rows of the public data.
    """

    shadow_id: str
    task: str | None
    split: str
    seed: int
    row_indices: tuple[int, ...]


@dataclass(frozen=True)
class PlanSide:
    """What one of the two models starts from: its root's facts, its recipe, and the number of values of an adapter."""

    root: dict[str, Any]
    recipe: FineTuningRecipe
    numel: int


@dataclass(frozen=True)
class ShadowPlan:
    """A frozen plan.

    Args:
        source, target ([`PlanSide`]): TinyLM and LLM.
        data (`dict`): where the public rows come from, and their fingerprint.
        seed (`int`), strategy (`str`), with_overlap (`bool`): how the subsets were drawn.
        runs (`tuple[ShadowRun, ...]`).
    """

    source: PlanSide
    target: PlanSide
    data: dict[str, Any]
    seed: int
    strategy: Strategy
    with_overlap: bool
    runs: tuple[ShadowRun, ...]

    def side(self, role: str) -> PlanSide:
        return self.source if role == SOURCE_FOLDER else self.target

    @cached_property
    def _by_id(self) -> dict[str, ShadowRun]:
        return {run.shadow_id: run for run in self.runs}

    def run(self, shadow_id: str) -> ShadowRun:
        return self._by_id[shadow_id]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that the plan says."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def check_rows(self, rows: datasets.Dataset) -> None:
        """Refuse rows that are not those the plan was made from.

        Raises:
            [`PlanError`]
        """
        found = fingerprint_rows(rows)
        if found != self.data["fingerprint"]:
            raise PlanError(
                "The public data are not those that the plan was made from.",
                path=self.data["path"],
                expected=f"{self.data['num_rows']} rows, fingerprint {self.data['fingerprint'][:12]}",
                found=f"{len(rows)} rows, fingerprint {found[:12]}",
                remedy="restore the data, or make a new plan in a new folder",
            )

    def describe(self) -> str:
        """What will run and what it will cost, for people."""
        tasks = {run.task for run in self.runs if run.task is not None}
        counts = ", ".join(f"{sum(run.split == split for run in self.runs)} {split}" for split in SPLITS)
        lines = [
            f"{len(self.runs)} shadow runs ({counts}) of {len(self.runs[0].row_indices)} rows each, "
            + (f"{len(tasks)} tasks" if self.strategy == "per_task" else "rows of all tasks mixed"),
        ]
        for role, name in (("source", "TinyLM"), ("target", "LLM")):
            side = self.side(role)
            examples = side.recipe.num_examples * len(self.runs)
            size = 4 * side.numel * len(side.recipe.snapshot_steps()) * len(self.runs)
            lines.append(
                f"{name:<7}{one_line(side.root['base_model'])}\n"
                f"       {side.recipe.max_steps * len(self.runs):,} optimizer steps, {examples:,} rows read "
                f"(at most {examples * side.recipe.max_length:,} tokens), {describe_bytes(size)} of run files"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for role in ROLES:
            data[role]["recipe"] = self.side(role).recipe.to_dict()
        return {"format_version": FORMAT_VERSION, **data, "runs": [asdict(run) for run in self.runs]}

    def save(self, plan_dir: str | Path) -> Path:
        """Write `plan.json`; a different plan that is already there is never overwritten.

        Raises:
            [`PlanError`]: the folder holds another plan.
        """
        path = Path(plan_dir) / PLAN_NAME
        if path.is_file():
            existing = ShadowPlan.load(plan_dir)
            if existing.fingerprint != self.fingerprint:
                raise PlanError(
                    "The folder holds another plan.",
                    path=path,
                    expected="an empty folder, or the same plan",
                    found=f"plan {existing.fingerprint[:12]}",
                    remedy="choose another folder: finished runs belong to their plan",
                )
            return path
        write_json_atomic(path, self.to_dict(), indent=None)
        return path

    @classmethod
    def load(cls, plan_dir: str | Path) -> ShadowPlan:
        """Read `plan.json`.

        Raises:
            [`PlanError`]: there is none, or it is not a plan.
            [`FormatVersionError`]: written by a newer version.
        """
        path = Path(plan_dir) / PLAN_NAME
        data = read_record(path, PlanRecord, error=PlanError, max_bytes=MAX_PLAN_BYTES, max_nodes=MAX_PLAN_VALUES)
        num_rows = data["data"].get("num_rows")
        seen: set[str] = set()
        for run in data["runs"]:
            if run["shadow_id"] in seen or (num_rows is not None and max(run["row_indices"]) >= num_rows):
                raise PlanError(
                    "A run of the plan stands twice, or names rows that there are not.",
                    path=path,
                    expected=f"ids of their own, rows below {num_rows}",
                    found=f"{run['shadow_id']}, row {max(run['row_indices'])}",
                )
            seen.add(run["shadow_id"])
        source, target = (
            PlanSide(dict(side["root"]), FineTuningRecipe.from_dict(side["recipe"], path=path), side["numel"])
            for side in (data["source"], data["target"])
        )
        return cls(
            source=source,
            target=target,
            data=dict(data["data"]),
            seed=data["seed"],
            strategy=data["strategy"],
            with_overlap=data["with_overlap"],
            runs=tuple(
                ShadowRun(run["shadow_id"], run["task"], run["split"], run["seed"], tuple(run["row_indices"]))
                for run in data["runs"]
            ),
        )


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
    strategy: Strategy = "mixed",
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
        data (`Mapping`): where the rows come from: `path`, and `split`, `revision`, `name` for a dataset.
        seed (`int`, *optional*, defaults to 0).
        strategy (`str`, *optional*, defaults to `"mixed"`): `"mixed"` draws each subset from all rows, `"per_task"`
            from the rows of one task, tasks in turn.
        with_overlap (`bool`, *optional*, defaults to `True`): whether subsets may share rows.
        validation_fraction, test_fraction (`float`, *optional*, default to 0.05): share of the *runs* held out (paper:
            a 95:5 split, by pairs).
        tasks (`Sequence[str]`, *optional*): for `"per_task"`, only these.

    Raises:
        [`PlanError`]: too few rows, no tasks, or snapshots that cannot be paired.
    """
    steps = [len(recipe.snapshot_steps()) for recipe in (source_recipe, target_recipe)]
    if steps[0] != steps[1]:
        raise PlanError(
            "TinyLM and LLM record different numbers of snapshots, so they cannot be paired.",
            expected="equal snapshot_last, or as many steps of snapshot_every",
            found=f"{steps[0]} and {steps[1]}",
        )
    if num_runs < 1 or rows_per_run < 1 or not 0 <= validation_fraction + test_fraction < 1:
        raise PlanError(
            "The sizes make no sense.",
            expected="num_runs and rows_per_run of at least 1, held-out fractions below 1 together",
            found=f"{num_runs}, {rows_per_run}, {validation_fraction} + {test_fraction}",
        )
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
    num_test = round(num_runs * test_fraction) or int(test_fraction > 0 and num_runs > 2)
    num_validation = round(num_runs * validation_fraction) or int(validation_fraction > 0 and num_runs > 2)
    num_train = num_runs - num_test - num_validation
    splits = ["train"] * num_train + ["validation"] * num_validation + ["test"] * num_test
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


def fingerprint_rows(rows: datasets.Dataset) -> str:
    """SHA-256 over prompts and completions, in order."""
    digest = hashlib.sha256()
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        digest.update(json.dumps([prompt, completion]).encode())
    return digest.hexdigest()


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
                remedy="plan fewer or smaller subsets" + ("" if with_overlap else ", or allow overlap"),
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

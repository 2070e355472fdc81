"""The shadow plan: which subsets of the public data are fine-tuned, from which roots, by which recipes.

Planning is pure and frozen: `plan.json`, with both roots beside it, is all that the runs need; they only execute it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers.utils import logging

from ..adapters.io import read_record, write_json_atomic
from ..constants import FORMAT_VERSION, PLAN_NAME, SOURCE_FOLDER, TARGET_FOLDER
from ..errors import PlanError
from ..finetuning import FineTuningRecipe, RowSource, load_source
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

    def load_rows(self, plan_dir: str | Path) -> datasets.Dataset:
        """The public rows, from where the plan found them, or, after a move, in the plan's folder or beside it.

        Raises:
            [`PlanError`]: they are in none of these places, or are not those that the plan was made from.
            [`DataError`]: they cannot be read.
        """
        known = {field.name for field in fields(RowSource)}
        source = {key: value for key, value in self.data.items() if key in known and value is not None}
        path, folder = Path(source["path"]), Path(plan_dir).resolve()
        # What has a revision is on the Hub.
        places = [] if "revision" in source else [path, folder / path.name, folder.parent / path.name]
        found = next((str(place) for place in places if os.path.exists(place)), None)
        if found is None and path.is_absolute():
            raise PlanError(
                "The public data are no longer where the plan found them.",
                path=path,
                expected=f"them there, in {folder} or beside it",
                found="nothing",
                remedy="put the file or folder back; its content is checked",
            )
        source["path"] = found or source["path"]
        rows = load_source(RowSource.of(**source))
        self.check_rows(rows)
        return rows

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
                    remedy="plan again, in a new folder",
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


def fingerprint_rows(rows: datasets.Dataset) -> str:
    """SHA-256 over prompts and completions, and tools where there are some, in order."""
    digest = hashlib.sha256()
    names = [name for name in ("prompt", "completion", "tools") if name in rows.column_names]
    for batch in rows.select_columns(names).iter(batch_size=1_000):
        for row in zip(*(batch[name] for name in names), strict=True):
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()

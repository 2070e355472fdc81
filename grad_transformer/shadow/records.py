"""One safetensors file for each finished run and model: complete or absent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters import LoraLayout
from ..adapters.io import read_header, read_tensors, save_tensors_atomic
from ..constants import FORMAT_VERSION, RUNS_FOLDER
from ..errors import DeltaDatasetError
from ..files import parse_record
from ..finetuning import SftResult
from ..schemas import RunRecordFacts
from .plan import ShadowPlan


_STEPS, _LOSSES, _RUN = "steps", "losses", "run"


@dataclass(frozen=True)
class RunRecord:
    """What one run of one model left.

    Args:
        shadow_id, task, split: of the run in the plan.
        steps (`list[int]`): optimizer steps after which the adapter was recorded.
        snapshots (`dict[str, torch.Tensor]`): adapter values after these steps, `(K, *shape)` float32 by key.
        losses (`list[float]`): training loss of each optimizer step.
        facts (`dict`): engine, seconds, fingerprints of plan, root and recipe.
    """

    shadow_id: str
    task: str | None
    split: str
    steps: list[int]
    snapshots: dict[str, torch.Tensor]
    losses: list[float]
    facts: dict[str, Any]


def run_path(plan_dir: str | Path, role: str, shadow_id: str) -> Path:
    """Where the file of a run lies: `runs/<role>/<shadow_id>.safetensors`."""
    return Path(plan_dir) / RUNS_FOLDER / role / f"{shadow_id}.safetensors"


def missing_runs(plan: ShadowPlan, plan_dir: str | Path, role: str) -> list[str]:
    """Ids of the runs that have no file yet, in the plan's order."""
    return [run.shadow_id for run in plan.runs if not run_path(plan_dir, role, run.shadow_id).is_file()]


def write_run(
    plan: ShadowPlan, plan_dir: str | Path, role: str, shadow_id: str, result: SftResult, *, engine: str
) -> Path:
    """Write the file of a finished run, whole or not at all."""
    run = plan.run(shadow_id)
    side = plan.side(role)
    facts = {
        "format_version": FORMAT_VERSION,
        "shadow_id": shadow_id,
        "task": run.task,
        "split": run.split,
        "role": role,
        "plan": plan.fingerprint,
        "root": side.root["fingerprint"],
        "recipe": side.recipe.fingerprint,
        "engine": engine,
        "seconds": round(result.seconds, 4),
    }
    tensors = {key: values.to(torch.float32) for key, values in result.snapshots.items()}
    tensors[_STEPS] = torch.tensor(result.steps, dtype=torch.int64)
    tensors[_LOSSES] = torch.tensor(result.losses, dtype=torch.float32)
    path = run_path(plan_dir, role, shadow_id)
    save_tensors_atomic(path, tensors, {_RUN: json.dumps(facts)})
    return path


def read_run(plan: ShadowPlan, plan_dir: str | Path, role: str, shadow_id: str, *, layout: LoraLayout) -> RunRecord:
    """Read and verify the file of a run.

    Raises:
        [`DeltaDatasetError`]: it belongs to another plan, or does not hold what it must.
        [`AdapterFormatError`]: it cannot be read, or holds values that are not finite.
    """
    path = run_path(plan_dir, role, shadow_id)
    header, metadata = read_header(path)
    if _RUN not in metadata:
        raise DeltaDatasetError(
            "The file is not that of a shadow run.",
            path=path,
            expected=f"`{_RUN}` in its header",
            found="none",
            remedy="delete this file and run `grad-transformer shadow` again",
        )
    facts = parse_record(metadata[_RUN], RunRecordFacts, path=path, error=DeltaDatasetError)
    plan_fingerprint = facts["plan"]
    if plan_fingerprint != plan.fingerprint or facts["shadow_id"] != shadow_id or facts["role"] != role:
        raise DeltaDatasetError(
            "The run belongs to another plan.",
            path=path,
            expected=f"plan {plan.fingerprint[:12]}, {role}, {shadow_id}",
            found=f"plan {str(plan_fingerprint)[:12]}, {facts['role']}, {facts['shadow_id']}",
            remedy="give every plan a folder of its own; delete this file to run it again",
        )
    count = header[_STEPS].shape[0] if _STEPS in header and len(header[_STEPS].shape) == 1 else 0
    expected = {spec.key: (count, *spec.shape) for spec in layout.tensor_specs()}
    found = {key: info.shape for key, info in header.items() if key not in (_STEPS, _LOSSES)}
    if count == 0 or found != expected or _LOSSES not in header or len(header[_LOSSES].shape) != 1:
        raise DeltaDatasetError(
            "The run does not hold the adapter of its root's layout.",
            path=path,
            expected=f"{len(expected)} tensors of at least one snapshot, steps and losses",
            found=f"{len(found)} tensors of {count} snapshots",
            remedy="delete this file and run `grad-transformer shadow` again",
        )
    tensors = read_tensors(path, list(header))
    steps, losses = tensors.pop(_STEPS).tolist(), tensors.pop(_LOSSES).tolist()
    in_order = all(type(step) is int and before < step for before, step in zip([0, *steps], steps, strict=False))
    if not in_order or steps[-1] >= 2**31:
        raise DeltaDatasetError(
            "The steps of the run do not count upwards.",
            path=path,
            expected="whole numbers from 1 on, each larger than the one before",
            found=str(steps)[:80],
            remedy="delete this file and run `grad-transformer shadow` again",
        )
    return RunRecord(shadow_id, facts["task"], facts["split"], steps, tensors, losses, dict(facts))

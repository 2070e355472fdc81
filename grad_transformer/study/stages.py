"""Stages: pieces of work named by the hash of all that decides their result, so that experiments share them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from ..adapters.io import read_record, write_json_atomic
from ..constants import FORMAT_VERSION
from ..schemas import Object


STAGE_NAME = "stage.json"
# Raised where a change of the code changes what a stage of the same name and parameters gives.
STAGES_VERSION = 1


class StageRecord(TypedDict):
    """`stage.json`, written last."""

    result: Object
    seconds: Annotated[float, Field(ge=0)]
    cpu_seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True, eq=False)
class Stage:
    """One piece of work.

    Args:
        kind (`str`): which function does it, see `work.WORK`.
        params (`dict`): JSON; decides, with the inputs, what comes out.
        inputs (`dict[str, Stage]`): stages whose folders it reads.
        settings (`dict`): JSON; how it is done, without effect on the result (devices, batch sizes).
    """

    kind: str
    params: dict[str, Any]
    inputs: dict[str, Stage] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash of kind, parameters and inputs."""
        parts = [STAGES_VERSION, self.kind, self.params, {name: stage.key for name, stage in self.inputs.items()}]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, study_dir: str | Path) -> Path:
        return Path(study_dir) / "stages" / f"{self.kind}-{self.key}"

    def is_finished(self, study_dir: str | Path) -> bool:
        return (self.folder(study_dir) / STAGE_NAME).is_file()

    def result(self, study_dir: str | Path) -> dict[str, Any]:
        """Figures that the finished stage left."""
        return read_record(self.folder(study_dir) / STAGE_NAME, StageRecord)["result"]

    def seconds(self, study_dir: str | Path) -> tuple[float, float]:
        """Wall time and processor time of the finished stage, interrupted attempts not counted."""
        found = read_record(self.folder(study_dir) / STAGE_NAME, StageRecord)
        return found["seconds"], found["cpu_seconds"]

    def finish(self, study_dir: str | Path, result: Mapping[str, Any], *, seconds: float, cpu_seconds: float) -> None:
        """Write the manifest, which alone says that the stage is finished."""
        data = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "params": self.params,
            "inputs": {name: stage.key for name, stage in self.inputs.items()},
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "result": dict(result),
        }
        write_json_atomic(self.folder(study_dir) / STAGE_NAME, data)


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """All stages that these need, each once, inputs first."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in ordered:
            for needed in stage.inputs.values():
                visit(needed)
            ordered[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())

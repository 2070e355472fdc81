"""From finished stages to `study.json`, `study.md` and pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..adapters.io import write_json_atomic, write_text_atomic
from ..constants import FORMAT_VERSION, STUDY_NAME
from ..evaluation.metrics import performance_gap_recovered, pgr_interval
from .builders import StudyBuilder
from .experiments import Experiment
from .figures import draw_study
from .lines import Cell, Line
from .spec import StudySpec
from .stages import in_order
from .tables import markdown
from .work_clients import load_scores


STUDY_MARKDOWN_NAME = "study.md"
TIMINGS = "timings"


def write_study(spec: StudySpec, experiments: Sequence[Experiment], study_dir: str | Path) -> dict[str, Any]:
    """Read what the stages left and write the report.

    Args:
        spec ([`StudySpec`]): filled.
        experiments (`Sequence[Experiment]`): all of whose stages are finished.
        study_dir (`str` or `Path`): folder of the study.

    Returns:
        what `study.json` holds. All but `timings` depends on spec and machine alone, not on interruptions.
    """
    folder = Path(study_dir)
    builders = {seed: StudyBuilder(spec, seed) for seed in spec.seeds}
    study: dict[str, Any] = {"format_version": FORMAT_VERSION, "spec": spec.to_dict(), "experiments": {}}
    lines_of: dict[str, dict[int, list[Line]]] = {}
    for experiment in experiments:
        lines = {seed: experiment.build(builder) for seed, builder in builders.items()}
        lines_of[experiment.name] = lines
        study["experiments"][experiment.name] = {
            "title": experiment.title,
            "paper": experiment.paper,
            "note": experiment.note,
            "lines": [_line(by_seed, folder) for by_seed in _by_position(lines)],
        }
        study["experiments"][experiment.name]["groups"] = _groups(study["experiments"][experiment.name]["lines"])
    study[TIMINGS] = _timings(lines_of, folder)
    figures = draw_study(study, folder)
    write_text_atomic(folder / STUDY_MARKDOWN_NAME, markdown(study, figures=[path.name for path in figures]))
    write_json_atomic(folder / STUDY_NAME, study)
    return study


def _by_position(lines: Mapping[int, Sequence[Line]]) -> list[dict[int, Line]]:
    seeds = list(lines)
    return [dict(zip(seeds, same, strict=True)) for same in zip(*lines.values(), strict=True)]


def _line(by_seed: Mapping[int, Line], folder: Path) -> dict[str, Any]:
    """One line of all seeds. Labels that differ between seeds (weights of mixtures) are those of the first."""
    first = next(iter(by_seed.values()))
    found = {str(seed): _line_of_seed(line, folder) for seed, line in by_seed.items()}
    return {"label": first.label, "group": first.group, "seeds": found, "mean": _mean_of(list(found.values()))}


def _line_of_seed(line: Line, folder: Path) -> dict[str, Any]:
    rows = {method: _rows(cell, folder) for method, cell in line.cells.items()}
    scores = {method: float(fmean(float(values.mean()) for values in clients)) for method, clients in rows.items()}
    data: dict[str, Any] = {"scores": scores, "pgr": _pgr(scores)}
    if {"generated", "tinylm", "llm_finetuned"} <= rows.keys():
        flat = (np.concatenate(rows[name]) for name in ("generated", "tinylm", "llm_finetuned"))
        interval = pgr_interval(*flat)
        data["pgr_interval"] = None if interval is None else list(interval)
    nll = {method: _nll(cell, folder) for method, cell in line.cells.items() if cell.stage.params["nll"]}
    if nll:
        data["nll"] = nll
    if line.facts:
        data["facts"] = {name: stage.result(folder).get(key) for name, (stage, key) in line.facts.items()}
    return data


def _rows(cell: Cell, folder: Path) -> list[np.ndarray]:
    found = load_scores(cell.stage, folder, cell.name)
    return found if cell.clients is None else [found[index] for index in cell.clients]


def _nll(cell: Cell, folder: Path) -> float:
    found = cell.stage.result(folder)[f"{cell.name}.nll"]
    return fmean(found if cell.clients is None else [found[index] for index in cell.clients])


def _pgr(scores: Mapping[str, float]) -> dict[str, float | None]:
    """PGR of every method but its two ends; empty where an end is missing."""
    if not {"tinylm", "llm_finetuned"} <= scores.keys():
        return {}
    low, high = scores["tinylm"], scores["llm_finetuned"]
    return {
        method: performance_gap_recovered(score, low, high)
        for method, score in scores.items()
        if method not in ("tinylm", "llm_finetuned")
    }


def _mean_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of several lines or seeds; the PGR is that of the mean scores, so that every one counts."""
    scores = {name: fmean(part["scores"][name] for part in parts) for name in parts[0]["scores"]}
    mean: dict[str, Any] = {"scores": scores, "pgr": _pgr(scores)}
    for kind in ("nll", "facts"):
        if all(kind in part for part in parts):
            columns = {name: [part[kind][name] for part in parts] for name in parts[0][kind]}
            mean[kind] = {
                name: fmean(values)
                for name, values in columns.items()
                if all(isinstance(value, float | int) for value in values)
            }
    return mean


def _groups(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the lines of each group: of every seed, over all, and the lowest and highest PGR of a seed."""
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["seeds"][next(iter(line["seeds"]))]["scores"]:
            grouped[line["group"]].append(line)
    found = {}
    for group, members in grouped.items():
        seeds = {seed: _mean_of([line["seeds"][seed] for line in members]) for seed in members[0]["seeds"]}
        mean = _mean_of(list(seeds.values()))
        ranges = {}
        for method in mean["pgr"]:
            known = [v for part in seeds.values() if (v := part["pgr"].get(method)) is not None]
            ranges[method] = [min(known), max(known)] if known else None
        found[group] = {"lines": len(members), "seeds": seeds, "mean": mean, "pgr_range": ranges}
    return found


def _timings(lines: Mapping[str, Mapping[int, Sequence[Line]]], folder: Path) -> dict[str, Any]:
    """Seconds of the stages: by kind, and what one client costs with the mapper and without."""
    stages = in_order(
        stage for by_seed in lines.values() for found in by_seed.values() for line in found for stage in line.stages
    )
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for stage in stages:
        name = stage.kind
        if "root" in stage.inputs and stage.kind in ("shadows", "clients"):
            base = stage.inputs["root"].inputs["base"].params
            name += f" {base['role']}" if "role" in base else f" {base['model']}"
        by_kind[name].append(stage.seconds(folder))
    kinds = {
        name: {"stages": len(found), "seconds": sum(w for w, _ in found), "cpu_seconds": sum(c for _, c in found)}
        for name, found in by_kind.items()
    }
    timings: dict[str, Any] = {"kinds": kinds}
    for unit in ("seconds", "cpu_seconds"):
        timings[unit] = sum(kind[unit] for kind in kinds.values())
    each: dict[str, list[float]] = defaultdict(list)
    for found in lines.get("single_client", {}).values():
        for cell_name in ("tinylm", "llm_finetuned"):
            stage = found[0].cells[cell_name].stage.inputs["deltas"]
            each[cell_name] += stage.result(folder)["seconds_each"]
        stage = found[0].cells["generated"].stage.inputs["deltas"]
        each["generated"].append(stage.seconds(folder)[0] / len(stage.inputs["clients"].params["clients"]))
    timings["one_client"] = {name: fmean(values) for name, values in each.items()}
    return timings

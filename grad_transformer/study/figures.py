"""Pictures of a study, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..adapters.io import atomic_write
from .tables import MAIN, METHODS, NEEDS_PRIVATE_INPUTS, OURS


MAIN_FIGURE = "study_pgr.png"
ABLATIONS_FIGURE = "study_ablations.png"

_RANGE = (-100.0, 130.0)
_COLOURS = {"ours": "#D55E00", "private": "#0072B2", "public": "#56B4E9", "control": "#7A7A7A"}
# Name to whether its lines are in an order, so that points are joined.
_ABLATIONS = {
    "privacy": True,
    "shadow_rows": True,
    "runs_and_checkpoints": True,
    "scales": False,
    "partitions": False,
    "targets": False,
}
# In the order of drawing: what is often reached lies below what reaches it.
_CURVES = {
    "llm_finetuned": ("LLM ft", "#0072B2"),
    "tinylm": ("TinyLM ft", "#56B4E9"),
    "generated": ("ours", "#D55E00"),
    "generated_noise": ("ours, noise in training", "#CC79A7"),
    "refined": ("ours, refined", "#009E73"),
}


def draw_study(study: Mapping[str, Any], output_dir: str | Path) -> list[Path]:
    """Draw what the study has data for; returns the files."""
    experiments = study["experiments"]
    figures: dict[str, Figure] = {}
    if MAIN in experiments and any(found["mean"]["pgr"] for found in experiments[MAIN]["groups"].values()):
        figures[MAIN_FIGURE] = _draw_main(experiments[MAIN])
    known = [name for name in _ABLATIONS if name in experiments]
    if known:
        figures[ABLATIONS_FIGURE] = _draw_ablations({name: experiments[name] for name in known})
    paths = []
    for name, figure in figures.items():
        path = Path(output_dir) / name
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        paths.append(path)
    return paths


def _draw_main(experiment: Mapping[str, Any]) -> Figure:
    """PGR of every method by kind of client: a bar for the mean of all seeds, a dot for each."""
    groups = experiment["groups"]
    methods = [
        method
        for method in METHODS
        if any(method in found["mean"]["pgr"] for found in groups.values()) and method not in ("tinylm",)
    ]
    figure = Figure(figsize=(5.2 * len(groups) + 1.6, 0.42 * len(methods) + 1.5), layout="constrained")
    for column, (group, found) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), column + 1)
        for line, method in enumerate(methods):
            value = found["mean"]["pgr"].get(method)
            if value is None:
                axes.text(0, line, "gap too small", va="center", fontsize=8, style="italic", color="#666666")
                continue
            axes.barh(line, _clip(value), color=_colour(method), height=0.62, zorder=2)
            for part in found["seeds"].values():
                if (seed := part["pgr"].get(method)) is not None:
                    axes.plot(_clip(seed), line, "o", color="#000000", markersize=3.2, zorder=3)
            # In a column of their own, where no dot of a seed can lie on them.
            axes.text(_RANGE[1] + 20, line, f"{value:.0f}", va="center", ha="right", fontsize=8)
        for mark, style in ((0, "-"), (100, "--")):
            axes.axvline(mark, color="#444444", linestyle=style, linewidth=0.9, zorder=1)
        axes.set_xlim(_RANGE[0] - 6, _RANGE[1] + 24)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        labels = [METHODS[method].replace("*", "") for method in methods] if column == 0 else []
        axes.set_yticks(range(len(methods)) if column == 0 else [], labels, fontsize=9)
        axes.set_xlabel("performance gap recovered, %  (0: TinyLM, 100: LLM, both fine-tuned)", fontsize=8.5)
        axes.set_title(f"{group} tasks ({found['lines']} clients in each world)", fontsize=10, loc="left")
        axes.grid(axis="x", color="#EEEEEE", zorder=0)
    names = {"ours": "ours", "private": "needs the client's inputs", "public": "public inputs", "control": "control"}
    handles = [Patch(color=_COLOURS[key]) for key in names]
    figure.legend(handles, names.values(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _draw_ablations(experiments: Mapping[str, Any]) -> Figure:
    """Mean scores of each line, a panel for each experiment and kind of client."""
    panels = [(name, group) for name, experiment in experiments.items() for group in experiment["groups"]]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    for index, (name, group) in enumerate(panels):
        axes, experiment = figure.add_subplot(rows, columns, index + 1), experiments[name]
        lines = [line for line in experiment["lines"] if line["group"] == group]
        _draw_panel(axes, lines, style="-o" if _ABLATIONS[name] else "o")
        title = f"{experiment['title']}\n({experiment['paper']}"
        axes.set_title(title + (f"; {group} tasks)" if group in ("seen", "unseen") else ")"), fontsize=8.5, loc="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, lines: list[Any], *, style: str) -> None:
    for order, (method, (label, colour)) in enumerate(_CURVES.items()):
        values = [line["mean"]["scores"].get(method) for line in lines]
        if all(value is None for value in values):
            continue
        axes.plot(range(len(lines)), values, style, color=colour, markersize=6.5 - order, linewidth=1.2, label=label)
        for line_index, line in enumerate(lines):
            seeds = [part["scores"][method] for part in line["seeds"].values() if method in part["scores"]]
            axes.plot([line_index] * len(seeds), seeds, ".", color=colour, markersize=3, alpha=0.5)
    names = [line["label"].replace(", ", ",\n").replace(" in separate", "\nin separate") for line in lines]
    axes.set_xticks(range(len(lines)), names, fontsize=6.5, rotation=20)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(axis="y", color="#EEEEEE")


def _clip(value: float) -> float:
    return min(max(value, _RANGE[0]), _RANGE[1])


def _colour(method: str) -> str:
    if method in OURS:
        return _COLOURS["ours"]
    if method in NEEDS_PRIVATE_INPUTS:
        return _COLOURS["private"]
    return _COLOURS["public" if method == "w2s_public" else "control"]

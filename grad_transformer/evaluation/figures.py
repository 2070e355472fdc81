"""Pictures of a report, as PNG files. Each title says what one should conclude, from the report's own numbers.

Colours are Okabe and Ito's, which the colour-blind can tell apart; controls also differ in their markers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from ..adapters.io import atomic_write
from ..adapters.statistics import BlockAgreement
from ..constants import ACCURACY_FIGURE, BLOCKS_FIGURE, PGR_FIGURE, TRAINING_FIGURE
from .records import KINDS, ClientReport, HeldoutScores, Report, pooled_pgr


_PGR_RANGE = (-60.0, 140.0)
# Room beyond that range, on both sides, for the arrows of what lies outside.
_MARGIN = 18.0
# name: (label, colour, marker)
_SERIES = {
    "tinylm": ("TinyLM, fine-tuned", "#56B4E9", "o"),
    "generated": ("LLM, generated adapter", "#D55E00", "o"),
    "refined": ("LLM, generated and refined on public prompts", "#E69F00", "o"),
    "llm_finetuned": ("LLM, fine-tuned", "#0072B2", "o"),
    "public_weak_to_strong": ("LLM, weak-to-strong on public prompts", "#F0E442", "^"),
    "nearest_shadow": ("nearest shadow", "#009E73", "s"),
    "ridge": ("ridge regression", "#CC79A7", "D"),
    "mean_shadow": ("mean shadow", "#7A7A7A", "P"),
    "other_client": ("another client's delta", "#B8860B", "X"),
    "random": ("random delta", "#000000", "*"),
    "llm_base": ("LLM, no delta", "#BBBBBB", "v"),
}
_CONTROL_ORDER = ("nearest_shadow", "ridge", "mean_shadow", "other_client", "random")
_PGR_ORDER = ("refined", "public_weak_to_strong", *_CONTROL_ORDER)


def draw_figures(
    report: Report, output_dir: str | Path, *, training_log: Sequence[Mapping[str, Any]] | None = None
) -> list[Path]:
    """Draw what the report has data for.

    Args:
        report ([`Report`]).
        output_dir (`str` or `Path`): folder of the PNG files.
        training_log (`Sequence[Mapping]`, *optional*): `Trainer.state.log_history` of the mapper.

    Returns:
        `list[Path]`: the files written.
    """
    figures: dict[str, Figure] = {}
    if report.clients:
        figures[PGR_FIGURE] = draw_pgr(report.clients)
        figures[ACCURACY_FIGURE] = draw_accuracy(report.clients)
    if report.blocks is not None:
        figures[BLOCKS_FIGURE] = draw_blocks(report.blocks)
    if training_log:
        figures[TRAINING_FIGURE] = draw_training(training_log, report.heldout)
    paths = []
    for name, figure in figures.items():
        path = Path(output_dir) / name
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        paths.append(path)
    return paths


def draw_pgr(clients: Sequence[ClientReport]) -> Figure:
    """One line per client: PGR of the generated adapter with its interval, and of each control."""
    clients = sorted(clients, key=lambda client: KINDS.index(client.kind))
    figure = Figure(figsize=(9.0, 1.9 + 0.36 * len(clients)), layout="constrained")
    axes = figure.add_subplot()
    low, high = _PGR_RANGE
    for value, style in ((0.0, ":"), (100.0, "--")):
        axes.axvline(value, color="#888888", linestyle=style, linewidth=1, zorder=0)
    used = []
    for line, client in enumerate(clients):
        if client.pgr is None:
            reason = "gap too small: no PGR" if client.gap_too_small else "no fine-tuned LLM: no PGR"
            axes.text(50, line, reason, ha="center", va="center", fontsize=8, style="italic", color="#666666")
            continue
        for name in _PGR_ORDER:
            pgr = client.pgr_of(name)
            if pgr is not None:
                used.append(name)
                _mark_pgr(axes, pgr, line, name, size=48 if name == "refined" else 34)
        ends = np.clip(client.pgr_interval or (client.pgr, client.pgr), low, high)
        if ends[0] < ends[1]:
            axes.hlines(line, *ends, color=_SERIES["generated"][1], linewidth=2.4, zorder=3)
        _mark_pgr(axes, client.pgr, line, "generated", size=64)
    _label_kinds(axes, clients)
    axes.set_xlim(low - _MARGIN, high + _MARGIN)
    for edge in (low - _MARGIN, high):
        axes.axvspan(edge, edge + _MARGIN, color="#F4F4F4", zorder=-1)
    axes.set_xticks(range(-50, 150, 25))
    axes.set_ylim(len(clients) - 0.4, -0.6)
    axes.set_yticks(range(len(clients)), [client.id for client in clients], fontsize=8)
    axes.set_xlabel(
        "performance gap recovered, %  (0: fine-tuned TinyLM, 100: fine-tuned LLM; bar: 95 % interval over test rows)",
        fontsize=8.5,
    )
    axes.grid(axis="y", color="#EEEEEE", zorder=0)
    for name in ("generated", *(name for name in _PGR_ORDER if name in used)):
        label, colour, marker = _SERIES[name]
        axes.scatter([], [], color=colour, marker=marker, label=label, s=34)
    axes.scatter([], [], color="#555555", marker="<", label="beyond the axis, by colour", s=34)
    _legend_below(figure, axes, columns=4)
    axes.set_title(_pgr_title(clients), fontsize=11, loc="left")
    return figure


def _mark_pgr(axes: Axes, value: float, line: int, name: str, *, size: float) -> None:
    _, colour, marker = _SERIES[name]
    low, high = _PGR_RANGE
    front = {"generated": 4, "refined": 3}.get(name, 2)
    if low <= value <= high:
        axes.scatter(value, line, color=colour, marker=marker, s=size, zorder=front, linewidths=0)
        return
    # Clipped markers would cover each other: each has its own place along the edge.
    slots = ("generated", *_PGR_ORDER)
    inward = 2.2 + 2.0 * slots.index(name)
    edge, arrow = (low - _MARGIN + inward, "<") if value < low else (high + _MARGIN - inward, ">")
    axes.scatter(
        edge, line, color=colour, marker=arrow, s=38 if name == "generated" else 26, zorder=front, linewidths=0
    )


def _label_kinds(axes: Axes, clients: Sequence[ClientReport]) -> None:
    for kind in KINDS:
        lines = [line for line, client in enumerate(clients) if client.kind == kind]
        if lines:
            axes.text(
                1.01, (lines[0] + lines[-1]) / 2, kind, transform=axes.get_yaxis_transform(), va="center", fontsize=9
            )
            if lines[0] > 0:
                axes.axhline(lines[0] - 0.5, color="#999999", linewidth=0.8)


def _pgr_title(clients: Sequence[ClientReport]) -> str:
    lines = []
    for name, what in (("generated", "the generated adapter"), ("refined", "refined on public prompts")):
        found = [(kind, pooled_pgr([client for client in clients if client.kind == kind], name)) for kind in KINDS]
        parts = [f"{kind} {pgr:.0f} %" for kind, pgr in found if pgr is not None]
        if parts:
            lines.append(f"{what}: {', '.join(parts)}")
    if not lines:
        return "No kind of client has a gap that a PGR could be taken over"
    return "Recovered of the gap between TinyLM and LLM, on average\n" + "\n".join(lines)


def draw_accuracy(clients: Sequence[ClientReport]) -> Figure:
    """Bars by kind of client: mean scores of the references, the generated adapter and the controls."""
    kinds = [kind for kind in KINDS if any(client.kind == kind for client in clients)]
    tried = {name for client in clients for name in client.methods}
    names = ["tinylm", "generated", *(name for name in ("refined",) if name in tried), "llm_finetuned"]
    names += [*(name for name in _PGR_ORDER[1:] if name in (*_CONTROL_ORDER, *tried)), "llm_base"]
    figure = Figure(figsize=(max(6.4, 1.2 + 3.1 * len(kinds)), 4.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.9 / len(names)
    for slot, name in enumerate(names):
        label, colour, _ = _SERIES[name]
        for group, kind in enumerate(kinds):
            values = _scores(clients, kind, name)
            position = group + (slot - (len(names) - 1) / 2) * width
            if not values:
                axes.text(position, 0.012, "–", ha="center", fontsize=7)
                continue
            height = fmean(values)
            axes.bar(position, height, width * 0.92, color=colour, label=label if group == 0 else None, zorder=2)
            # At the foot of a bar, away from most dots; a bar too low for that has its label above.
            foot = 0.02 if height > 0.1 else max(values) + 0.015
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
            axes.text(position, foot, f"{height:.2f}", ha="center", fontsize=6.5, bbox=box, zorder=3)
            # One dot per client: a mean alone would hide how far they spread.
            spread = position + ((np.arange(len(values)) + 0.5) / len(values) - 0.5) * 0.6 * width
            axes.scatter(spread, values, s=5, color="white", edgecolors="#333333", linewidths=0.5, zorder=4)
    counts = [sum(client.kind == kind for client in clients) for kind in kinds]
    labels = [f"{kind} ({count} client{'s' * (count > 1)})" for kind, count in zip(kinds, counts, strict=True)]
    axes.set_xticks(range(len(kinds)), labels)
    axes.set_xlim(-0.55, len(kinds) - 0.45)
    axes.set_ylim(0, 1.09)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylabel("score (bar: mean, dot: client)")
    axes.grid(axis="y", color="#EEEEEE", zorder=0)
    _legend_below(figure, axes, columns=3 if len(kinds) < 3 else 5)
    axes.set_title(_accuracy_title(clients, kinds), fontsize=11, loc="left")
    return figure


def _accuracy_title(clients: Sequence[ClientReport], kinds: Sequence[str]) -> str:
    lines = []
    for name, label in (("generated", "Generated adapter"), ("refined", "Refined adapter")):
        parts = []
        for kind in kinds:
            scores, tinylm = _scores(clients, kind, name), fmean(_scores(clients, kind, "tinylm"))
            if scores:
                points = 100 * (fmean(scores) - tinylm)
                parts.append(f"{abs(points):.0f} points {'above' if points >= 0 else 'below'} ({kind})")
        if parts:
            lines.append(f"{label} against the fine-tuned TinyLM: {', '.join(parts)}")
    return "\n".join(lines)


def _scores(clients: Sequence[ClientReport], kind: str, name: str) -> list[float]:
    chosen = [client for client in clients if client.kind == kind]
    values = [client.score(name) for client in chosen]
    return [value for value in values if value is not None]


def draw_blocks(blocks: BlockAgreement) -> Figure:
    """Cosine and norm ratio of predicted against true held-out deltas, by block."""
    figure = Figure(figsize=(8.0, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    positions = np.arange(len(blocks.cosine))
    panels = (
        (left, blocks.cosine, "cosine with the true delta", "#0072B2"),
        (right, blocks.norm_ratio, "norm / norm of the true delta", "#E69F00"),
    )
    for axes, values, label, colour in panels:
        axes.bar(positions, values, 0.7, color=colour, zorder=2)
        axes.axhline(1.0, color="#888888", linestyle="--", linewidth=1)
        axes.axhline(0.0, color="#333333", linewidth=0.8)
        axes.set_ylim(min(0.0, *values) * 1.1, max(1.08, 1.1 * max(values)))
        axes.set_xlabel("LLM block, from input to output")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#EEEEEE", zorder=0)
    best, worst = int(np.argmax(blocks.cosine)), int(np.argmin(blocks.cosine))
    figure.suptitle(
        f"Held-out deltas: cosine {blocks.cosine[worst]:.2f} (block {worst}) to {blocks.cosine[best]:.2f} "
        f"(block {best}), norm ratio {min(blocks.norm_ratio):.2f} to {max(blocks.norm_ratio):.2f}\n"
        "(a norm ratio below 1 is right where part of a delta is noise)",
        fontsize=10.5,
    )
    return figure


def draw_training(training_log: Sequence[Mapping[str, Any]], heldout: HeldoutScores) -> Figure:
    """Losses and held-out R² over the mapper's training steps, from `Trainer.state.log_history`.

    Every logged `eval_*` value with `r2` in its name is drawn, but ceilings and controls.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label, colour in (("loss", "training", "#56B4E9"), ("eval_loss", "held-out", "#D55E00")):
        steps, values = _series(training_log, key)
        if steps:
            left.plot(steps, values, color=colour, label=label, marker="o", markersize=3)
    if left.lines and all(np.min(line.get_ydata()) > 0 for line in left.lines):
        left.set_yscale("log")
        for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    left.set(xlabel="optimizer step", ylabel="loss")
    keys = sorted({key for entry in training_log for key in entry if key.startswith("eval_") and "r2" in key})
    keys = [key for key in keys if "ceiling" not in key and "control" not in key]
    last = None
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#000000")
    for key, colour in zip(keys, colours, strict=False):
        steps, values = _series(training_log, key)
        label = key.removeprefix("eval_").replace("_", " ").replace("r2", "R²")
        right.plot(steps, values, color=colour, label=label, marker="o", markersize=3)
    if heldout.r2_ceiling is not None:
        right.axhline(
            heldout.r2_ceiling, color="#888888", linestyle="--", linewidth=1, label="ceiling on the test runs"
        )
        last = f"{heldout.r2:.2f} of a ceiling of {heldout.r2_ceiling:.2f}"
    right.axhline(0.0, color="#333333", linewidth=0.8)
    # Early steps can lie far below 0; what matters is between the mean shadow and the truth.
    floor = min((value for line in right.lines for value in line.get_ydata()), default=0.0)
    right.set_ylim(max(-1.2, min(-0.1, 1.1 * floor)), 1.02)
    right.set(xlabel="optimizer step", ylabel="R² around the mean shadow, validation runs")
    for axes in (left, right):
        axes.grid(color="#EEEEEE")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"On the test runs the mapper reaches R² {last or format(heldout.r2, '.2f')}", fontsize=11)
    return figure


def _series(training_log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[key]) for entry in training_log if key in entry and "step" in entry]
    return [step for step, _ in points], [value for _, value in points]


def _legend_below(figure: Figure, axes: Axes, *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)

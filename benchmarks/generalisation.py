"""Unseen clients against the number of shadow tasks, and every sort of client against the steps of refinement.

    grad-transformer demo --output_dir lab_seeds/seed-0 --preset full --seed 0
    python -m benchmarks.generalisation --labs lab_seeds/seed-0 lab_seeds/seed-1 --output results

Both are drawn, not tuned: `benchmarks.left_out_tasks` chooses settings. The number of shadow runs is the same for
each number of tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.lab import FinishedLab, markdown, score_many, train_mapper_on, write_result
from grad_transformer import LoraAdapter
from grad_transformer.evaluation.controls import fit_controls
from grad_transformer.evaluation.reduced_rank import ReducedRankRegression
from grad_transformer.finetuning import load_rows
from grad_transformer.lab.inputs import NUM_DIGITS
from grad_transformer.refinement import (
    RefinementArguments,
    annotator_deltas,
    candidate_deltas,
    complete_clients,
    fit_candidates,
    refine,
    shadow_annotators,
)


NUM_TASKS = (7, 14, 21, 28)
NUM_RUNS = 112
# (rounds, steps of each)
STEPS = ((0, 80), (1, 20), (1, 80), (2, 80))
SORTS = ("seen", "small", "skewed", "mixture", "unseen")
DEFAULTS = RefinementArguments(max_new_tokens=NUM_DIGITS + 1)
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7A7A7A", "#E69F00", "#0072B2")


class Clients:
    """The demo's own clients: adapters, test rows, and what their TinyLMs say to the public prompts."""

    def __init__(self, lab: FinishedLab):
        self.ids = [client.id for client in lab.world.clients()]
        folders = [lab.folder / "clients" / name for name in self.ids]
        self.adapters = [
            LoraAdapter.from_pretrained(folder / "tinylm", layout=lab.source.layout) for folder in folders
        ]
        self.tests = [list(load_rows(folder / "test.jsonl", split="test")) for folder in folders]
        self.source = torch.stack([lab.source.delta(adapter) for adapter in self.adapters])
        ask, self.student = lab.witnesses()
        self.heard = complete_clients(self.adapters, load_rows(lab.folder / "public.jsonl"), ask, DEFAULTS)

    def of_sort(self, sort: str) -> list[int]:
        return [number for number, name in enumerate(self.ids) if name.startswith(sort)]


def by_number_of_tasks(lab: FinishedLab, clients: Clients) -> dict[int, dict[str, float]]:
    """Mean exact match of the unseen clients by way, for each number of shadow tasks."""
    train, widths = lab.deltas.pairs("train"), lab.deltas.source_layout.widths
    validation = lab.deltas.pairs("validation")
    order = np.random.default_rng(lab.world.seed).permutation([task.name for task in lab.world.shadow_tasks]).tolist()
    unseen, llm = clients.of_sort("unseen"), lab.scorer("target")
    tests, source = [clients.tests[number] for number in unseen], clients.source[unseen]
    found = {}
    for count in NUM_TASKS:
        shown, per_task = set(order[:count]), NUM_RUNS // count
        places = {task: [row for row, name in enumerate(train.tasks) if name == task] for task in shown}
        rows = sorted(row for task in shown for row in places[task][:per_task])
        known = [row for row, name in enumerate(validation.tasks) if name in shown]
        pairs = train.source[rows], train.target[rows]
        held_out = validation.source[known], validation.target[known]
        ways = fit_controls(*pairs, validation=held_out, source_widths=widths)
        del ways["mean_shadow"]
        ways["reduced_rank"] = ReducedRankRegression(source_widths=widths).fit_tasks(
            *pairs, [str(train.tasks[row]) for row in rows]
        )
        deltas = {"mapper": train_mapper_on(lab, rows).generate_deltas(source)}
        deltas |= {name: way.predict(source) for name, way in ways.items()}
        refinements = {}
        shadows = annotator_deltas(pairs[1], [train.tasks[row] for row in rows], DEFAULTS.annotators)
        heard = [clients.heard[number] for number in unseen]
        for name, annotators in (("refined, TinyLM and LLM alone", {}), ("refined", shadows)):
            refined = refine(heard, deltas, clients.student, DEFAULTS, annotators=annotators)
            refinements[name] = torch.stack([each.delta_P for each in refined])
        deltas |= refinements
        found[count] = {
            name: fmean(score_many(llm, [lab.adapter("target", delta_P) for delta_P in values], tests)[0])
            for name, values in deltas.items()
        }
        print(lab.world.seed, count, len(rows), found[count], flush=True)
    return found


def by_steps(lab: FinishedLab, clients: Clients) -> dict[int, dict[str, float]]:
    """Mean exact match by sort of client, for each number of refinement steps."""
    candidates = candidate_deltas(lab.mapper, fit_candidates(lab.deltas), clients.source)
    annotators = shadow_annotators(lab.deltas, DEFAULTS)
    llm, found = lab.scorer("target"), {}
    for rounds, steps in STEPS:
        arguments = replace(DEFAULTS, rounds=rounds, steps=steps)
        refined = refine(clients.heard, candidates, clients.student, arguments, annotators=annotators)
        adapters = [lab.adapter("target", each.delta_P) for each in refined]
        scores, _ = score_many(llm, adapters, clients.tests)
        found[rounds * steps] = {sort: fmean(scores[number] for number in clients.of_sort(sort)) for sort in SORTS}
        print(lab.world.seed, rounds * steps, found[rounds * steps], flush=True)
    return found


def middle(worlds: Sequence[Mapping[int, Mapping[str, float]]]) -> dict[int, dict[str, float]]:
    """Medians over the worlds."""
    return {key: {name: median(world[key][name] for world in worlds) for name in worlds[0][key]} for key in worlds[0]}


def draw(curves: Mapping[int, Mapping[str, float]], path: Path, *, xlabel: str, title: str) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, colour in zip(next(iter(curves.values())), COLOURS, strict=False):
        axes.plot(list(curves), [point[name] for point in curves.values()], color=colour, marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel="exact match, mean over clients", ylim=(-0.03, 1.03), xticks=list(curves))
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", nargs="+", required=True, help="folders of finished demos")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    tasks, steps = [], []
    for folder in args.labs:
        lab = FinishedLab(folder)
        clients = Clients(lab)
        tasks.append(by_number_of_tasks(lab, clients))
        steps.append(by_steps(lab, clients))
    args.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"labs": args.labs, "by_number_of_tasks": tasks, "by_steps": steps}
    tables = []
    for name, worlds, xlabel in (
        ("unseen_by_tasks", tasks, "shadow tasks, at the same number of shadow runs"),
        ("refinement_steps", steps, "steps of refinement"),
    ):
        curves = middle(worlds)
        few, many = curves[min(curves)], curves[max(curves)]
        main_line = "refined" if "refined" in many else "unseen"
        among = "one world" if len(worlds) == 1 else f"median of {len(worlds)} worlds"
        title = f"{main_line}: {few[main_line]:.2f} to {many[main_line]:.2f} ({among})"
        draw(curves, args.output / f"{name}.png", xlabel=xlabel, title=title)
        tables.append(markdown([xlabel, *many], [[key, *values.values()] for key, values in curves.items()]))
    write_result(args.output, "generalisation", result, "\n\n".join(tables))


if __name__ == "__main__":
    main()

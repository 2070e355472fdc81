"""Settings of generation and refinement, chosen on shadow tasks that are left out, without any client or unseen task.

    grad-transformer demo --output_dir lab_seeds/seed-0 --preset full --seed 0
    python -m benchmarks.left_out_tasks --labs lab_seeds/seed-0 lab_seeds/seed-1 --output results

Six of the 28 shadow tasks are taken out of a demo's delta dataset, mapper and regressions are fitted on the rest,
and the fine-tunes of the six tasks play the unseen clients. Held-out runs of the other tasks play the seen ones, and
mixtures, small and skewed clients are drawn from them anew. Test rows come from the inputs that clients train on, not
from those that they are scored on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.lab import FinishedLab, markdown, score_many, train_mapper_on, write_result
from grad_transformer.evaluation.controls import fit_controls
from grad_transformer.evaluation.reduced_rank import ReducedRankRegression
from grad_transformer.lab.inputs import NUM_DIGITS
from grad_transformer.refinement import (
    Completions,
    Refinement,
    RefinementArguments,
    annotator_deltas,
    complete_clients,
    public_weak_to_strong,
    refine,
)


KINDS = ("left out", "seen", "mixture", "small", "skewed")
DEFAULTS = RefinementArguments(max_new_tokens=NUM_DIGITS + 1)
# name: (changes of the defaults, candidates)
SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "default": ({}, ()),
    "from the mapper alone": ({}, ("mapper",)),
    "from ridge alone": ({}, ("ridge",)),
    "8 shadows asked": ({"annotators": 8}, ()),
    "TinyLM and LLM": ({"annotators": 0}, ()),
    "TinyLM alone": ({"annotators": 0, "second_witness": False}, ()),
    "TinyLM alone, every token alike": ({"annotators": 0, "second_witness": False, "certainty_power": 0.0}, ()),
    "every token alike": ({"certainty_power": 0.0}, ()),
    "covered clients too": ({"covered_agreement": 9.0}, ()),
    "1 round": ({"rounds": 1}, ()),
    "3 rounds": ({"rounds": 3}, ()),
    "40 steps": ({"steps": 40}, ()),
    "256 prompts": ({"num_prompts": 256}, ()),
}


class LeftOut:
    """One world without six of its shadow tasks."""

    def __init__(self, folder: str, num_left_out: int):
        self.lab = lab = FinishedLab(folder)
        world = lab.world
        rng = np.random.default_rng(100 * world.seed)
        names = [task.name for task in world.shadow_tasks]
        left_out = set(rng.permutation(names)[:num_left_out].tolist())
        train, test = lab.deltas.pairs("train"), lab.deltas.pairs("test")
        kept = torch.tensor([task not in left_out for task in train.tasks])
        self.source, self.target = train.source[kept], train.target[kept]
        self.tasks = [task for task in train.tasks if task not in left_out]
        self.kept_rows = kept.nonzero()[:, 0].tolist()
        self.validation = self._without(lab.deltas.pairs("validation"), left_out)
        self.kinds: list[str] = []
        self.tests: list[list[dict[str, str]]] = []
        sources, targets = [], []
        for task in sorted(left_out):
            for row in [row for row, name in enumerate(train.tasks) if name == task][:2]:
                self._add("left out", world.task_rows(task, 256, seed=(777, row)))
                sources.append(train.source[row])
                targets.append(train.target[row])
        known = [row for row, name in enumerate(test.tasks) if name not in left_out]
        for row in rng.permutation(known)[:12].tolist():
            self._add("seen", world.task_rows(str(test.tasks[row]), 256, seed=(778, row)))
            sources.append(test.source[row])
            targets.append(test.target[row])
        fresh = self._draw_clients(rng, [name for name in names if name not in left_out])
        fine_tuned = [lab.fine_tune(role, fresh) for role in ("source", "target")]
        self.clients_source = torch.cat([torch.stack(sources), fine_tuned[0]])
        self.clients_target = torch.cat([torch.stack(targets), fine_tuned[1]])

    def _add(self, kind: str, rows: list[dict[str, str]]) -> None:
        self.kinds.append(kind)
        self.tests.append(rows)

    def _draw_clients(self, rng: np.random.Generator, names: list[str]) -> list[list[dict[str, str]]]:
        """Training rows, from the public inputs, of six mixtures, four small and four skewed clients."""
        world, trains = self.lab.world, []
        for number in range(6):
            parts = rng.choice(names, size=3, replace=False).tolist()
            weights = dict(zip(parts, rng.dirichlet(np.ones(3)).tolist(), strict=True))
            trains.append(world.mixture_rows(weights, 256, seed=(888, number), split="public"))
            self._add("mixture", world.mixture_rows(weights, 256, seed=(889, number), split="private"))
        for number in range(4):
            task = str(rng.choice(names))
            trains.append(world.task_rows(task, world.preset.small_rows, seed=(890, number), split="public"))
            self._add("small", world.task_rows(task, 256, seed=(891, number)))
        for number in range(4):
            task, skew = str(rng.choice(names)), {"skew": True, "skew_seed": (5, number)}
            trains.append(world.task_rows(task, 256, seed=(892, number), split="public", **skew))  # type: ignore[arg-type]
            self._add("skewed", world.task_rows(task, 256, seed=(893, number), **skew))  # type: ignore[arg-type]
        return trains

    @staticmethod
    def _without(pairs: Any, left_out: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.tensor([task not in left_out for task in pairs.tasks])
        return pairs.source[kept], pairs.target[kept]

    def candidates(self) -> dict[str, torch.Tensor]:
        """LLM deltas of all clients, by the way they were made; everything is fitted without the left-out tasks."""
        widths = self.lab.deltas.source_layout.widths
        fitted = fit_controls(self.source, self.target, validation=self.validation, source_widths=widths)
        fitted["reduced_rank"] = ReducedRankRegression(source_widths=widths).fit_tasks(
            self.source, self.target, self.tasks
        )
        deltas = {"mapper": train_mapper_on(self.lab, self.kept_rows).generate_deltas(self.clients_source)}
        return deltas | {name: each.predict(self.clients_source) for name, each in fitted.items()}


def measure(folder: str, num_left_out: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Exact match by kind, and the mixtures' negative log-likelihood, for every way and setting."""
    world = LeftOut(folder, num_left_out)
    lab = world.lab
    scorers = {role: lab.scorer(role) for role in ("source", "target")}
    results: dict[str, dict[str, Any]] = {}

    def record(name: str, role: str, deltas: torch.Tensor, seconds: float | None = None) -> None:
        scores, nll = score_many(scorers[role], [lab.adapter(role, delta_P) for delta_P in deltas], world.tests)
        by_kind = {
            kind: float(np.mean([s for s, k in zip(scores, world.kinds, strict=True) if k == kind])) for kind in KINDS
        }
        mixtures = [value for value, kind in zip(nll, world.kinds, strict=True) if kind == "mixture"]
        results[name] = {**by_kind, "mixture NLL": float(np.mean(mixtures)), "s a client": seconds}
        print(
            lab.world.seed, name, {key: value and round(value, 3) for key, value in results[name].items()}, flush=True
        )

    record("TinyLM", "source", world.clients_source)
    record("LLM fine-tuned", "target", world.clients_target)
    candidates = world.candidates()
    for name, deltas in candidates.items():
        record(name, "target", deltas)
    del candidates["mean_shadow"]
    ask, student = lab.witnesses()
    clients = [lab.adapter("source", delta_P) for delta_P in world.clients_source]
    public = lab.world.public_rows(64)
    heard: dict[int, tuple[list[Completions], float]] = {}

    def timed(work: Callable[[list[Completions]], list[Refinement]], prompts: int) -> tuple[list[Refinement], float]:
        if prompts not in heard:
            started = time.perf_counter()
            said = complete_clients(clients, public, ask, replace(DEFAULTS, num_prompts=prompts))
            heard[prompts] = (said, time.perf_counter() - started)
        started = time.perf_counter()
        found = work(heard[prompts][0])
        return found, (time.perf_counter() - started + heard[prompts][1]) / len(clients)

    for name in names:
        changes, chosen = SETTINGS[name]
        arguments = replace(DEFAULTS, **changes)
        pool = {key: value for key, value in candidates.items() if not chosen or key in chosen}
        annotators = annotator_deltas(world.target, world.tasks, arguments.annotators)
        work = partial(refine, candidates=pool, student=student, arguments=arguments, annotators=annotators)
        found, seconds = timed(work, arguments.num_prompts)
        if name == "default":
            record("best candidate", "target", torch.stack([each.candidate_delta_P for each in found]))
        record(f"refined, {name}", "target", torch.stack([each.delta_P for each in found]), seconds)
    found, seconds = timed(lambda said: public_weak_to_strong(said, student, DEFAULTS), DEFAULTS.num_prompts)
    record("weak-to-strong on the prompts, from the root", "target", torch.stack([e.delta_P for e in found]), seconds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", nargs="+", required=True, help="folders of finished demos")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--left_out", type=int, default=6, help="shadow tasks to leave out")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    worlds = {folder: measure(folder, args.left_out, args.settings) for folder in args.labs}
    names = list(next(iter(worlds.values())))
    columns = [*KINDS, "mixture NLL", "s a client"]
    rows = []
    for name in names:
        cells = []
        for column in columns:
            values = [results[name][column] for results in worlds.values()]
            known = [value for value in values if value is not None]
            cells.append(f"{median(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-")
        rows.append([name, *cells])
    write_result(args.output, "left_out_tasks", {"worlds": worlds}, markdown(["way", *columns], rows))


if __name__ == "__main__":
    main()

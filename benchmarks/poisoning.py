"""One of five clients lies: what each aggregation makes of it, before and after the mapper.

    grad-transformer demo --output_dir demo_output --preset quick
    python -m benchmarks.poisoning --lab demo_output --output results

Five clients of one seen task, averaged over several tasks; one sends its delta with the sign flipped, scaled
by 100, or a random delta of the same norm. Deltas go to the aggregation directly: the reader refuses a delta scaled by
100 for its norm. The score is the exact match of the generated LLM.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab import FinishedLab, exact_match_of, markdown, write_result
from grad_transformer.adapters import AGGREGATIONS, aggregate_from_root
from grad_transformer.evaluation.controls import random_delta_like


RULES = [name for name in AGGREGATIONS if name not in ("weighted", "sum")]
ATTACKS = ("none", "sign_flip", "sign_flip_x10", "scale_100", "random", "random_x10")


def poisoned(deltas_NP: torch.Tensor, attack: str) -> torch.Tensor:
    """The deltas with the first client's replaced by what it sends."""
    bad = deltas_NP[0]
    sent = {
        "none": bad,
        "sign_flip": -bad,
        "sign_flip_x10": -10 * bad,
        "scale_100": 100 * bad,
        "random": random_delta_like(bad, 0),
        "random_x10": 10 * random_delta_like(bad, 0),
    }
    return torch.cat([sent[attack][None], deltas_NP[1:]])


def aggregated(lab: FinishedLab, deltas_NP: torch.Tensor, rule: str, order: str, reference_P: torch.Tensor) -> Any:
    """The LLM's delta."""
    tokenizer = lab.source
    if order == "map_first":
        tokenizer, deltas_NP = lab.target, lab.mapper.generate_deltas(deltas_NP)
        reference_P = lab.mapper.generate_deltas(reference_P[None])[0]
    arguments: dict[str, Any] = {"num_dishonest": 1} if rule in ("trimmed_mean", "krum", "multi_krum") else {}
    arguments |= {"reference_P": reference_P} if rule == "fltrust" else {}
    delta_P, _ = aggregate_from_root(deltas_NP, tokenizer.root, aggregation=rule, **arguments)  # type: ignore[arg-type]
    return delta_P if order == "map_first" else lab.mapper.generate_deltas(delta_P[None])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--clients", type=int, default=5)
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    tasks = [task.name for task in lab.world.shadow_tasks][:: max(1, 28 // args.tasks)][: args.tasks]
    many = [lab.rows(task, 256, seed) for task in tasks for seed in range(args.clients)]
    public = [lab.rows(task, 256, 99, "public") for task in tasks]
    source = lab.fine_tune("source", [*many, *public])
    references = source[len(many) :]
    scorer = lab.scorer("target")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for order in ("aggregate_first", "map_first"):
        result[order] = {}
        for rule in RULES:
            scores = {}
            for attack in ATTACKS:
                values = []
                for index, task in enumerate(tasks):
                    honest = source[index * args.clients : (index + 1) * args.clients]
                    delta_P = aggregated(lab, poisoned(honest, attack), rule, order, references[index])
                    rows = lab.rows(task, 128, 0, "test")
                    values.append(exact_match_of(scorer, lab.adapter("target", delta_P), rows))
                scores[attack] = sum(values) / len(values)
            result[order][rule] = scores
            print(order, rule, scores, flush=True)
    table = markdown(
        ["order", "aggregation", *ATTACKS],
        [[order, rule, *scores.values()] for order, rules in result.items() for rule, scores in rules.items()],
    )
    write_result(args.output, "poisoning", {"tasks": tasks, "clients": args.clients, "exact_match": result}, table)


if __name__ == "__main__":
    main()

"""1 to 20 clients in one adapter: TinyLM each, generated jointly and singly, ceiling; same task, several, mixtures.

    grad-transformer demo --output_dir demo_output --preset quick
    python -m benchmarks.many_clients --lab demo_output --output results

- `same task`: all clients have one seen task, each 256 rows of its own.
- `one task each`: every client has a seen task of its own, and is scored on it.
- `mixtures`: every client has a Dirichlet(1) mixture of the same three seen tasks; scored on its own mixture.

Jointly: the mean of all deltas, mapped once. Jointly, mapped first: the mean of mapped deltas. Singly: each client's
own adapter. Ceiling: the LLM fine-tuned on the client's own rows. Scores are exact match, the mean over clients.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab import FinishedLab, exact_match_of, markdown, write_result


HEADERS = ("TinyLM each", "jointly", "jointly, mapped first", "jointly, exact mean", "singly", "ceiling")


def clients_of(lab: FinishedLab, kind: str, count: int) -> tuple[list[Any], list[Any]]:
    """Training and test rows of `count` clients."""
    seen = [task.name for task in lab.world.shadow_tasks]
    if kind == "mixtures":
        rng = np.random.default_rng(77)
        weights = [dict(zip(seen[5:26:10], rng.dirichlet(np.ones(3)).tolist(), strict=True)) for _ in range(count)]
        train = [lab.world.mixture_rows(weight, 256, seed=(31, index)) for index, weight in enumerate(weights)]
        test = [lab.world.mixture_rows(w, 64, seed=(32, i), split="test") for i, w in enumerate(weights)]
        return train, test
    tasks = [seen[5]] * count if kind == "same task" else [seen[(5 * index) % 28] for index in range(count)]
    train = [lab.rows(task, 256, 4000 + index) for index, task in enumerate(tasks)]
    return train, [lab.rows(task, 64, 5000 + index, "test") for index, task in enumerate(tasks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    tinylm, llm = lab.scorer("source"), lab.scorer("target")
    result: dict[str, dict[int, dict[str, float]]] = {}
    for kind in ("same task", "one task each", "mixtures"):
        train, test = clients_of(lab, kind, max(args.counts))
        source, ceiling = lab.fine_tune("source", train), lab.fine_tune("target", train)
        single = lab.mapper.generate_deltas(source)

        def mean_of(deltas_CP: torch.Tensor, role: str = "target", test: list[Any] = test) -> list[float]:
            scorer = llm if role == "target" else tinylm
            pairs = zip(deltas_CP, test, strict=False)
            return [exact_match_of(scorer, lab.adapter(role, delta_P), rows) for delta_P, rows in pairs]

        alone = {
            "TinyLM each": mean_of(source, "source"),
            "singly": mean_of(single),
            "ceiling": mean_of(ceiling),
        }
        result[kind] = {}
        for count in args.counts:
            adapters = [lab.adapter("source", delta_P) for delta_P in source[:count]]
            joint = {
                "jointly": lab.mapper.generate_adapter(adapters),
                "jointly, mapped first": lab.mapper.generate_adapter(adapters, order="map_first"),
                "jointly, exact mean": lab.mapper.generate_adapter(adapters, aggregation="exact_mean"),
            }
            scores = {name: statistics.mean(values[:count]) for name, values in alone.items()}
            for name, adapter in joint.items():
                scores[name] = statistics.mean(exact_match_of(llm, adapter, rows) for rows in test[:count])
            result[kind][count] = scores
            print(kind, count, scores, flush=True)
    table = markdown(
        ["clients", "number", *HEADERS],
        [
            [kind, count, *(scores[name] for name in HEADERS)]
            for kind, counts in result.items()
            for count, scores in counts.items()
        ],
    )
    write_result(args.output, "many_clients", result, table)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

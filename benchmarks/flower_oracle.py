"""Krum, Multi-Krum, trimmed mean and median against Flower's own, on random deltas with and without a liar.

    pip install flwr
    python -m benchmarks.flower_oracle

Prints the largest difference found. Flower is no dependency of the tests: it brings forty packages.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg

from grad_transformer import aggregate_deltas


def largest_differences(trials: int) -> dict[str, float]:
    """Largest absolute difference of each rule over `trials` sets of 5 to 12 deltas."""
    worst = dict.fromkeys(("krum", "multi_krum", "trimmed_mean", "median"), 0.0)
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        count = int(rng.integers(5, 13))
        dishonest = int(rng.integers(1, (count - 3) // 2 + 1))
        deltas = rng.normal(size=(count, 50))
        if trial % 2:
            deltas[:dishonest] *= 100
        results = [([row], 1) for row in deltas]
        theirs = {
            "krum": aggregate_krum(results, dishonest, 0),
            "multi_krum": aggregate_krum(results, dishonest, count - dishonest),
            "trimmed_mean": aggregate_trimmed_avg(results, (dishonest + 0.5) / count),
            "median": aggregate_median(results),
        }
        for rule, expected in theirs.items():
            arguments = {} if rule == "median" else {"num_dishonest": dishonest}
            ours = aggregate_deltas(torch.from_numpy(deltas), aggregation=rule, **arguments)  # type: ignore[arg-type]
            worst[rule] = max(worst[rule], float(np.abs(ours.numpy() - expected[0]).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    args = parser.parse_args()
    print(json.dumps({"trials": args.trials, "largest_difference": largest_differences(args.trials)}, indent=2))


if __name__ == "__main__":
    main()

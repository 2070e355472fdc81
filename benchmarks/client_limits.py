"""Whom do the limits of `generate` refuse? Honest clients of many sorts, other recipes, and attacks.

grad-transformer demo --output_dir demo_output --preset quick
python -m benchmarks.client_limits --lab demo_output --output results
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab import FinishedLab, markdown, write_result
from grad_transformer.adapters import ShiftReference
from grad_transformer.constants import MAXIMUM_SHIFT, MAXIMUM_SIZE


RECIPES: dict[str, dict[str, Any]] = {
    "half the steps": {"max_steps": 60},
    "twice the steps": {"max_steps": 240},
    "cosine schedule": {"lr_scheduler_type": "cosine"},
    "batches of 4": {"per_device_batch_size": 4},
    "twice the learning rate": {"learning_rate": 6e-2},
    "four times the learning rate": {"learning_rate": 0.12},
    "Adam's epsilon 1e-8": {"adam_epsilon": 1e-8},
}


def honest(lab: FinishedLab) -> dict[str, torch.Tensor]:
    """Deltas by sort of client."""
    seen = [task.name for task in lab.world.shadow_tasks]
    unseen = [task.name for task in lab.world.held_out_tasks]
    rows = {
        "seen tasks": [lab.rows(task, 256, 3000 + number) for number, task in enumerate(seen)],
        "unseen tasks": [lab.rows(task, 256, 4000 + number) for number, task in enumerate(unseen * 3)],
        "48 rows": [lab.rows(task, 48, 5000 + number) for number, task in enumerate(seen)],
        "12 rows": [lab.rows(task, 12, 5500 + number) for number, task in enumerate(seen[::2])],
        "mixtures of two tasks": [
            lab.rows(first, 128, 6000 + number) + lab.rows(second, 128, 6500 + number)
            for number, (first, second) in enumerate(zip(seen[:14], reversed(seen), strict=False))
        ],
    }
    deltas = {name: lab.fine_tune("source", many) for name, many in rows.items()}
    some = [lab.rows(task, 256, 9000 + number) for number, task in enumerate(seen[::3])]
    return deltas | {name: lab.fine_tune("source", some, **recipe) for name, recipe in RECIPES.items()}


def attacks(lab: FinishedLab, delta_P: torch.Tensor, usual: float) -> dict[str, torch.Tensor]:
    """What a client can make of an honest delta."""
    layout = lab.source.layout
    of_b_P = layout.flatten(
        {spec.key: torch.full(spec.shape, float(spec.side == "B")) for spec in layout.tensor_specs()}
    )
    b_P = delta_P * of_b_P
    block_P = b_P.clone()
    block_P[layout.widths[0] :] = 0
    return {
        "three times as long": 3 * delta_P,
        "B alone, twice the usual norm": delta_P + 2 * usual * b_P / b_P.norm(),
        "B alone, 25 times the usual norm": delta_P + 25 * usual * b_P / b_P.norm(),
        "one block's B, five times the usual norm": delta_P + 5 * usual * block_P / block_P.norm(),
        "sign flipped": -delta_P,
        "random": torch.randn(len(delta_P), generator=torch.Generator().manual_seed(0)) * usual / len(delta_P) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    held_out = lab.deltas.pairs(*(name for name in lab.deltas.splits if name != "train")).source
    reference = ShiftReference.fit(lab.deltas.pairs("train").source, held_out, layout=lab.source.layout)
    usual = float(reference.tensors["usual_norms"].norm())
    sorts = {"held-out shadow runs": held_out, **honest(lab)}
    sorts |= {f"attack: {name}": sent[None] for name, sent in attacks(lab, sorts["seen tasks"][3], usual).items()}
    table = []
    for name, deltas_NP in sorts.items():
        found = [(report.shift, report.size or 0.0) for report in reference.measure(deltas_NP)]
        refused = sum(shift > MAXIMUM_SHIFT or size > MAXIMUM_SIZE for shift, size in found)
        table.append([name, len(found), max(shift for shift, _ in found), max(size for _, size in found), refused])
    headers = ["clients", "n", "largest shift", "largest size", "refused"]
    result = {str(row[0]): dict(zip(headers[1:], row[1:], strict=True)) for row in table}
    write_result(args.output, "client_limits", result, markdown(headers, table))


if __name__ == "__main__":
    main()

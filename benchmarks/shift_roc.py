"""Does the shift report tell clients whose task no shadow shows? ROC on the lab's seen and unseen tasks.

grad-transformer demo --output_dir demo_output --preset quick
python -m benchmarks.shift_roc --lab demo_output --output results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.lab import FinishedLab, markdown, write_result
from grad_transformer.adapters.shift import ShiftReference, area_under_roc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seen_clients", type=int, default=2, help="for each of the 28 seen tasks")
    parser.add_argument("--unseen_clients", type=int, default=5, help="for each of the 8 unseen tasks")
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    tasks = {
        "seen": [task.name for task in lab.world.shadow_tasks for _ in range(args.seen_clients)],
        "unseen": [task.name for task in lab.world.held_out_tasks for _ in range(args.unseen_clients)],
    }
    rows = [lab.rows(task, 256, 3000 + index) for index, task in enumerate([*tasks["seen"], *tasks["unseen"]])]
    deltas = lab.fine_tune("source", rows)
    held_out = lab.deltas.pairs(*(name for name in lab.deltas.splits if name != "train")).source
    reference = ShiftReference.fit(lab.deltas.pairs("train").source, held_out, layout=lab.source.layout)
    reports = reference.measure(deltas)
    seen, unseen = reports[: len(tasks["seen"])], reports[len(tasks["seen"]) :]
    figures = {}
    for name in ("shift", "mahalanobis"):
        inside, outside = ([getattr(report, name) for report in part] for part in (seen, unseen))
        cut = sorted(inside)[int(0.95 * (len(inside) - 1))]
        figures[name] = {
            "auc": area_under_roc(inside, outside),
            "unseen_caught_at_5_percent_false_alarms": sum(value > cut for value in outside) / len(outside),
            "seen": inside,
            "unseen": outside,
        }
    at_one = [sum(report.shift > 1 for report in part) / len(part) for part in (seen, unseen)]
    table = markdown(
        ["measure", "AUC", "unseen caught at 5 % false alarms", "median seen", "median unseen"],
        [
            [
                name,
                figure["auc"],
                figure["unseen_caught_at_5_percent_false_alarms"],
                float(torch.tensor(figure["seen"]).median()),
                float(torch.tensor(figure["unseen"]).median()),
            ]
            for name, figure in figures.items()
        ],
    )
    table += f"\n\n--max_shift 1 refuses {at_one[0]:.1%} of seen and {at_one[1]:.1%} of unseen clients."
    write_result(args.output, "shift_roc", {**figures, "refused_at_1": at_one}, table)
    figure, axes = plt.subplots(figsize=(4.4, 4.2), layout="constrained")
    for name, values in figures.items():
        cuts = sorted([*values["seen"], *values["unseen"]], reverse=True)
        alarms = [[sum(value >= cut for value in values[part]) / len(values[part]) for cut in cuts] for part in tasks]
        axes.plot([0, *alarms[0]], [0, *alarms[1]], label=f"{name}, AUC {values['auc']:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(xlabel="seen clients refused", ylabel="unseen clients refused")
    axes.legend(frameon=False)
    figure.savefig(args.output / "shift_roc.png", dpi=150)


if __name__ == "__main__":
    main()

"""Epsilon against scores: TinyLM, LLM generated with and without noise in training, and refined; controls, ceiling.

    grad-transformer demo --output_dir demo_output --preset quick
    python -m benchmarks.privacy_curve --lab demo_output --output results

Each client fine-tunes the TinyLM on its own rows with DP-SGD, once for each epsilon; infinity is the ordinary
fine-tune of the same rows and steps. Two mappers are trained on the demo's pairs, without and with noise on their
source deltas (`--source_noise`). *Refined*: the best of the candidates, refined on public prompts. Ceiling: the LLM
fine-tuned on the same rows without privacy.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.lab import FinishedLab, exact_match_of, markdown, score_many, write_result
from grad_transformer import GradTransformer
from grad_transformer.client import finetune_client
from grad_transformer.client.mechanism import plan_noise
from grad_transformer.client.private import PrivacyArguments, finetune_client_privately
from grad_transformer.finetuning import FineTuningRecipe
from grad_transformer.lab.inputs import NUM_DIGITS
from grad_transformer.refinement import (
    RefinementArguments,
    candidate_deltas,
    complete_clients,
    fit_candidates,
    refine,
    shadow_annotators,
)
from grad_transformer.scripts._training import train
from grad_transformer.training import GradTransformerTrainingArguments, MapperArguments


EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, float("inf"))

DEFAULTS = RefinementArguments(max_new_tokens=NUM_DIGITS + 1)


def noisy_mapper(lab: FinishedLab, folder: Path, source_noise: float) -> GradTransformer:
    """A mapper like the demo's, trained with noise on its source deltas."""
    preset = lab.world.preset
    if not (folder / "heldout.json").is_file():
        every = max(preset.mapper_steps // 12, 1)
        train(
            lab.folder / "delta_dataset",
            MapperArguments(d_model=preset.mapper_d_model, d_ff=preset.mapper_d_ff, num_layers=preset.mapper_layers),
            GradTransformerTrainingArguments(
                output_dir=str(folder),
                max_steps=preset.mapper_steps,
                learning_rate=preset.mapper_learning_rate,
                per_device_train_batch_size=preset.mapper_batch_size,
                warmup_steps=every // 2,
                eval_strategy="steps",
                save_strategy="steps",
                eval_steps=every,
                save_steps=every,
                save_total_limit=1,
                source_noise=source_noise,
            ),
        )
    return GradTransformer.from_pretrained(folder)


def private_deltas(lab: FinishedLab, clients: list[list[Any]], args: argparse.Namespace) -> dict[float, Any]:
    """TinyLM deltas of all clients for each epsilon, and the epsilon that was really spent."""
    recipe = FineTuningRecipe.from_dict(lab.source.recipe or {})
    found = {}
    for epsilon in EPSILONS:
        deltas, spent = [], []
        private = epsilon < float("inf")
        privacy, noise = None, 0.0
        if private:
            privacy = PrivacyArguments(
                epsilon=epsilon, delta=args.delta, max_grad_norm=args.max_grad_norm, batch_size=args.batch_size
            )
            noise = plan_noise(privacy, args.rows, recipe.max_steps).noise_multiplier
        for index, rows in enumerate(clients):
            folder = args.output / "clients" / f"{epsilon}-{index}"
            if privacy is not None:
                adapter, _, statement = finetune_client_privately(
                    lab.source, rows, folder, privacy=privacy, physical_batch_size=args.batch_size, accept_recipe=True
                )
                assert statement is not None
                spent.append(statement.epsilon)
            else:
                larger = recipe.replace(per_device_batch_size=args.batch_size)
                adapter, _ = finetune_client(lab.source, rows, folder, recipe=larger)
            deltas.append(lab.source.delta(adapter))
        found[epsilon] = {"deltas": torch.stack(deltas), "spent": spent, "noise_multiplier": noise}
        print(f"epsilon {epsilon}: noise multiplier {noise:.3f}", flush=True)
    return found


def draw(curves: dict[str, list[float]], path: Path) -> None:
    names = [f"{epsilon:g}" for epsilon in EPSILONS[:-1]] + ["∞"]
    figure, axes = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
    for name, values in curves.items():
        style = "--" if name in ("ceiling", "mean shadow") else "-"
        axes.plot(names, values, style, marker="o", markersize=4, label=name)
    axes.set(xlabel="epsilon of the client (delta 1e-5)", ylabel="exact match, mean over clients", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside center right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--clients", type=int, default=4, help="clients, each of another seen task")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--source_noise", type=float, default=2.0)
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    tasks = [task.name for task in lab.world.shadow_tasks][3 :: max(1, 28 // args.clients)][: args.clients]
    clients = [lab.rows(task, args.rows, 500 + index) for index, task in enumerate(tasks)]
    tests = [lab.rows(task, 192, 900 + index, "test") for index, task in enumerate(tasks)]
    mappers = {
        "generated": lab.mapper,
        "generated, noise in training": noisy_mapper(lab, args.output / "mapper_noise", args.source_noise),
    }
    tinylm, llm = lab.scorer("source"), lab.scorer("target")
    ask, student = lab.witnesses()
    predictors, public = fit_candidates(lab.deltas), lab.world.public_rows(64)
    by_epsilon = private_deltas(lab, clients, args)
    ceilings = lab.fine_tune("target", [rows[:256] for rows in clients])
    fixed = {
        "mean shadow": [exact_match_of(llm, lab.adapter("target", lab.mean_shadow()), rows) for rows in tests],
        "ceiling": [
            exact_match_of(llm, lab.adapter("target", delta_P), rows)
            for delta_P, rows in zip(ceilings, tests, strict=True)
        ],
    }
    curves: dict[str, list[float]] = {name: [] for name in ("TinyLM", *mappers, "refined", *fixed)}
    for found in by_epsilon.values():
        deltas = found.pop("deltas")
        scores = {
            "TinyLM": [
                exact_match_of(tinylm, lab.adapter("source", delta_P), rows)
                for delta_P, rows in zip(deltas, tests, strict=True)
            ]
        }
        for name, mapper in mappers.items():
            generated = mapper.generate_deltas(deltas)
            scores[name] = [
                exact_match_of(llm, lab.adapter("target", delta_P), rows)
                for delta_P, rows in zip(generated, tests, strict=True)
            ]
        candidates = candidate_deltas(mappers["generated, noise in training"], predictors, deltas)
        heard = complete_clients([lab.adapter("source", delta_P) for delta_P in deltas], public, ask, DEFAULTS)
        refined = refine(heard, candidates, student, DEFAULTS, annotators=shadow_annotators(lab.deltas, DEFAULTS))
        adapters = [lab.adapter("target", each.delta_P) for each in refined]
        scores["refined"] = score_many(llm, adapters, tests)[0]
        found["scores"] = {**scores, **fixed}
        for name, values in found["scores"].items():
            curves[name].append(statistics.mean(values))
    table = markdown(
        ["epsilon", "spent", "noise multiplier", *curves],
        [
            [f"{epsilon:g}", max(found["spent"], default=float("inf")), found["noise_multiplier"]]
            + [values[index] for values in curves.values()]
            for index, (epsilon, found) in enumerate(by_epsilon.items())
        ],
    )
    result = {"tasks": tasks, "settings": {name: str(value) for name, value in vars(args).items()}}
    result["epsilons"] = {f"{epsilon:g}": found for epsilon, found in by_epsilon.items()}
    write_result(args.output, "privacy_curve", result, table)
    draw(curves, args.output / "privacy_curve.png")


if __name__ == "__main__":
    main()

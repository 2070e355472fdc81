"""DP-SGD's figures: per-example gradients, noise variance, epsilon; each beside an independent computation.

    pip install dp-accounting
    python -m benchmarks.dp_proofs --lab demo_output --output results

- Gradients: the clipped sum on the lab's TinyLM, with hooks and ghost clipping and for several splits into physical
  batches, against a loop of single-example backward passes; largest difference over the norm of the sum.
- Noise: empty Poisson batches through the trainer's step; measured over nominal variance.
- Epsilon: ours against Opacus's own call and against dp-accounting's privacy loss distributions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import dp_accounting
import torch
from dp_accounting.pld import pld_privacy_accountant
from opacus.accountants import PRVAccountant

from benchmarks.lab import FinishedLab, markdown, write_result
from grad_transformer.client.mechanism import PerExampleClipping, epsilon_of
from grad_transformer.client.trainer import PrivacyArguments, PrivateSFTTrainer, example_losses
from grad_transformer.finetuning import FineTuningRecipe, attach_root, check_rows, load_base, tokenize_rows


def make_trainer(lab: FinishedLab, rows: Any, physical: int, privacy: PrivacyArguments) -> PrivateSFTTrainer:
    model, tokenizer = load_base(lab.source.root.base_model)
    peft_model = attach_root(model, lab.source.root)
    recipe = FineTuningRecipe(max_steps=4, warmup_steps=0, max_length=32)
    args = recipe.to_sft_config(
        tempfile.mkdtemp(),
        seed=0,
        per_device_train_batch_size=physical,
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
    )
    trainer = PrivateSFTTrainer(
        peft_model,
        args,
        train_dataset=tokenize_rows(check_rows(rows), tokenizer, 32),
        processing_class=tokenizer,
        privacy=privacy,
    )
    trainer._clipping = PerExampleClipping(peft_model, mode=privacy.gradients, max_grad_norm=privacy.max_grad_norm)
    peft_model.enable_input_require_grads()
    trainer.create_optimizer()
    return trainer


def gradient_of_step(trainer: PrivateSFTTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.training_step(trainer.model, batch)
    trainer._private_optimizer.pre_step()
    return torch.cat([p.grad.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])


def gradients(lab: FinishedLab, rows: Any) -> list[list[Any]]:
    found = []
    for mode in ("hooks", "ghost"):
        for max_norm in (0.1, 1e6):
            for physical in (1, 5, 32):
                privacy = PrivacyArguments(
                    delta=1e-5,
                    noise_multiplier=0.0,
                    max_grad_norm=max_norm,
                    batch_size=32,
                    gradients=mode,
                    known_seed=0,
                )
                trainer = make_trainer(lab, rows, physical, privacy)
                batch = trainer._collate([trainer._units[index] for index in range(len(rows))])
                ours = gradient_of_step(trainer, dict(batch)) * trainer.noise.expected_batch_size
                trainer._clipping.remove()
                parameters = [p for p in trainer.model.parameters() if p.requires_grad]
                expected = torch.zeros_like(ours)
                for index in range(len(rows)):
                    example = {name: value[index : index + 1] for name, value in batch.items() if name != "unit"}
                    parts = torch.autograd.grad(example_losses(trainer.model, example).sum(), parameters)
                    gradient = torch.cat([part.flatten() for part in parts])
                    expected += gradient * min(1.0, max_norm / (float(gradient.norm()) + 1e-6))
                found.append([mode, max_norm, physical, f"{float((ours - expected).norm() / expected.norm()):.1e}"])
    return found


def noise(lab: FinishedLab, rows: Any) -> list[list[Any]]:
    found = []
    for mode in ("hooks", "ghost"):
        privacy = PrivacyArguments(delta=1e-5, noise_multiplier=1.7, max_grad_norm=0.3, batch_size=8, gradients=mode)
        trainer = make_trainer(lab, rows, 8, privacy)
        empty = trainer._collate([])
        values = torch.cat([gradient_of_step(trainer, dict(empty)) for _ in range(300)]) * 8
        found.append([mode, len(values), float(values.double().var()) / (1.7 * 0.3) ** 2])
    return found


def epsilons() -> list[list[Any]]:
    found = []
    for sigma, rate, steps in ((0.7838, 0.0625, 120), (2.805, 0.0625, 120), (1.1, 0.01, 1000), (0.9, 0.002, 10000)):
        opacus = PRVAccountant()
        opacus.history = [(sigma, rate, steps)]
        independent = pld_privacy_accountant.PLDAccountant()
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        independent.compose(event, steps)
        history = [(sigma, rate, steps)]
        found.append(
            [
                f"noise {sigma}, rate {rate}, {steps} steps",
                epsilon_of(history, 1e-5),
                float(opacus.get_epsilon(1e-5)),
                float(independent.get_epsilon(1e-5)),
                epsilon_of(history, 1e-5, "rdp"),
            ]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    rows = lab.rows(lab.world.shadow_tasks[3].name, 32, 1)
    result = {"gradients": gradients(lab, rows), "noise": noise(lab, rows), "epsilon": epsilons()}
    table = "\n\n".join(
        [
            markdown(["gradients", "clipping norm", "physical batch", "relative difference"], result["gradients"]),
            markdown(["noise", "values", "measured over nominal variance"], result["noise"]),
            markdown(["mechanism", "ours (PRV)", "Opacus", "dp-accounting (PLD)", "Rényi"], result["epsilon"]),
        ]
    )
    write_result(args.output, "dp_proofs", result, table)


if __name__ == "__main__":
    main()

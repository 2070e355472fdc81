"""A one-run audit: how much does an adapter tell of canaries, against the epsilon that it claims?

    grad-transformer demo --output_dir demo_output --preset quick
    python -m benchmarks.audit --lab demo_output --output results

Canaries are rows of the lab with random answers. Each is put among a client's rows with probability 1/2, by a coin of
its own; after one fine-tune the auditor scores every canary by how much its loss fell, and guesses "in" for the upper
quarter and "out" for the lower quarter. From the number of right guesses follows a lower bound on epsilon, with 95 %
confidence (Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run, 2023). The auditor has
the adapter and the base model, no gradients. The adapter is a larger one than the lab's, so that it can memorise.

A bound below the claim does not prove the claim: it fails to refute it. A bound above it refutes it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from scipy.stats import binom

from benchmarks.lab import FinishedLab, markdown, write_result
from grad_transformer import LoraDeltaTokenizer, create_root
from grad_transformer.client import finetune_client
from grad_transformer.client.private import PrivacyArguments, finetune_client_privately
from grad_transformer.client.trainer import example_losses
from grad_transformer.finetuning import (
    FineTuningRecipe,
    attach_root,
    check_rows,
    load_base,
    tokenize_rows,
    write_adapter_tensors,
)


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability of so many right guesses, or more, under (epsilon, delta)-differential privacy."""
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    total = worst = 0.0
    for extra in range(1, right + 1):
        total += float(binom.pmf(right - extra, guesses, chance))
        worst = max(worst, total / extra)
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, *, confidence: float = 0.95) -> float:
    """The largest epsilon that the guesses refute."""
    low, high = 0.0, 30.0
    if p_value(canaries, guesses, right, 0.0, delta) > 1 - confidence:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if p_value(canaries, guesses, right, middle, delta) <= 1 - confidence else (low, middle)
        )
    return low


def make_canaries(lab: FinishedLab, count: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Rows with inputs of their own and random answers."""
    rows = lab.rows(lab.world.shadow_tasks[0].name, count, 7000)
    return [{**row, "completion": "".join(map(str, rng.integers(10, size=6)))} for row in rows]


def losses_of(tokenizer: LoraDeltaTokenizer, adapters: list[Any], rows: list[dict[str, str]]) -> list[torch.Tensor]:
    """Loss of each row under each adapter."""
    model, text_tokenizer = load_base(tokenizer.root.base_model)
    peft_model = attach_root(model, tokenizer.root)
    tokenized = tokenize_rows(check_rows(rows), text_tokenizer, 32)
    ids = torch.tensor(tokenized["input_ids"][:])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(tokenized["labels"][:])}
    losses = []
    for adapter in adapters:
        write_adapter_tensors(peft_model, adapter.tensors)
        with torch.no_grad():
            losses.append(example_losses(peft_model, batch))
    return losses


def guess(gain: torch.Tensor, included: np.ndarray) -> tuple[int, int]:
    """Guesses (half of the canaries) and how many of them are right."""
    order, quarter = gain.argsort().numpy(), len(gain) // 4
    right = int((~included[order[:quarter]]).sum() + included[order[-quarter:]].sum())
    return 2 * quarter, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", required=True, help="folder of a finished demo")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--canaries", type=int, default=160)
    parser.add_argument("--rows", type=int, default=64, help="ordinary rows of the client")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lab = FinishedLab(args.lab)
    rng = np.random.default_rng([args.seed, 55])
    canaries = make_canaries(lab, args.canaries, rng)
    included = rng.random(args.canaries) < 0.5
    ordinary = lab.rows(lab.world.shadow_tasks[0].name, args.rows, 8000)
    rows = [*ordinary, *(row for row, is_in in zip(canaries, included, strict=True) if is_in)]
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM")
    root = create_root(lab.source.root.base_model, lora, output_dir=args.output / "audit_root", seed=0)
    recipe = FineTuningRecipe(
        max_steps=args.steps,
        learning_rate=1e-2,
        per_device_batch_size=64,
        warmup_steps=10,
        max_grad_norm=0,
        max_length=32,
    )
    tokenizer = LoraDeltaTokenizer(root, recipe=recipe.to_dict())
    adapters, claims = [], []
    adapters.append(finetune_client(tokenizer, rows, args.output / "audit" / "plain")[0])
    claims.append(("no privacy", None))
    for epsilon in args.epsilons:
        privacy = PrivacyArguments(epsilon=epsilon, delta=args.delta, max_grad_norm=1.0, batch_size=64)
        adapter, _, statement = finetune_client_privately(
            tokenizer,
            rows,
            args.output / "audit" / f"{epsilon}",
            privacy=privacy,
            physical_batch_size=64,
            accept_recipe=True,
        )
        assert statement is not None
        adapters.append(adapter)
        claims.append((f"DP-SGD, epsilon {epsilon:g}", statement.epsilon))
    before, *after = losses_of(tokenizer, [root.adapter, *adapters], canaries)
    table_rows, result = [], {}
    for (name, claim), losses in zip(claims, after, strict=True):
        guesses, right = guess(before - losses, included)
        bound = epsilon_lower_bound(args.canaries, guesses, right, args.delta)
        result[name] = {"claimed_epsilon": claim, "guesses": guesses, "right": right, "epsilon_lower_bound": bound}
        table_rows.append([name, "-" if claim is None else claim, guesses, right, bound])
    table = markdown(["client", "claimed epsilon", "guesses", "right", "lower bound on epsilon (95 %)"], table_rows)
    write_result(args.output, "audit", {"canaries": args.canaries, "clients": result}, table)


if __name__ == "__main__":
    main()

"""Held-out figures of a mapper. The first number of every report: R² around the mean shadow delta, in raw space.

R² <= 0 means that the mapper does no better than ignoring its input. Beside it stand the ceiling (predicting every
delta by the mean of its task: what fine-tuning noise leaves), and the same R² with the inputs permuted among runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..adapters.statistics import permutation_without_fixed_run, r2_around_mean, task_mean_ceiling
from ..modeling_grad_transformer import GradTransformer


@dataclass(frozen=True)
class HeldoutMetrics:
    """R² of held-out runs around the mean training delta.

    Args:
        r2 (`float`): free-running, as clients get it.
        r2_teacher_forced (`float`): each block predicted from the true blocks before it.
        r2_permuted_inputs (`float`, *optional*): free-running, each run given another run's input; at or below 0 if
            the mapper reads its input. None with fewer than two runs.
        r2_ceiling (`float`, *optional*): of the true task mean; None where tasks are unknown.
        block_mse (`list[float]`): free-running mean squared error of each block over the variance of its true values
            around the mean (0 perfect, 1 the mean shadow).
    """

    r2: float
    r2_teacher_forced: float
    r2_permuted_inputs: float | None
    r2_ceiling: float | None
    block_mse: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_heldout(
    model: GradTransformer,
    source_NP: torch.Tensor,
    target_NP: torch.Tensor,
    run_ids: Sequence[str],
    *,
    tasks: Sequence[str | None] | None = None,
    train_target_NP: torch.Tensor | None = None,
    train_tasks: Sequence[str | None] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> HeldoutMetrics:
    """Measure a mapper on pairs of runs that it was not trained on.

    Args:
        model ([`GradTransformer`]): with both tokenizers, fitted on the training runs.
        source_NP (`torch.Tensor` of shape `(N, numel_source)`), target_NP (`(N, numel_target)`): raw held-out deltas.
        run_ids (`Sequence[str]`): shadow run of each pair; inputs are permuted among runs.
        tasks, train_target_NP, train_tasks (*optional*): what the ceiling needs.
        batch_size (`int`, *optional*, defaults to 64).
        seed (`int`, *optional*, defaults to 0): of the permutation.

    Raises:
        [`UsageError`]: the mapper has no tokenizers.
    """
    _, target_tokenizer = model.tokenizers()
    mean_P = target_tokenizer.mean_P
    assert mean_P is not None, "the target tokenizer was fitted"
    predicted_NP = model.generate_deltas(source_NP, batch_size=batch_size)
    permuted = None
    # Every row needs a row of another run: impossible where one run holds more than half of them.
    if 2 * max(Counter(run_ids).values()) <= len(run_ids):
        permutation = permutation_without_fixed_run(run_ids, seed)
        permuted = r2_around_mean(predicted_NP[permutation], target_NP, mean_P)
    ceiling = None
    if tasks is not None and train_target_NP is not None and train_tasks is not None:
        ceiling = task_mean_ceiling(target_NP, tasks, train_target_NP, train_tasks, mean_P)
    widths = target_tokenizer.layout.widths
    errors = (predicted_NP - target_NP).double().square().sum(dim=0).split(widths)
    spreads = (target_NP - mean_P).double().square().sum(dim=0).split(widths)
    return HeldoutMetrics(
        r2=r2_around_mean(predicted_NP, target_NP, mean_P),
        r2_teacher_forced=r2_around_mean(_teacher_forced(model, source_NP, target_NP, batch_size), target_NP, mean_P),
        r2_permuted_inputs=permuted,
        r2_ceiling=ceiling,
        block_mse=[float(error.sum() / spread.sum()) for error, spread in zip(errors, spreads, strict=True)],
    )


@torch.no_grad()
def _teacher_forced(
    model: GradTransformer, source_NP: torch.Tensor, target_NP: torch.Tensor, batch_size: int
) -> torch.Tensor:
    source_tokenizer, target_tokenizer = model.tokenizers()
    training = model.training
    model.eval()
    predicted = []
    for source, target in zip(source_NP.split(batch_size), target_NP.split(batch_size), strict=True):
        blocks = model(
            source_tokenizer.standardize(source).to(model.device),
            labels=target_tokenizer.standardize(target).to(model.device),
        ).blocks
        predicted.append(target_tokenizer.unstandardize(blocks.float().cpu()))
    model.train(training)
    return torch.cat(predicted)

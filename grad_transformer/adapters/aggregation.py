"""Many clients' deltas into one, in LoRA space as in the paper (section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..errors import UsageError


Aggregation = Literal["mean", "sum", "weighted"]


def aggregate_deltas(
    deltas_NP: torch.Tensor, *, aggregation: Aggregation = "mean", weights: Sequence[float] | None = None
) -> torch.Tensor:
    """Combine N deltas into one; the inputs are left as they are.

    Args:
        deltas_NP (`torch.Tensor` of shape `(N, numel)`): one flattened delta per client.
        aggregation (`str`, *optional*, defaults to `"mean"`): `"mean"`, `"sum"`, or `"weighted"`, the mean weighted by
            `weights`.
        weights (`Sequence[float]`, *optional*): one weight per client for `"weighted"`, for instance its number of
            examples; they are normalised to sum to 1.

    Returns:
        `torch.Tensor` of shape `(numel,)`.

    Raises:
        [`UsageError`]: an unknown aggregation, no deltas, or weights that do not fit.
    """
    if deltas_NP.dim() != 2 or len(deltas_NP) == 0:
        raise UsageError("There is nothing to aggregate.", expected="at least one delta", found=tuple(deltas_NP.shape))
    if (weights is not None) != (aggregation == "weighted"):
        raise UsageError(
            "Weights and aggregation do not fit together.",
            expected="weights with aggregation='weighted', and only there",
            found=f"aggregation={aggregation!r}, weights={weights}",
        )
    if aggregation == "mean":
        return deltas_NP.mean(dim=0)
    if aggregation == "sum":
        return deltas_NP.sum(dim=0)
    if aggregation == "weighted":
        weights_N = torch.tensor(weights, dtype=torch.float64)
        if len(weights_N) != len(deltas_NP) or not (weights_N >= 0).all() or not 0 < weights_N.sum() < float("inf"):
            raise UsageError(
                "The weights do not fit the clients.",
                expected=f"{len(deltas_NP)} non-negative finite numbers, not all zero",
                found=list(weights or ()),
            )
        weights_N = weights_N / weights_N.sum()
        return (weights_N[:, None].to(deltas_NP) * deltas_NP).sum(dim=0)
    raise UsageError("Unknown aggregation.", expected="mean, sum or weighted", found=aggregation)

"""Many clients' deltas into one, in LoRA space as in the paper (section 4.3), or by rules that bear dishonest clients.

No function here changes its inputs.

Shape legend: N clients, P values of a delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from ..constants import AGGREGATIONS, Aggregation
from ..errors import UsageError


# Rules that are told how many clients may lie.
_COUNTING = ("trimmed_mean", "krum", "multi_krum")


def aggregate_deltas(
    deltas_NP: torch.Tensor,
    *,
    aggregation: Aggregation = "mean",
    weights: Sequence[float] | None = None,
    num_dishonest: int | None = None,
    max_norm: float | None = None,
    reference_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """Combine N deltas into one.

    Args:
        deltas_NP (`torch.Tensor` of shape `(N, numel)`): one flattened delta per client.
        aggregation (`str`, *optional*, defaults to `"mean"`):
            - `"mean"`, `"sum"`, or `"weighted"`, the mean weighted by `weights`: no protection; one client decides.
            - `"norm_clipping"`: the mean after each delta is shortened to `max_norm`.
            - `"median"`: the median of each value; for an even N the mean of the two in the middle.
            - `"trimmed_mean"`: for each value, the mean without the `num_dishonest` largest and smallest.
            - `"krum"`: the delta with the least sum of squared distances to its N - `num_dishonest` - 2 nearest;
              `"multi_krum"`: the mean of the N - `num_dishonest` best by that score.
            - `"fltrust"`: the mean of all deltas, each scaled to the norm of `reference_P` and weighted by its cosine
              with it, negative ones by 0.

            `"exact_mean"` needs the layout and the root: see [`exact_mean`].
        weights (`Sequence[float]`, *optional*): one weight per client for `"weighted"`, for instance its number of
            examples; they are normalised to sum to 1.
        num_dishonest (`int`, *optional*): how many clients may send anything, for `"trimmed_mean"`, `"krum"` and
            `"multi_krum"`; default: the most that the rule bears, (N - 1) // 2 or (N - 3) // 2.
        max_norm (`float`, *optional*): for `"norm_clipping"`; default: the median of the norms.
        reference_P (`torch.Tensor` of shape `(numel,)`, *optional*): for `"fltrust"`, a delta that the provider made
            itself, on public rows of the clients' task.

    Returns:
        `torch.Tensor` of shape `(numel,)`.

    Raises:
        [`UsageError`]: an unknown aggregation, no deltas, values that are not finite, too few clients for the rule,
            or arguments that do not fit it.
    """
    if deltas_NP.dim() != 2 or len(deltas_NP) == 0:
        raise UsageError("There is nothing to aggregate.", expected="at least one delta", found=tuple(deltas_NP.shape))
    if aggregation not in AGGREGATIONS or aggregation == "exact_mean":
        known = ", ".join(name for name in AGGREGATIONS if name != "exact_mean")
        raise UsageError("Unknown aggregation of deltas.", expected=known, found=aggregation)
    _check_argument("weights", weights, needed=aggregation == "weighted", allowed=("weighted",), rule=aggregation)
    _check_argument("num_dishonest", num_dishonest, needed=False, allowed=_COUNTING, rule=aggregation)
    _check_argument("max_norm", max_norm, needed=False, allowed=("norm_clipping",), rule=aggregation)
    _check_argument(
        "reference_P", reference_P, needed=aggregation == "fltrust", allowed=("fltrust",), rule=aggregation
    )
    if not torch.isfinite(deltas_NP).all():
        raise UsageError("A delta holds NaN or infinite values.", expected="finite values", found="not finite")

    if aggregation == "sum":
        return deltas_NP.sum(dim=0)
    if aggregation == "weighted":
        weights_N = _normalised(() if weights is None else weights, len(deltas_NP)).to(deltas_NP)
        return (weights_N[:, None] * deltas_NP).sum(dim=0)
    if aggregation == "norm_clipping":
        return _clip_norms(deltas_NP, max_norm).mean(dim=0)
    if aggregation == "median":
        return _middle(deltas_NP, (len(deltas_NP) - 1) // 2)
    if aggregation == "trimmed_mean":
        return _middle(deltas_NP, _num_dishonest(num_dishonest, len(deltas_NP), least=1))
    if aggregation in ("krum", "multi_krum"):
        dishonest = _num_dishonest(num_dishonest, len(deltas_NP), least=3)
        order = krum_scores(deltas_NP, num_dishonest=dishonest).argsort(stable=True)
        return deltas_NP[order[: 1 if aggregation == "krum" else len(deltas_NP) - dishonest]].mean(dim=0)
    if aggregation == "fltrust":
        assert reference_P is not None
        return _fltrust(deltas_NP, reference_P)
    return deltas_NP.mean(dim=0)


def krum_scores(deltas_NP: torch.Tensor, *, num_dishonest: int) -> torch.Tensor:
    """Sum of squared distances of each delta to its N - `num_dishonest` - 2 nearest (at least 1), float64 `(N,)`."""
    deltas = deltas_NP.double()
    # Differences, not inner products: a delta scaled by 100 would cost the others their digits.
    squares_NN = torch.stack([(deltas - delta_P).square().sum(dim=1) for delta_P in deltas])
    squares_NN.fill_diagonal_(float("inf"))
    nearest = min(max(1, len(deltas) - num_dishonest - 2), len(deltas) - 1)
    return squares_NN.sort(dim=1).values[:, :nearest].sum(dim=1)


def _clip_norms(deltas_NP: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    norms_N = deltas_NP.double().norm(dim=1)
    if max_norm is None:
        max_norm = float(norms_N.quantile(0.5))
    elif not _finite(max_norm) > 0:
        raise UsageError("`max_norm` must be positive.", expected="a finite number, more than 0", found=max_norm)
    factors_N = (max_norm / norms_N.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return deltas_NP * factors_N[:, None].to(deltas_NP)


def _middle(deltas_NP: torch.Tensor, cut: int) -> torch.Tensor:
    ordered_NP = deltas_NP.sort(dim=0).values
    return ordered_NP[cut : len(ordered_NP) - cut].mean(dim=0)


def _fltrust(deltas_NP: torch.Tensor, reference_P: torch.Tensor) -> torch.Tensor:
    reference_P = reference_P.to(deltas_NP)
    norm = reference_P.double().norm()
    if reference_P.shape != deltas_NP.shape[1:] or not 0 < norm < float("inf"):
        raise UsageError(
            "The reference delta does not fit.",
            expected=f"a finite delta of {deltas_NP.shape[1]} values that is not zero",
            found=f"{tuple(reference_P.shape)}, norm {float(norm):.4g}",
        )
    norms_N = deltas_NP.double().norm(dim=1)
    cosines_N = (deltas_NP.double() @ reference_P.double()) / (norms_N * norm).clamp(min=1e-300)
    trust_N = cosines_N.clamp(min=0.0)
    if trust_N.sum() == 0:
        raise UsageError(
            "No client's delta points where the reference does.",
            expected="a positive cosine with the reference delta",
            found=[round(float(cosine), 3) for cosine in cosines_N],
            remedy="make the reference on public rows of the clients' task, or choose another aggregation",
        )
    factors_N = trust_N / trust_N.sum() * norm / norms_N.clamp(min=1e-300)
    return (factors_N[:, None] * deltas_NP.double()).sum(dim=0).to(deltas_NP)


def _normalised(weights: Sequence[float], count: int) -> torch.Tensor:
    given = [_finite(weight) for weight in weights]
    fits = len(given) == count and all(weight >= 0 for weight in given)
    if not fits or not 0 < sum(given) < float("inf"):
        raise UsageError(
            "The weights do not fit the clients.",
            expected=f"{count} non-negative finite numbers, not all zero",
            found=list(weights),
        )
    weights_N = torch.tensor(given, dtype=torch.float64)
    return weights_N / weights_N.sum()


def _finite(value: Any) -> float:
    """The number that it is, NaN where it is none."""
    try:
        number = float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return float("nan")
    return number if math.isfinite(number) else float("nan")


def _num_dishonest(given: int | None, count: int, *, least: int) -> int:
    """The number of dishonest clients to reckon with; `least` clients must remain when twice as many are gone."""
    most = (count - least) // 2
    if given is not None and (isinstance(given, bool) or not isinstance(given, Integral) or given < 0):
        raise UsageError("`num_dishonest` is no number of clients.", expected="0, 1, 2, ...", found=given)
    number = most if given is None else int(given)
    if most < 0 or not 0 <= number <= most:
        raise UsageError(
            "There are too few clients for that many dishonest ones.",
            expected=f"at least {2 * max(number, 0) + least} clients, each counted once",
            found=f"{count} clients, num_dishonest={number if most >= 0 else given}",
            remedy="ask more clients, or choose another aggregation",
        )
    return number


def _check_argument(name: str, value: object, *, needed: bool, allowed: tuple[str, ...], rule: str) -> None:
    if (needed and value is None) or (value is not None and rule not in allowed):
        shown = "a delta" if isinstance(value, torch.Tensor) else value
        raise UsageError(
            f"`{name}` and the aggregation do not fit together.",
            expected=f"{name} with aggregation {' or '.join(map(repr, allowed))}, and only there",
            found=f"aggregation={rule!r}, {name}={shown}",
        )

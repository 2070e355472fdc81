"""The exact mean of B·A: what the clients' models do on average, brought back to one adapter of the same rank.

The mean of the A and the mean of the B, multiplied, is not the mean of the products. That mean has a rank of up to
N·R; the adapter keeps the R largest singular directions of it, and the rest is reported.

Shape legend: N clients, P values of an adapter, R rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UsageError
from .aggregation import Aggregation, aggregate_deltas
from .layout import LoraLayout, TensorSpec
from .roots import Root


# Singular values below this share of the largest are zero in float64 arithmetic on float32 adapters.
_ZERO = 1e-7
# An A that the gauge would squeeze more than this in one direction is held there; its B grows by the inverse.
_MINIMUM_GAUGE = 1e-2


@dataclass(frozen=True)
class ExactMean:
    """The exact mean as a delta from the root.

    Args:
        delta (`torch.Tensor` of shape `(numel,)`): adapter minus root, float32.
        remaining_error (`float`): norm of what rank R leaves out over the norm of the mean product, over all modules.
        module_errors (`dict[str, float]`): the same for each module.
    """

    delta: torch.Tensor
    remaining_error: float
    module_errors: dict[str, float] = field(default_factory=dict)


def aggregate_from_root(
    deltas_NP: torch.Tensor, root: Root, *, aggregation: Aggregation = "mean", **arguments: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """[`aggregate_deltas`] with `"exact_mean"` among the rules, and the facts to record of it.

    Args:
        deltas_NP (`torch.Tensor` of shape `(N, numel)`): deltas from `root`.
        root ([`Root`]): theirs.
        aggregation, arguments: as in [`aggregate_deltas`]; `"exact_mean"` takes `weights`.

    Returns:
        the delta `(numel,)`, and its facts: for `"exact_mean"` the error that the rank leaves.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if aggregation != "exact_mean":
        return aggregate_deltas(deltas_NP, aggregation=aggregation, **given), {"aggregation": aggregation}
    weights = given.pop("weights", None)
    if given:
        raise UsageError("The exact mean takes no such argument.", expected="weights", found=sorted(given)[0])
    result = exact_mean(deltas_NP, root.adapter.flat(dtype=torch.float64), root.layout, weights=weights)
    return result.delta, {"aggregation": aggregation, "remaining_error": result.remaining_error}


def exact_mean(
    deltas_NP: torch.Tensor, root_P: torch.Tensor, layout: LoraLayout, *, weights: Sequence[float] | None = None
) -> ExactMean:
    """The mean of the products B·A of N adapters, as an adapter of their rank in the root's gauge.

    (B·G, G⁻¹·A) is the same update for every invertible G, but another delta. Clients that start from one root stay
    near its A, and that is what a mapper has learned to read: G is chosen so that A comes as near the root's as its
    row space allows.

    Args:
        deltas_NP (`torch.Tensor` of shape `(N, numel)`): adapter minus root, one per client.
        root_P (`torch.Tensor` of shape `(numel,)`): the root, in layout order.
        layout ([`LoraLayout`]): of all of them.
        weights (`Sequence[float]`, *optional*): one per client, normalised to sum to 1; default: equal ones.

    Returns:
        [`ExactMean`]

    Raises:
        [`UsageError`]: no deltas, weights that do not fit, or a module whose B is a kernel larger than 1.
    """
    one_hot = torch.eye(len(deltas_NP), dtype=torch.float64)
    shares_N = (
        aggregate_deltas(one_hot)
        if weights is None
        else aggregate_deltas(one_hot, aggregation="weighted", weights=weights)
    )
    adapters = layout.unflatten(deltas_NP.double() + root_P.double())
    root = layout.unflatten(root_P.double())
    results: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    left_out = total = 0.0
    specs = list(layout.tensor_specs())
    for spec_a, spec_b in zip(specs[::2], specs[1::2], strict=True):
        a_NRI, b_NOR = _as_matrices(adapters, spec_a, spec_b)
        root_RI = root[spec_a.key].reshape(spec_a.shape[0], -1)
        a_RI, b_OR, error, norm = _mean_product(a_NRI, b_NOR, root_RI, shares_N)
        results[spec_a.key], results[spec_b.key] = a_RI.reshape(spec_a.shape), b_OR.reshape(spec_b.shape)
        errors[spec_a.module] = error / norm if norm > 0 else 0.0
        left_out += (spec_a.scaling * error) ** 2
        total += (spec_a.scaling * norm) ** 2
    delta_P = (layout.flatten(results, dtype=torch.float64) - root_P.double()).float()
    return ExactMean(delta_P, (left_out / total) ** 0.5 if total > 0 else 0.0, errors)


def _as_matrices(
    adapters: dict[str, torch.Tensor], spec_a: TensorSpec, spec_b: TensorSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    assert (spec_a.side, spec_b.side, spec_a.module) == ("A", "B", spec_b.module)
    a, b = adapters[spec_a.key], adapters[spec_b.key]
    if b[0].numel() != spec_b.shape[0] * spec_b.shape[1]:
        raise UsageError(
            "The exact mean of this module's product is not defined.",
            expected="B of shape (out, rank), or with kernels of size 1",
            found=f"{spec_b.key}: {spec_b.shape}",
            remedy="choose another aggregation",
        )
    return a.reshape(len(a), spec_a.shape[0], -1), b.reshape(len(b), spec_b.shape[0], -1)


def _mean_product(
    a_NRI: torch.Tensor, b_NOR: torch.Tensor, root_RI: torch.Tensor, shares_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """A and B of the best rank-R mean, the norm of what is left out, and the norm of the mean product."""
    rank = a_NRI.shape[1]
    # The product itself (out x in) is never formed: B side and A side are orthogonalised, and their core decomposed.
    left_OK = torch.cat(list(b_NOR * shares_N[:, None, None]), dim=1)
    right_KI = a_NRI.reshape(-1, a_NRI.shape[2])
    q_left, r_left = torch.linalg.qr(left_OK)
    q_right, r_right = torch.linalg.qr(right_KI.T)
    u, singular, v = torch.linalg.svd(r_left @ r_right.T)
    norm, error = float(singular.norm()), float(singular[rank:].norm())
    kept = min(rank, int((singular > _ZERO * max(float(singular[0]), 1e-300)).sum()))
    rows_RI = v[:kept] @ q_right.T
    if kept < rank:
        # Directions in which the mean does nothing: there A stays the root's.
        rest_RI = root_RI - root_RI @ rows_RI.T @ rows_RI
        rows_RI = torch.cat([rows_RI, torch.linalg.svd(rest_RI, full_matrices=False)[2][: rank - kept]])
    gauge_RR = _invertible(root_RI @ rows_RI.T)
    b_OR = torch.zeros(left_OK.shape[0], rank, dtype=left_OK.dtype)
    b_OR[:, :kept] = (q_left @ u[:, :kept]) * singular[:kept]
    return gauge_RR @ rows_RI, b_OR @ torch.linalg.inv(gauge_RR), error, norm


def _invertible(gauge_RR: torch.Tensor) -> torch.Tensor:
    u, singular, v = torch.linalg.svd(gauge_RR)
    largest = float(singular[0])
    if largest == 0:  # a root whose A is zero fixes no gauge
        return torch.eye(len(gauge_RR), dtype=gauge_RR.dtype)
    return (u * singular.clamp(min=_MINIMUM_GAUGE * largest)) @ v

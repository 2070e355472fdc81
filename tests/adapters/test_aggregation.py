"""Robust aggregation and the exact mean of B·A: against slow code written from the papers, and by their promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grad_transformer.adapters import AGGREGATIONS, aggregate_deltas, aggregate_from_root, exact_mean
from grad_transformer.errors import UsageError
from tests.worlds import moved, tiny_root


HONEST = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 1.0
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum")


def attacked(attack: torch.Tensor, count: int = 2) -> torch.Tensor:
    return torch.cat([attack.expand(count, -1), HONEST[: 8 - count]])


def arguments(aggregation: str) -> dict:
    extra = {"weighted": {"weights": [1.0] * 8}, "fltrust": {"reference_P": HONEST.mean(0) * 1.1}}
    return {"aggregation": aggregation, **extra.get(aggregation, {})}


@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name not in ("sum", "exact_mean")])
def test_equal_deltas_stay_what_they_are_and_inputs_are_never_mutated(aggregation):
    delta = HONEST[0]
    deltas = delta.repeat(8, 1)
    before = deltas.clone()
    given_arguments = arguments(aggregation)
    if aggregation == "fltrust":
        given_arguments["reference_P"] = delta.clone()
    torch.testing.assert_close(aggregate_deltas(deltas, **given_arguments), delta)
    assert torch.equal(deltas, before)


@pytest.mark.parametrize("aggregation", ROBUST)
@pytest.mark.parametrize("attack", [-100.0, 100.0, 1e6])
def test_two_dishonest_clients_of_eight_do_not_move_a_robust_rule(aggregation, attack):
    deltas = attacked(torch.full((40,), attack))
    clean = HONEST.mean(0)
    robust = (
        aggregate_deltas(deltas, aggregation=aggregation, num_dishonest=2)
        if aggregation != "median"
        else (aggregate_deltas(deltas, aggregation=aggregation))
    )
    assert (robust - clean).norm() < 0.35 * clean.norm()
    assert (aggregate_deltas(deltas) - clean).norm() > 10 * clean.norm()


def test_fltrust_gives_no_weight_to_what_points_away_and_scales_the_rest():
    reference = HONEST.mean(0)
    deltas = torch.cat([-100 * reference[None], 50 * HONEST[:3]])
    result = aggregate_deltas(deltas, aggregation="fltrust", reference_P=reference)
    torch.testing.assert_close(result, reference, rtol=0.3, atol=0)
    with pytest.raises(UsageError, match="No client's delta points"):
        aggregate_deltas(-deltas[1:], aggregation="fltrust", reference_P=reference)


def test_norm_clipping_shortens_to_the_median_norm_or_to_what_is_asked():
    deltas = torch.tensor([[1.0, 0.0], [0.0, 2.0], [300.0, 400.0]])
    expected = torch.tensor([1.0 + 2 * 0.6, 2.0 + 2 * 0.8]) / 3
    torch.testing.assert_close(aggregate_deltas(deltas, aggregation="norm_clipping"), expected)
    assert aggregate_deltas(deltas, aggregation="norm_clipping", max_norm=1e-3).norm() <= 1e-3


@given(st.integers(5, 9), st.integers(1, 3), st.integers(0, 10_000))
def test_krum_and_trimmed_mean_equal_loops_written_from_the_papers(count, dishonest, seed):
    deltas = np.random.default_rng(seed).normal(size=(count, 6))
    tensor = torch.from_numpy(deltas)
    if count >= 2 * dishonest + 3:
        scores = []
        for i in range(count):
            distances = sorted(float(((deltas[i] - deltas[j]) ** 2).sum()) for j in range(count) if j != i)
            scores.append(sum(distances[: count - dishonest - 2]))
        best = np.argsort(scores, kind="stable")
        krum = aggregate_deltas(tensor, aggregation="krum", num_dishonest=dishonest)
        assert torch.equal(krum, tensor[best[0]])
        multi = aggregate_deltas(tensor, aggregation="multi_krum", num_dishonest=dishonest)
        np.testing.assert_allclose(multi, deltas[best[: count - dishonest]].mean(0))
    if count > 2 * dishonest:
        trimmed = aggregate_deltas(tensor, aggregation="trimmed_mean", num_dishonest=np.int64(dishonest))
        expected = [np.sort(column)[dishonest : count - dishonest].mean() for column in deltas.T]
        np.testing.assert_allclose(trimmed, expected)
    np.testing.assert_allclose(aggregate_deltas(tensor, aggregation="median"), np.median(deltas, axis=0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"aggregation": "krum", "num_dishonest": 3},
        {"aggregation": "trimmed_mean", "num_dishonest": 4},
        {"aggregation": "mean", "num_dishonest": 1},
        {"aggregation": "median", "max_norm": 1.0},
        {"aggregation": "norm_clipping", "max_norm": -1.0},
        {"aggregation": "norm_clipping", "max_norm": float("nan")},
        {"aggregation": "norm_clipping", "max_norm": float("inf")},
        {"aggregation": "norm_clipping", "max_norm": "long"},
        {"aggregation": "krum", "num_dishonest": -1},
        {"aggregation": "krum", "num_dishonest": 1.5},
        {"aggregation": "trimmed_mean", "num_dishonest": True},
        {"aggregation": "weighted", "weights": [1.0] * 7},
        {"aggregation": "weighted", "weights": [float("nan")] * 8},
        {"aggregation": "weighted", "weights": [-1.0, *[1.0] * 7]},
        {"aggregation": "weighted", "weights": [0.0] * 8},
        {"aggregation": "weighted", "weights": [1e308] * 8},
        {"aggregation": "weighted", "weights": [10**400, *[1] * 7]},
        {"aggregation": "weighted", "weights": ["many"] * 8},
        {"aggregation": "fltrust"},
        {"aggregation": "fltrust", "reference_P": torch.zeros(40)},
        {"aggregation": "exact_mean"},
    ],
)
def test_rules_that_cannot_hold_are_refused(wrong):
    with pytest.raises(UsageError):
        aggregate_deltas(HONEST, **wrong)


def test_deltas_that_are_not_finite_are_refused():
    deltas = HONEST.clone()
    deltas[3, 5] = float("nan")
    with pytest.raises(UsageError, match="NaN"):
        aggregate_deltas(deltas, aggregation="median")


# The exact mean


def products(root, delta_P):
    tensors = root.layout.unflatten(root.adapter.flat(dtype=torch.float64) + delta_P.double())
    specs = list(root.layout.tensor_specs())
    return {a.module: tensors[b.key] @ tensors[a.key] for a, b in zip(specs[::2], specs[1::2], strict=True)}


def clients_of(root, count, scale=0.05):
    root_P = root.adapter.flat()
    return torch.stack([moved(root, seed=seed, scale=scale).flat() - root_P for seed in range(count)])


def test_exact_mean_is_the_best_approximation_of_its_rank_and_says_what_is_left(tmp_path):
    root = tiny_root(tmp_path)
    deltas = clients_of(root, 5)
    before = deltas.clone()
    result = exact_mean(deltas, root.adapter.flat(), root.layout)
    assert torch.equal(deltas, before)
    ours = products(root, result.delta)
    left_out = total = 0.0
    for module, product in ours.items():
        mean = torch.stack([products(root, delta_P)[module] for delta_P in deltas]).mean(0)
        u, singular, v = torch.linalg.svd(mean)
        torch.testing.assert_close(product, (u[:, :2] * singular[:2]) @ v[:2], rtol=1e-4, atol=1e-6)
        assert result.module_errors[module] == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-5)
        left_out, total = left_out + float(singular[2:].square().sum()), total + float(singular.square().sum())
    assert result.remaining_error == pytest.approx((left_out / total) ** 0.5, rel=1e-5)
    assert 0 < result.remaining_error < 1


def test_exact_mean_of_one_client_has_its_product_and_the_a_nearest_to_the_root(tmp_path):
    root = tiny_root(tmp_path)
    (delta_P,) = clients_of(root, 1)
    result = exact_mean(delta_P[None], root.adapter.flat(), root.layout)
    assert result.remaining_error < 1e-6
    for module, product in products(root, delta_P).items():
        torch.testing.assert_close(products(root, result.delta)[module], product, rtol=1e-4, atol=1e-7)
    of_a = [spec.key for spec in root.layout.tensor_specs() if spec.side == "A"]
    exact, plain = root.layout.unflatten(result.delta), root.layout.unflatten(delta_P)
    assert all(exact[key].norm() < plain[key].norm() for key in of_a)


def test_exact_mean_of_adapters_that_do_nothing_is_the_root_and_weights_count(tmp_path):
    root = tiny_root(tmp_path)
    zeros = torch.zeros(3, root.layout.numel)
    result = exact_mean(zeros, root.adapter.flat(), root.layout)
    assert result.remaining_error == 0 and result.delta.abs().max() < 1e-5
    deltas = clients_of(root, 2)
    alone, facts = aggregate_from_root(deltas, root, aggregation="exact_mean", weights=[0.0, 1.0])
    torch.testing.assert_close(alone, exact_mean(deltas[1:], root.adapter.flat(), root.layout).delta)
    assert facts["aggregation"] == "exact_mean" and facts["remaining_error"] < 1e-6

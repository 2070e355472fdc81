"""Controls: each against its closed form, and what each promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grad_transformer.adapters.io import read_header, read_tensors, save_tensors_atomic
from grad_transformer.adapters.statistics import r2_around_mean
from grad_transformer.errors import DeltaDatasetError, UsageError
from grad_transformer.evaluation import controls
from grad_transformer.evaluation.controls import (
    CONTROLS,
    MeanShadow,
    NearestShadow,
    RidgeRegression,
    control_deltas,
    fit_controls,
    other_client,
    random_delta_like,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_world(rows: int, *, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = normal(rows, 12, seed=seed)
    return source.float(), (source @ normal(12, 9, seed=99) + 3.0 + noise * normal(rows, 9, seed=seed + 1)).float()


def test_the_mean_shadow_is_the_mean_whatever_the_input() -> None:
    source, target = linear_world(6)
    predicted = MeanShadow().fit(source, target).predict(normal(2, 12))
    torch.testing.assert_close(predicted, target.mean(0).expand(2, 9))


def test_a_training_delta_is_its_own_nearest() -> None:
    source, target = linear_world(20)
    predictor = NearestShadow(source_widths=[5, 7]).fit(source, target)
    assert predictor.nearest(source).tolist() == list(range(20))
    assert torch.equal(predictor.predict(source), target)
    assert torch.equal(predictor.weights(source) @ target.double(), target.double())


def test_blocks_count_alike_in_the_distance_when_widths_are_given() -> None:
    source = torch.tensor([[0.0, 0.0], [100.0, 1.0]])
    target = torch.tensor([[0.0], [1.0]])
    client = torch.tensor([[40.0, 1.0]])
    assert NearestShadow().fit(source, target).predict(client).item() == 0.0
    assert NearestShadow(source_widths=[1, 1]).fit(source, target).predict(client).item() == 1.0


@pytest.mark.parametrize("rows", [5, 40])
def test_ridge_equals_its_normal_equations(rows: int) -> None:
    source, target = linear_world(rows, noise=0.5)
    strength, client = 0.3, normal(4, 12, seed=5).float()
    predicted = RidgeRegression(strengths=[strength]).fit(source, target).predict(client)

    x, y = source.double(), target.double()
    centred = (x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()
    penalty = strength * centred.square().sum() / rows
    slope = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(12), centred.T @ (y - y.mean(0)))
    expected = (client.double() - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt() @ slope + y.mean(0)
    torch.testing.assert_close(predicted.double(), expected, rtol=1e-5, atol=1e-5)


def test_ridge_recovers_a_linear_world_and_the_mean_when_strong() -> None:
    source, target = linear_world(40)
    held_source, held_target = linear_world(10, seed=7)
    weak = RidgeRegression(strengths=[1e-8]).fit(source, target)
    strong = RidgeRegression(strengths=[1e8]).fit(source, target)
    assert r2_around_mean(weak.predict(held_source), held_target, target.mean(0)) > 0.9999
    torch.testing.assert_close(strong.predict(held_source), target.mean(0).expand(10, 9), rtol=1e-4, atol=1e-4)


def test_the_ridge_strength_is_the_best_on_the_validation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "_CHUNK_VALUES", 50)
    source, target = linear_world(15, noise=3.0)
    validation = linear_world(30, noise=3.0, seed=7)
    ridge = RidgeRegression().fit(source, target, validation=validation)
    for strength, r2 in ridge.validation_r2.items():
        alone = RidgeRegression(strengths=[strength]).fit(source, target)
        expected = r2_around_mean(alone.predict(validation[0]), validation[1], target.double().mean(0))
        assert r2 == pytest.approx(expected, abs=1e-4)
    assert ridge.validation_r2[ridge.strength.item()] == max(ridge.validation_r2.values())
    assert min(ridge.strengths) < ridge.strength.item() < max(ridge.strengths)


def test_ridge_needs_validation_runs_to_choose() -> None:
    with pytest.raises(UsageError, match="validation runs"):
        RidgeRegression().fit(*linear_world(5))
    with pytest.raises(UsageError, match="positive"):
        RidgeRegression(strengths=[0.0]).fit(*linear_world(5))


def test_ridge_of_one_pair_or_of_equal_sources_is_the_mean() -> None:
    source, target = torch.ones(3, 4), normal(3, 2).float()
    torch.testing.assert_close(
        RidgeRegression(strengths=[1.0]).fit(source, target).predict(normal(1, 4)), target.mean(0, keepdim=True)
    )
    alone = RidgeRegression(strengths=[1.0]).fit(source[:1], target[:1])
    torch.testing.assert_close(alone.predict(normal(1, 4)), target[:1])


def test_ridge_thins_more_pairs_than_it_can_solve() -> None:
    source, target = linear_world(41)
    ridge = RidgeRegression(strengths=[1e-6], max_rows=21).fit(source, target)
    assert torch.equal(ridge.source, source[::2])
    assert ridge.inverse_kernel.shape == (21, 21)


def test_pairs_must_fit() -> None:
    with pytest.raises(DeltaDatasetError, match="no pairs"):
        MeanShadow().fit(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(UsageError, match="source_widths"):
        NearestShadow(source_widths=[2]).fit(torch.zeros(2, 3), torch.zeros(2, 3))


def test_predictors_survive_a_file(tmp_path) -> None:
    source, target = linear_world(12, noise=1.0)
    client = linear_world(3, seed=5)[0]
    for name, fitted in fit_controls(source, target, validation=linear_world(6, seed=3), source_widths=[6, 6]).items():
        path = tmp_path / f"{name}.safetensors"
        save_tensors_atomic(path, fitted.state())
        loaded = type(fitted).from_state(read_tensors(path, list(read_header(path)[0])))
        assert torch.equal(loaded.predict(client), fitted.predict(client))
    with pytest.raises(UsageError, match="Not the state"):
        RidgeRegression.from_state(MeanShadow().fit(source, target).state())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 2**31), st.booleans())
def test_random_deltas_keep_norms(widths: list[int], seed: int, by_block: bool) -> None:
    delta = normal(sum(widths), seed=1)
    noise = random_delta_like(delta, seed, widths=widths if by_block else None)
    assert noise.norm().item() == pytest.approx(delta.norm().item())
    if by_block:
        for block, reference in zip(noise.split(widths), delta.split(widths), strict=True):
            assert block.norm().item() == pytest.approx(reference.norm().item())


def test_random_deltas_have_no_direction_in_common() -> None:
    delta = normal(5000, seed=2)
    first, again, other = (random_delta_like(delta, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    for one, two in ((first, other), (first, delta)):
        assert abs(torch.cosine_similarity(one, two, dim=0).item()) < 0.06


def test_the_other_client_shares_no_task() -> None:
    assert other_client(["a", "a", "b"]) == [2, 2, 0]
    assert other_client([("a", "b"), "b", "c"]) == [2, 2, 0]
    assert other_client([None, None]) == [1, 0]
    assert other_client(["a", "a"]) == [None, None]
    assert other_client(["a"]) == [None]


def test_control_deltas_of_clients() -> None:
    source, target = linear_world(12, noise=1.0)
    predictors = fit_controls(source, target, validation=linear_world(6, seed=3))
    generated = normal(3, 9, seed=8).float()
    deltas = control_deltas(generated, source[:3], ["a", "a", "b"], predictors, target_widths=[4, 5])
    assert [tuple(client) for client in deltas] == [CONTROLS] * 3
    torch.testing.assert_close(deltas[1]["nearest_shadow"], target[1])
    torch.testing.assert_close(deltas[1]["mean_shadow"], target.mean(0))
    torch.testing.assert_close(deltas[1]["ridge"], predictors["ridge"].predict(source[1:2])[0])
    assert torch.equal(deltas[1]["other_client"], generated[2])
    torch.testing.assert_close(deltas[1]["random"][:4].norm(), generated[1, :4].norm())
    assert not torch.equal(deltas[0]["random"], deltas[1]["random"])

    alone = control_deltas(generated[:1], source[:1], ["a"], predictors, target_widths=[9])
    assert "other_client" not in alone[0]

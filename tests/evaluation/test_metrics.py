"""Exact match, PGR, and the bootstrap interval of the PGR."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grad_transformer.errors import DataError, UsageError
from grad_transformer.evaluation.metrics import (
    exact_match,
    gap_too_small,
    performance_gap_recovered,
    pgr_interval,
)


def test_exact_match_ignores_outer_white_space_only() -> None:
    scores = exact_match([" 1 2\n", "1  2", "", "A"], ["1 2", "1 2", "", "a"])
    assert scores.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_exact_match_refuses_unequal_lengths() -> None:
    with pytest.raises(DataError, match="one prediction per reference"):
        exact_match(["1"], [])


@pytest.mark.parametrize(
    ("generated", "tinylm", "llm", "pgr"),
    [(0.61, 0.5, 0.6, 110.0), (0.5, 0.5, 0.6, 0.0), (0.6, 0.5, 0.6, 100.0), (0.25, 0.5, 0.75, -100.0)],
)
def test_pgr_by_hand(generated: float, tinylm: float, llm: float, pgr: float) -> None:
    assert performance_gap_recovered(generated, tinylm, llm) == pytest.approx(pgr)


def test_a_gap_below_three_points_has_no_pgr() -> None:
    assert gap_too_small(0.72, 0.7499)
    assert not gap_too_small(0.72, 0.75)
    assert gap_too_small(0.9, 0.5)
    assert performance_gap_recovered(0.9, 0.5, 0.52) is None
    assert pgr_interval([1, 0], [1, 0], [1, 0]) is None


def test_the_interval_is_a_point_where_the_scores_leave_no_doubt() -> None:
    ones, zeros = np.ones(50), np.zeros(50)
    assert pgr_interval(ones, zeros, ones) == pytest.approx((100.0, 100.0))
    assert pgr_interval(zeros, zeros, ones) == pytest.approx((0.0, 0.0))


@given(st.integers(0, 10_000))
def test_the_interval_holds_the_point(seed: int) -> None:
    generator = np.random.default_rng(seed)
    generated, tinylm, llm = (
        (generator.random(400) < p).astype(float) for p in (generator.uniform(0.2, 0.9), 0.5, 0.9)
    )
    low, high = pgr_interval(generated, tinylm, llm, num_resamples=300)
    point = performance_gap_recovered(generated.mean(), tinylm.mean(), llm.mean())
    assert low < point < high


def test_the_interval_equals_a_bootstrap_that_draws_rows() -> None:
    generator = np.random.default_rng(0)
    scores = (generator.random((300, 3)) < [0.8, 0.5, 0.9]).astype(float)
    means = scores[generator.integers(0, 300, size=(20_000, 300))].mean(axis=1)
    expected = np.quantile(100 * (means[:, 0] - means[:, 1]) / (means[:, 2] - means[:, 1]), [0.025, 0.975])
    assert pgr_interval(*scores.T, num_resamples=20_000) == pytest.approx(expected.tolist(), abs=1.5)


def test_pairing_narrows_the_interval() -> None:
    generator = np.random.default_rng(0)
    tinylm, llm = (generator.random(300) < 0.5).astype(float), np.ones(300)
    low, high = pgr_interval(llm, tinylm, llm)
    assert (low, high) == pytest.approx((100.0, 100.0))
    low, high = pgr_interval(generator.permutation(np.r_[np.ones(270), np.zeros(30)]), tinylm, llm)
    assert high - low > 5


def test_more_rows_narrow_the_interval_and_the_seed_decides_it() -> None:
    few = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1]] * 10, dtype=float)
    many = np.tile(few, (25, 1))
    low, high = pgr_interval(*few.T, seed=3)
    assert pgr_interval(*few.T, seed=3) == (low, high)
    narrow = pgr_interval(*many.T, seed=3)
    assert (high - low) / (narrow[1] - narrow[0]) == pytest.approx(5.0, rel=0.2)


def test_an_uncertain_gap_has_no_bounds() -> None:
    tinylm, llm = np.array([0, 1, 0, 1, 0] * 2), np.array([1, 0, 1, 0, 1] * 2)
    assert performance_gap_recovered(0.5, tinylm.mean(), llm.mean()) is not None
    assert pgr_interval(np.ones(10), tinylm, llm) is None


def test_the_interval_refuses_what_is_not_paired() -> None:
    with pytest.raises(UsageError, match="paired"):
        pgr_interval([1.0], [1.0, 0.0], [1.0, 0.0])
    with pytest.raises(UsageError, match="paired"):
        pgr_interval([], [], [])
    with pytest.raises(UsageError, match="confidence"):
        pgr_interval([1.0], [0.0], [1.0], confidence=95)

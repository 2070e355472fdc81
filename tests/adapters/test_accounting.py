"""Epsilon of a stated mechanism, without Opacus: against two independent accountants, and for any numbers at all."""

from __future__ import annotations

import dp_accounting
import pytest
from dp_accounting.pld import pld_privacy_accountant
from hypothesis import given, settings
from hypothesis import strategies as st

from grad_transformer.adapters.accounting import epsilon_of_mechanism
from grad_transformer.client.mechanism import epsilon_of


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(0.7838, 0.0625, 120, 1e-5), (1.1, 0.01, 1000, 1e-5), (1.0, 1.0, 1, 1e-5), (5.1, 0.0625, 20, 1e-3)],
)
def test_it_agrees_with_opacus_and_with_google(noise: float, rate: float, steps: int, delta: float) -> None:
    ours = epsilon_of_mechanism(noise, rate, steps, delta)
    independent = pld_privacy_accountant.PLDAccountant()
    independent.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    assert ours == pytest.approx(independent.get_epsilon(delta), rel=5e-3)
    # Opacus' is an upper bound, and half a percent above.
    assert ours == pytest.approx(epsilon_of([(noise, rate, steps)], delta), rel=0.01)


@settings(max_examples=20)
@given(
    noise=st.floats(1e-3, 1e7),
    rate=st.floats(1e-12, 1.0),
    steps=st.integers(1, 10**9),
    delta=st.floats(1e-15, 0.1),
)
def test_whatever_a_statement_says_an_answer_comes(noise: float, rate: float, steps: int, delta: float) -> None:
    assert epsilon_of_mechanism(noise, rate, steps, delta) >= 0

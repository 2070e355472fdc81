"""Random numbers that decide a client's privacy: their distribution, and that no seed brings them back."""

from __future__ import annotations

import math

import pytest
import torch

from grad_transformer.client.secure_random import SecureRandom


def kolmogorov_smirnov(values: torch.Tensor, cdf: torch.Tensor) -> float:
    """Largest distance between the distribution of sorted values and theirs, times the root of their number."""
    count = len(values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    return float(torch.maximum(steps - cdf, cdf - (steps - 1 / count)).max()) * math.sqrt(count)


@pytest.fixture(scope="module")
def values() -> torch.Tensor:
    # An odd number over several chunks; a known key, so that the test cannot fail by chance.
    return SecureRandom(known_seed=1).normal((400_001,), 1.0)


def test_noise_is_gaussian(values: torch.Tensor) -> None:
    error = 1 / math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 * error
    assert float(values.var()) == pytest.approx(1.0, abs=4 * math.sqrt(2) * error)
    assert float((values**4).mean()) == pytest.approx(3.0, abs=4 * math.sqrt(96) * error)
    ordered = values.sort().values
    # 1.95 is exceeded once in a thousand samples.
    assert kolmogorov_smirnov(ordered, torch.special.ndtr(ordered)) < 1.95


def test_values_do_not_depend_on_each_other(values: torch.Tensor) -> None:
    half = 2**14  # where the two values of a pair lie apart
    for lag in (1, 2, half, 2**15):
        products = values[:-lag] * values[lag:]
        assert abs(float(products.mean())) < 4 / math.sqrt(len(products))
        squares = (values[:-lag] ** 2 - 1) * (values[lag:] ** 2 - 1)
        assert abs(float(squares.mean())) < 4 * 2 / math.sqrt(len(squares))


def test_uniforms_cover_their_range_evenly() -> None:
    uniforms = SecureRandom(known_seed=2).uniform(200_000).sort().values
    assert float(uniforms[0]) >= 0 and float(uniforms[-1]) < 1
    assert kolmogorov_smirnov(uniforms, uniforms) < 1.95


def test_shape_and_deviation_are_those_asked_for() -> None:
    random = SecureRandom(known_seed=3)
    noise = random.normal((300, 40), 2.5)
    assert noise.shape == (300, 40) and noise.dtype == torch.float64
    assert float(noise.std()) == pytest.approx(2.5, rel=0.03)
    assert random.normal((0, 3), 1.0).shape == (0, 3) and random.uniform(0).shape == (0,)


def test_every_stream_is_another_and_torch_seeds_change_nothing() -> None:
    drawn = []
    for _ in range(3):
        torch.manual_seed(0)
        drawn.append(SecureRandom().words(64))
    assert len({tuple(words.tolist()) for words in drawn}) == 3
    state = torch.get_rng_state()
    SecureRandom().normal((1000,), 1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_that_agree_in_32_bits_give_different_streams() -> None:
    low, high = SecureRandom(known_seed=7), SecureRandom(known_seed=7 + 2**32)
    assert not torch.equal(low.words(8), high.words(8))


def test_a_sample_has_no_repetitions_and_every_member_its_chance() -> None:
    random = SecureRandom(known_seed=4)
    counts = torch.zeros(5)
    for _ in range(2000):
        drawn = random.sample(5, 2)
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert float((counts / 2000 - 0.4).abs().max()) < 0.05
    assert random.sample(2, 5) == [0, 1]

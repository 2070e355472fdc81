"""What a stated mechanism spends: epsilon of the Poisson-sampled Gaussian mechanism, without Opacus.

Whoever reads a stranger's statement computes its epsilon again from its facts. So it needs no optional package, and
its cost is bounded whatever the facts are.

Shape legend: K orders of Rényi's divergence, M terms of a binomial sum, N points of a grid of privacy losses.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


_MAX_GRID_POINTS = 2**20
_PRECISION = 2e-3
_ORDERS = (*range(2, 64), *(2**power for power in range(6, 13)))


@lru_cache(maxsize=1024)
def epsilon_of_mechanism(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` steps, for adding or removing one unit.

    The privacy loss is composed on a grid with Fourier transforms, to about half a percent; where the grid would be
    too large (very many steps, hardly any noise), Rényi accounting gives a looser upper bound.

    Args:
        noise_multiplier (`float`): standard deviation of the noise over the sensitivity; above 0.
        sample_rate (`float`): probability of each unit to be in a step; in (0, 1].
        steps (`int`): number of steps, at least 1.
        delta (`float`): in (0, 1).
    """
    bound = _renyi(noise_multiplier, sample_rate, steps, delta)
    reach = _renyi(noise_multiplier, sample_rate, steps, delta * 1e-3) + 1.0
    width = max(_PRECISION * bound, 1e-5) / math.sqrt(max(steps / 2 * math.log(1 / delta), 1.0))
    points = 2 ** math.ceil(math.log2(2 * reach / width)) if math.isfinite(reach) else math.inf
    if points > _MAX_GRID_POINTS:
        return bound
    both = (
        _by_grid(noise_multiplier, sample_rate, steps, delta, reach, int(points), added) for added in (False, True)
    )
    return min(bound, max(both))


def _renyi(noise: float, rate: float, steps: int, delta: float) -> float:
    """An upper bound, from Rényi divergences of integer orders (Mironov, Talwar and Zhang, 2019)."""
    orders_K = torch.tensor(_ORDERS, dtype=torch.float64)
    if rate == 1:
        moments_K = orders_K * (orders_K - 1) / (2 * noise**2)
    else:
        moments_K = torch.stack([_log_moment(order, noise, rate) for order in _ORDERS])
    epsilons_K = (
        steps * moments_K / (orders_K - 1)
        + torch.log1p(-1 / orders_K)
        - (math.log(delta) + orders_K.log()) / (orders_K - 1)
    )
    return max(float(epsilons_K.nan_to_num(math.inf).min()), 0.0)


def _log_moment(order: int, noise: float, rate: float) -> torch.Tensor:
    chosen_M = torch.arange(order + 1, dtype=torch.float64)
    total = torch.tensor(float(order), dtype=torch.float64)
    binomial_M = torch.lgamma(total + 1) - torch.lgamma(chosen_M + 1) - torch.lgamma(total - chosen_M + 1)
    weights_M = binomial_M + chosen_M * math.log(rate) + (total - chosen_M) * math.log1p(-rate)
    return torch.logsumexp(weights_M + chosen_M * (chosen_M - 1) / (2 * noise**2), dim=0)


def _by_grid(noise: float, rate: float, steps: int, delta: float, reach: float, points: int, added: bool) -> float:
    """Epsilon for one of the two directions, a unit added or removed, from the distribution of the privacy loss."""
    width = 2 * reach / points
    losses_N = (torch.arange(points, dtype=torch.float64) - points // 2) * width
    edges = torch.cat([losses_N - width / 2, losses_N[-1:] + width / 2])
    # The sampled mechanism's output, of scale `noise`, at which the loss of a removed unit is `edge`.
    shifted = (torch.expm1(-edges if added else edges) + rate).clamp(min=0) / rate
    outputs = noise**2 * shifted.log() + 0.5
    if added:
        below = torch.special.ndtr(-outputs / noise)
    else:
        below = (1 - rate) * torch.special.ndtr(outputs / noise) + rate * torch.special.ndtr((outputs - 1) / noise)
    chances_N = below.diff()
    # Every loss was rounded to the grid: what that did to the mean is known, and taken back.
    shift = _mean_loss(noise, rate, added) - float((chances_N * losses_N).sum())
    composed_N = torch.fft.irfft(torch.fft.rfft(torch.fft.ifftshift(chances_N)) ** steps, n=points)
    composed_N = torch.fft.fftshift(composed_N).clamp(min=0)
    losses_N = losses_N + steps * shift
    # delta(epsilon) is the sum of (1 - exp(epsilon - loss)) over the losses above epsilon.
    tail_N = composed_N.flip(0).cumsum(0).flip(0)
    weighted_N = (composed_N * torch.exp(-losses_N)).flip(0).cumsum(0).flip(0)
    deltas_N = tail_N - torch.exp(losses_N) * weighted_N
    enough = ((deltas_N <= delta) & (losses_N >= 0)).nonzero()
    return float(losses_N[enough[0, 0]]) if len(enough) else math.inf


def _mean_loss(noise: float, rate: float, added: bool) -> float:
    outputs = torch.linspace(-12 * noise, 12 * noise + 1, 2**16, dtype=torch.float64)
    losses = torch.logaddexp(
        torch.tensor(math.log1p(-rate) if rate < 1 else -math.inf, dtype=torch.float64),
        math.log(rate) + (2 * outputs - 1) / (2 * noise**2),
    )
    density = torch.exp(-(outputs**2) / (2 * noise**2))
    if not added:
        density = (1 - rate) * density + rate * torch.exp(-((outputs - 1) ** 2) / (2 * noise**2))
    mean = float((density * losses).sum() / density.sum())
    return -mean if added else mean

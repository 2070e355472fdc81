"""The parts of DP-SGD: Poisson batches, clipping by example or group, noise from a target epsilon, the accountants.

Shape legend: B rows of one physical batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial

import numpy as np
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn
from torch.utils.data import Sampler

from ..errors import RecipeError, UsageError
from .arguments import (
    MAX_DELTA,
    MAX_EPSILON,
    MIN_DELTA,
    MIN_EPSILON,
    AccountantName,
    Gradients,
    NoisePlan,
    PrivacyArguments,
)
from .secure_random import SecureRandom


# (noise multiplier, sample rate, steps), as Opacus keeps it.
History = list[tuple[float, float, int]]

_ACCOUNTANTS = {"prv": PRVAccountant, "rdp": RDPAccountant}
_RELATIVE_TOLERANCE = 5e-3
_MIN_LOG_NOISE, _MAX_LOG_NOISE = -3.0, 14.0
# PRV's grid, which grows with the root of the number of steps and with the precision; a larger one takes minutes.
_MAX_GRID_POINTS = 2**21


class PoissonBatchSampler(Sampler[list[int]]):
    """Each batch holds every unit (an example, or a group of rows) with the same probability, independently: batches
    differ in size, and some are empty.

    Args:
        num_units (`int`): of the data set.
        sample_rate (`float`): the probability.
        num_batches (`int`): batches of one pass over the sampler.
        random ([`SecureRandom`]): draws them.
    """

    def __init__(self, num_units: int, sample_rate: float, num_batches: int, random: SecureRandom):
        self.num_units, self.sample_rate = num_units, sample_rate
        self.num_batches, self.random = num_batches, random

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            draws = self.random.uniform(self.num_units)
            yield (draws < self.sample_rate).nonzero(as_tuple=True)[0].tolist()


class _SecretNoise:
    """Opacus' optimizers with noise from a [`SecureRandom`], added in float64 before the sum is rounded."""

    params: list[nn.Parameter]
    noise_multiplier: float
    max_grad_norm: float
    random: SecureRandom

    def add_noise(self) -> None:
        for parameter in self.params:
            summed = _left_by_opacus(parameter, "summed_grad")
            noise = self.random.normal(summed.shape, self.noise_multiplier * self.max_grad_norm)
            parameter.grad = noise.add_(summed.cpu()).to(summed).view_as(parameter)


class _PrivateOptimizer(_SecretNoise, DPOptimizer):
    pass


class _PrivateGhostOptimizer(_SecretNoise, DPOptimizerFastGradientClipping):
    pass


class PerExampleClipping:
    """Per-example gradients of a model's LoRA parameters, clipped and summed, with Opacus.

    Args:
        model (`torch.nn.Module`): its trainable parameters are weights of linear layers with inputs `(B, T, ...)`.
        mode (`str`): `"hooks"` keeps the gradient of every example; `"ghost"` computes their norms alone and runs a
            second backward pass, in less memory.
        max_grad_norm (`float`): the norm to clip to.

    Raises:
        [`RecipeError`]: parameters whose per-example gradients cannot be computed.
    """

    def __init__(self, model: nn.Module, *, mode: Gradients, max_grad_norm: float):
        check_trainable(model)
        self.model, self.mode = model, mode
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if mode == "ghost":
            self.hooks = GradSampleHooksFastGradientClipping(
                model, loss_reduction="sum", max_grad_norm=max_grad_norm, use_ghost_clipping=True
            )
        else:
            self.hooks = GradSampleHooks(model, loss_reduction="sum")

    def wrap(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        random: SecureRandom,
    ) -> DPOptimizer:
        """The optimizer that sums the clipped gradients, adds noise, and divides by the expected batch size."""
        kind = _PrivateGhostOptimizer if self.mode == "ghost" else _PrivateOptimizer
        private = kind(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        private.random = random
        return private

    def backward(
        self, losses_B: torch.Tensor, optimizer: DPOptimizer, *, unit_of_row_B: torch.Tensor | None = None
    ) -> None:
        """Leave the per-example gradients of one physical batch (in ghost mode their clipped sum) to the optimizer.

        Args:
            losses_B (`torch.Tensor`): the rows' losses.
            optimizer: from [`~PerExampleClipping.wrap`].
            unit_of_row_B (`torch.Tensor`, *optional*): number of each row's group, from 0. The gradients of a group's
                rows are added up before they are clipped, so a group has to lie in one physical batch.
        """
        if self.mode == "ghost":
            DPTensorFastGradientClipping(self.hooks, optimizer, losses_B, "sum").backward()
            counts = {len(_left_by_opacus(parameter, "_norm_sample")) for parameter in self.parameters}
        else:
            losses_B.sum().backward()
            counts = {len(_left_by_opacus(parameter, "grad_sample")) for parameter in self.parameters}
        if counts != {len(losses_B)}:
            raise RecipeError(
                "A layer of the base model mixes examples, so that their gradients cannot be told apart.",
                expected=f"{len(losses_B)} gradients for each parameter",
                found=sorted(counts),
                remedy="leave such layers (mixtures of experts) out of the root's target_modules",
            )
        if unit_of_row_B is not None:
            assert self.mode == "hooks"
            for parameter in self.parameters:
                by_row = _left_by_opacus(parameter, "grad_sample")
                by_unit = by_row.new_zeros((int(unit_of_row_B.max()) + 1, *parameter.shape))
                setattr(parameter, "grad_sample", by_unit.index_add_(0, unit_of_row_B, by_row))  # noqa: B010

    def set_training(self) -> None:
        """Only the trained layers are in training mode, which Opacus' hooks need.

        Dropout is off: its masks go by a row's place in the batch, so that one row less would change those of others.
        """
        self.model.eval()
        for module in self.model.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.train()

    def no_examples(self) -> None:
        """What `backward` leaves for an empty batch: a step like any other, whose sum is 0 and whose noise is not."""
        for parameter in self.parameters:
            if self.mode == "ghost":
                parameter.grad = torch.zeros_like(parameter)
            else:
                setattr(parameter, "grad_sample", parameter.new_zeros((0, *parameter.shape)))  # noqa: B010

    def remove(self) -> None:
        """Take the hooks, and all that they left on parameters and layers, off the model."""
        self.hooks.remove_hooks()
        for parameter in self.parameters:
            for name in ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
        for module in self.model.modules():
            for name in ("activations", "max_batch_len"):
                if name in module.__dict__:
                    delattr(module, name)


def _left_by_opacus(parameter: nn.Parameter, name: str) -> torch.Tensor:
    value = getattr(parameter, name, None)
    assert isinstance(value, torch.Tensor), name
    return value


def check_trainable(model: nn.Module) -> None:
    """Raises [`RecipeError`] where a trainable parameter is not of a linear layer that sees every example."""
    for name, module in model.named_modules():
        trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if trainable and (type(module) is not nn.Linear or ".experts." in name):
            raise RecipeError(
                "The gradient of a single example cannot be computed for a trainable layer.",
                expected="LoRA on linear layers that see every example",
                found=f"{name} ({type(module).__name__})",
                remedy="make a root whose target_modules leave embeddings, convolutions and experts out",
            )


def check_rows_apart(model: nn.Module, max_length: int | None) -> None:
    """Raises [`RecipeError`] where one row of a batch would change what the model makes of the others.

    Position embeddings that stretch with the longest row ("dynamic", "longrope") do so for the whole batch. A single
    long row would then change the gradients of all, which clipping each of them does not bound.
    """
    config = getattr(model, "config").get_text_config()  # noqa: B009
    stated = getattr(config, "rope_parameters", None) or {}
    for rope in [stated] if "rope_type" in stated else stated.values():
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
        if kind not in ("dynamic", "longrope"):
            continue
        own = rope.get("original_max_position_embeddings") if kind == "longrope" else None
        limit = own or config.max_position_embeddings
        if max_length is None or max_length > limit:
            raise RecipeError(
                "The base model reads rows of a batch differently when one of them is long.",
                expected=f"rows of at most {limit} tokens, up to which its positions stay as they are",
                found=f"max_length={max_length}, {kind} position embeddings",
                remedy=f"fine-tune by a recipe with max_length={limit} or less",
            )


def epsilon_of(history: History, delta: float, accountant: AccountantName = "prv") -> float:
    """Epsilon of the steps in `history`, an upper bound within 0.5 % (PRV) of the mechanism's own.

    Raises:
        [`UsageError`]: no such accountant.
    """
    if not history:
        return 0.0
    with _quiet():
        # Rényi first: its bound says how fine PRV's grid must be.
        bound = _measured("rdp", history, delta)
        if accountant == "rdp" or math.isinf(bound):
            return bound
        if accountant != "prv":
            raise UsageError("There is no such accountant.", expected="prv or rdp", found=accountant)
        return _measured("prv", history, delta, eps_error=max(_RELATIVE_TOLERANCE * bound, 1e-4))


def accountant_for(asked: AccountantName, *, epsilon: float, delta: float, steps: int) -> AccountantName:
    """The accountant that is asked for, but Rényi accounting where PRV's grid would be too large: for tens of
    thousands of steps, or a tiny epsilon in thousands of them."""
    precision = max(_RELATIVE_TOLERANCE * epsilon, 1e-4)
    points = (6 + 2 * epsilon) / precision * math.sqrt(steps / 2 * math.log(12e3 / delta))
    return "rdp" if points > _MAX_GRID_POINTS else asked


def coarse_rate(rate: float) -> float:
    """The rate, rounded to a power of the fourth root of two, and at most 1.

    Batch size over number of rows would state the number of rows to everyone; so it is known to a tenth.
    """
    return min(1.0, 2.0 ** (round(4 * math.log2(rate)) / 4))


@lru_cache(maxsize=64)
def plan_noise(privacy: PrivacyArguments, num_units: int, steps: int) -> NoisePlan:
    """What the mechanism will do to so many examples (or groups) in so many steps.

    Args:
        privacy ([`PrivacyArguments`]): the budget, or the noise, with a batch size.
        num_units (`int`): examples, or groups.
        steps (`int`): noisy steps.

    Raises:
        [`UsageError`]: delta is one over the number of units or more, or no noise meets the budget, or the noise
            given leaves no bound worth the name.
    """
    if privacy.delta * num_units >= 1:
        raise UsageError(
            f"With this delta a whole {privacy.unit} could be published within the bound.",
            expected=f"delta well below one over the number of {privacy.unit}s, {1 / num_units:.2g}",
            found=f"delta={privacy.delta:g}",
            remedy=f"say {0.1 / num_units:.0e} or less",
        )
    batch_size, delta = privacy.batch_size, privacy.delta
    assert batch_size is not None
    rate = coarse_rate(batch_size / num_units)
    epsilon, noise = privacy.epsilon, privacy.noise_multiplier
    if noise == 0:
        return NoisePlan(rate, batch_size, 0.0, steps, privacy.accountant, None)
    if noise is not None:
        epsilon = epsilon_of([(noise, rate, steps)], delta, "rdp")
        if epsilon > 2 * MAX_EPSILON:
            raise UsageError(
                "The noise is too small for a bound that means anything.",
                expected=f"epsilon up to {MAX_EPSILON:g}",
                found=f"noise_multiplier={noise:g}: epsilon about {epsilon:.3g}",
                remedy="raise noise_multiplier, or give epsilon",
            )
    assert epsilon is not None
    accountant = accountant_for(privacy.accountant, epsilon=epsilon, delta=delta, steps=steps)
    if noise is None:
        noise = noise_multiplier_for(epsilon, delta, sample_rate=rate, steps=steps, accountant=accountant)
    return NoisePlan(rate, batch_size, noise, steps, accountant, epsilon_of([(noise, rate, steps)], delta, accountant))


def noise_multiplier_for(
    epsilon: float, delta: float, *, sample_rate: float, steps: int, accountant: AccountantName = "prv"
) -> float:
    """The least noise that keeps `steps` steps within the budget, to 0.5 % of epsilon.

    Raises:
        [`UsageError`]: a budget, rate or number of steps out of range, or a budget that no noise meets.
    """
    if (
        not MIN_EPSILON <= epsilon <= MAX_EPSILON
        or not MIN_DELTA <= delta <= MAX_DELTA
        or not 0 < sample_rate <= 1
        or steps < 1
    ):
        raise UsageError(
            "No noise can be chosen for this budget.",
            expected=f"epsilon {MIN_EPSILON:g} to {MAX_EPSILON:g}, delta {MIN_DELTA:g} to {MAX_DELTA:g}, 0 < sample "
            "rate <= 1, at least one step",
            found=f"epsilon={epsilon}, delta={delta}, sample rate={sample_rate}, steps={steps}",
        )

    def spent(name: AccountantName, noise: float) -> float:
        return epsilon_of([(noise, sample_rate, steps)], delta, name)

    if accountant_for(accountant, epsilon=epsilon, delta=delta, steps=steps) == "rdp":
        return _least_noise(partial(spent, "rdp"), epsilon, 1.0)
    # A start of the right size: what noise of standard deviation s costs is about rate * sqrt(steps) / s.
    rough = 4 * sample_rate * math.sqrt(steps * math.log(1.25 / delta)) / epsilon
    return _least_noise(partial(spent, "prv"), epsilon, max(0.5, min(rough, 1e4)))


def _least_noise(spent: Callable[[float], float], epsilon: float, start: float) -> float:
    """Least noise with `spent(noise)` in (0.995 epsilon, epsilon], near `start`.

    Epsilon is close to a power of the noise, so a secant in logarithms needs few of the costly evaluations.
    """
    goal = math.log(epsilon * (1 - _RELATIVE_TOLERANCE / 2))
    points: list[tuple[float, float]] = []  # (log noise, log epsilon)
    position, enough = math.log(start), math.inf
    for _ in range(40):
        if position > _MAX_LOG_NOISE:
            break
        used = spent(math.exp(position))
        if used <= epsilon:
            enough = min(enough, position)
            if used > (1 - _RELATIVE_TOLERANCE) * epsilon or position <= _MIN_LOG_NOISE:
                break
        points.append((position, math.log(max(used, 1e-9))))
        (x1, y1), (x0, y0) = points[-1], points[-2] if len(points) > 1 else (points[-1][0] + 1.0, points[-1][1] - 1.0)
        slope = min((y1 - y0) / (x1 - x0) if x1 != x0 else -1.0, -0.2)
        position = max(x1 + max(-1.0, min(1.0, (goal - y1) / slope)), _MIN_LOG_NOISE)
    if enough == math.inf:
        raise UsageError("No noise meets this budget.", found=f"epsilon={epsilon}", remedy="raise epsilon or delta")
    return math.exp(enough)


def _measured(name: str, history: History, delta: float, **arguments: float) -> float:
    accountant = _ACCOUNTANTS[name]()
    accountant.history = [tuple(entry) for entry in history]
    return float(accountant.get_epsilon(delta=delta, **arguments))


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus warns when the best Rényi order is the first or last of its list: the bound holds, and is looser.

    At a sample rate of 1 its PRV takes the logarithm of 0, as it should.
    """
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        yield

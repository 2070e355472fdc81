"""The parts of DP-SGD: Poisson batches, per-example clipping, noise from a target epsilon, and the accountants.

Shape legend: B examples of one physical batch.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn
from torch.utils.data import Sampler

from ..errors import RecipeError, UsageError


Gradients = Literal["hooks", "ghost"]
AccountantName = Literal["prv", "rdp"]
# (noise multiplier, sample rate, steps), as Opacus keeps it.
History = list[tuple[float, float, int]]

_ACCOUNTANTS = {"prv": PRVAccountant, "rdp": RDPAccountant}
_RELATIVE_TOLERANCE = 5e-3
_MAX_LOG_NOISE = 14.0


def secret_generator(device: torch.device | str = "cpu", *, seed: int | None = None) -> torch.Generator:
    """A generator seeded by the operating system; who knows the seed can take the noise away again.

    Args:
        device (`torch.device`): where it draws.
        seed (`int`, *optional*): a known seed, for tests. The result is then not private.
    """
    return torch.Generator(device).manual_seed(secrets.randbits(63) if seed is None else seed)


class PoissonBatchSampler(Sampler[list[int]]):
    """Each batch holds every example with the same probability, independently: batches differ in size, some are empty.

    Args:
        num_examples (`int`): of the data set.
        sample_rate (`float`): the probability.
        num_batches (`int`): batches of one pass over the sampler.
        generator (`torch.Generator`): draws them; on the CPU.
    """

    def __init__(self, num_examples: int, sample_rate: float, num_batches: int, generator: torch.Generator):
        self.num_examples, self.sample_rate = num_examples, sample_rate
        self.num_batches, self.generator = num_batches, generator

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            # float64: with float32's 24 bits the rate itself would be rounded.
            draws = torch.rand(self.num_examples, generator=self.generator, dtype=torch.float64)
            yield (draws < self.sample_rate).nonzero(as_tuple=True)[0].tolist()


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
        generator: torch.Generator,
    ) -> DPOptimizer:
        """The optimizer that sums the clipped gradients, adds noise, and divides by the expected batch size."""
        kind = DPOptimizerFastGradientClipping if self.mode == "ghost" else DPOptimizer
        return kind(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
            generator=generator,
        )

    def backward(self, losses_B: torch.Tensor, optimizer: DPOptimizer) -> None:
        """Leave the per-example gradients of one physical batch (in ghost mode their clipped sum) to the optimizer."""
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
        return _measured("prv", history, delta, eps_error=min(0.01, max(_RELATIVE_TOLERANCE * bound, 1e-4)))


def noise_multiplier_for(
    epsilon: float, delta: float, *, sample_rate: float, steps: int, accountant: AccountantName = "prv"
) -> float:
    """The least noise that keeps `steps` steps within the budget, to 0.5 % of epsilon.

    Raises:
        [`UsageError`]: a budget, rate or number of steps out of range, or a budget that no noise meets.
    """
    if not 0 < epsilon < math.inf or not 0 < delta < 1 or not 0 < sample_rate <= 1 or steps < 1:
        raise UsageError(
            "No noise can be chosen for this budget.",
            expected="0 < epsilon, 0 < delta < 1, 0 < sample rate <= 1, at least one step",
            found=f"epsilon={epsilon}, delta={delta}, sample rate={sample_rate}, steps={steps}",
        )

    def spent(name: AccountantName, noise: float) -> float:
        return epsilon_of([(noise, sample_rate, steps)], delta, name)

    if accountant == "rdp":
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
        if abs(position) > _MAX_LOG_NOISE:
            break
        used = spent(math.exp(position))
        if used <= epsilon:
            enough = min(enough, position)
            if used > (1 - _RELATIVE_TOLERANCE) * epsilon:
                break
        points.append((position, math.log(used)))
        (x1, y1), (x0, y0) = points[-1], points[-2] if len(points) > 1 else (points[-1][0] + 1.0, points[-1][1] - 1.0)
        slope = min((y1 - y0) / (x1 - x0) if x1 != x0 else -1.0, -0.2)
        position = x1 + max(-1.0, min(1.0, (goal - y1) / slope))
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

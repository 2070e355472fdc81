"""What a private fine-tune is asked for, and what follows from it before a row is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError


Gradients = Literal["hooks", "ghost"]
AccountantName = Literal["prv", "rdp"]

# Below, the noise hides everything that could be learned; above, the bound promises nothing.
MIN_EPSILON, MAX_EPSILON = 0.01, 100.0
# Below, the accountants' arithmetic ends; above, every hundredth row may be published.
MIN_DELTA, MAX_DELTA = 1e-12, 1e-2


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The budget of a fine-tune, and how it is spent.

    Args:
        epsilon (`float`, *optional*), delta (`float`): the budget; the noise is chosen for it. Epsilon is 0.01 to 100,
            delta 1e-12 to 0.01 and below one over the number of rows (or groups).
        noise_multiplier (`float`, *optional*): the noise itself, instead of epsilon.
        max_grad_norm (`float`, *optional*, defaults to 1.0): clipping norm of one example's (or group's) gradient.
        batch_size (`int`, *optional*): expected examples (or groups) of a step; default: the recipe's rows per step.
        gradients (`str`, *optional*, defaults to `"hooks"`): `"hooks"` or `"ghost"`; the same mechanism.
        accountant (`str`, *optional*, defaults to `"prv"`): `"prv"` or `"rdp"`.
        group_column (`str`, *optional*): a column of the rows. Rows with one value of it are one group (a patient),
            and the bound is for adding or removing a whole group. Needs `gradients="hooks"`.
        max_rows_per_group (`int`, *optional*, defaults to 8): rows of a group that one step reads at most, drawn anew
            in each; a number that must not be chosen by looking at the rows.
        allow_early_stopping (`bool`, *optional*, defaults to `False`): let private rows, without noise, decide when to
            stop. The bound does not cover those rows, and the adapter says so.
        known_seed (`int`, *optional*): makes noise and batches repeatable, and the result *not private*, for tests and
            simulations: the adapter then states no bound.

    Raises:
        [`UsageError`]: neither or both of epsilon and noise, or a value out of range.
    """

    delta: float
    epsilon: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    batch_size: int | None = None
    gradients: Gradients = "hooks"
    accountant: AccountantName = "prv"
    group_column: str | None = None
    max_rows_per_group: int = 8
    allow_early_stopping: bool = False
    known_seed: int | None = None

    def __post_init__(self) -> None:
        least_noise = 0.0 if self.known_seed is not None else 1e-3
        checks = {
            "epsilon": (self.epsilon is None) != (self.noise_multiplier is None)
            and (self.epsilon is None or MIN_EPSILON <= self.epsilon <= MAX_EPSILON),
            "delta": MIN_DELTA <= self.delta <= MAX_DELTA,
            "noise_multiplier": self.noise_multiplier is None or least_noise <= self.noise_multiplier < float("inf"),
            "max_grad_norm": 0 < self.max_grad_norm < float("inf"),
            "batch_size": self.batch_size is None or self.batch_size >= 1,
            "gradients": self.gradients in ("hooks", "ghost"),
            "accountant": self.accountant in ("prv", "rdp"),
            "max_rows_per_group": self.max_rows_per_group >= 1,
        }
        for name, holds in checks.items():
            if not holds:
                raise UsageError(
                    f"`{name}` of the privacy arguments is out of range.",
                    expected=f"epsilon {MIN_EPSILON:g} to {MAX_EPSILON:g} or a noise_multiplier above 0 but not both, "
                    f"delta {MIN_DELTA:g} to {MAX_DELTA:g}, max_grad_norm > 0, batch_size and max_rows_per_group >= "
                    "1, gradients hooks or ghost, accountant prv or rdp",
                    found=getattr(self, name),
                )
        if self.group_column is not None and self.gradients == "ghost":
            raise UsageError(
                "Ghost clipping never sees the gradient of a group.",
                expected="gradients hooks where rows are grouped",
                found=f"gradients=ghost, group_column={self.group_column}",
                remedy="leave dp_gradients out, or do not group the rows",
            )

    @property
    def unit(self) -> str:
        """What the bound is about adding or removing: an `"example"` (a row) or a `"group"`."""
        return "example" if self.group_column is None else "group"


@dataclass(frozen=True)
class NoisePlan:
    """The noise of a fine-tune, known before it starts.

    Args:
        sample_rate (`float`): probability with which each example (or group) is in a step's batch.
        expected_batch_size (`int`): the fixed number that the noisy sum of a step is divided by.
        noise_multiplier (`float`): standard deviation of the noise over the clipping norm.
        steps (`int`): noisy steps.
        accountant (`str`): what computes epsilon.
        epsilon (`float`, *optional*): what all steps spend; `None` without noise.
    """

    sample_rate: float
    expected_batch_size: int
    noise_multiplier: float
    steps: int
    accountant: AccountantName
    epsilon: float | None

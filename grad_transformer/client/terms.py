"""What a client agrees to before its fine-tune starts: a mapper's recipe, and what privacy it leaves.

The recipe comes from the provider, and decides how long the client computes and how much noise it needs. It is shown,
held to limits that are the client's own, and where it is unusual the client has to say yes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers.utils import logging

from ..adapters.privacy import UNUSUAL_TERMS
from ..errors import RecipeError, UsageError
from ..finetuning import BasePreview, FineTuningRecipe
from .arguments import NoisePlan, PrivacyArguments
from .output import Spent


logger = logging.get_logger(__name__)

# Recipes beyond these are refused, whoever accepts them.
_HARD_LIMITS = {"max_steps": 100_000, "rows_per_step": 2**14, "learning_rate": 10.0, "max_length": 2**17}
# Beyond these they have to be accepted: field, limit, code.
_USUAL_LIMITS = (
    ("max_steps", 20_000, "many_steps"),
    ("rows_per_step", 1024, "large_batch"),
    ("learning_rate", 0.1, "large_learning_rate"),
    ("max_length", 32_768, "long_rows"),
)
_FEW_PRIVATE_STEPS = 5
_LARGE_SAMPLE_RATE = 0.5


@dataclass(frozen=True, kw_only=True)
class ClientTerms:
    """What a fine-tune will do with a client's rows.

    Args:
        base ([`BasePreview`]): the base model, and whether it is to be downloaded.
        named_by_mapper (`bool`): whether the mapper names it, and not the client.
        recipe ([`FineTuningRecipe`]): how it will be trained.
        num_rows (`int`): the client's rows.
        privacy ([`PrivacyArguments`], *optional*): the budget; `None`: no differential privacy.
        noise ([`NoisePlan`], *optional*): the mechanism that follows from it.
        num_units (`int`, *optional*): examples or groups that the bound counts.
        earlier ([`Spent`], *optional*): what was spent in the output folder before.

    Raises:
        [`RecipeError`]: the recipe is beyond what any client should run.
    """

    base: BasePreview
    named_by_mapper: bool
    recipe: FineTuningRecipe
    num_rows: int
    privacy: PrivacyArguments | None = None
    noise: NoisePlan | None = None
    num_units: int | None = None
    earlier: Spent = Spent()

    def __post_init__(self) -> None:
        for name, limit in _HARD_LIMITS.items():
            if getattr(self.recipe, name) > limit:
                raise RecipeError(
                    f"The recipe's `{name}` is beyond what a client runs.",
                    expected=f"at most {limit:g}",
                    found=getattr(self.recipe, name),
                    remedy="ask the provider why, or pass a recipe of your own",
                )

    @property
    def unusual(self) -> tuple[str, ...]:
        """Codes of [`UNUSUAL_TERMS`] that apply."""
        found = [code for name, limit, code in _USUAL_LIMITS if getattr(self.recipe, name) > limit]
        if self.noise is not None:
            if self.noise.steps < _FEW_PRIVATE_STEPS:
                found.append("few_steps")
            if self.noise.sample_rate >= _LARGE_SAMPLE_RATE:
                found.append("whole_batch")
            if self.earlier.unbounded:
                found.append("unbounded_before")
        if self.earlier.epsilon:
            found.append("spent_before")
        return tuple(found)

    @property
    def unconfirmed_base(self) -> bool:
        """Whether the mapper's word alone has a base model downloaded."""
        return self.named_by_mapper and self.base.place == "hub"

    def text(self) -> str:
        """The terms for people, a line each."""
        recipe = self.recipe
        lines = [
            ("base model", self.base.describe() + (", as the mapper names it" if self.named_by_mapper else "")),
            (
                "steps",
                f"{recipe.max_steps} of {recipe.rows_per_step} rows: "
                f"{recipe.num_examples / self.num_rows:.3g} passes over {self.num_rows} rows",
            ),
            (
                "learning rate",
                f"{recipe.learning_rate:g} ({recipe.lr_scheduler_type}), rows of up to {recipe.max_length} tokens",
            ),
            *self._privacy_lines(),
            *(("unusual", UNUSUAL_TERMS[code]) for code in self.unusual),
        ]
        return "\n".join(["This fine-tune:", *(f"  {f'{name}:':<16}{words}" for name, words in lines)])

    def _privacy_lines(self) -> list[tuple[str, str]]:
        if self.privacy is None or self.noise is None:
            return [("privacy", "none: an adapter can reveal rows it was trained on; only --dp_epsilon bounds that")]
        unit, noise, epsilon = self.privacy.unit, self.noise, self.noise.epsilon
        if epsilon is None or self.privacy.known_seed is not None:
            return [("privacy", "none: the noise is known, or there is none")]
        lines = [
            (
                "privacy",
                f"epsilon {epsilon:.4g} at delta {self.privacy.delta:g}, for adding or removing one {unit}",
            ),
            (
                "noise",
                f"{noise.noise_multiplier:.4g} times the clipping norm {self.privacy.max_grad_norm:g}, in each of "
                f"{noise.steps} steps, which draw each of {self.num_units} {unit}s with probability "
                f"{noise.sample_rate:.3g}",
            ),
        ]
        if self.earlier.epsilon:
            total = epsilon + self.earlier.epsilon, self.privacy.delta + self.earlier.delta
            lines.append(
                (
                    "spent before",
                    f"epsilon {self.earlier.epsilon:.4g} in this folder; in total ({total[0]:.4g}, {total[1]:g})",
                )
            )
        return lines


def agree(terms: ClientTerms, accept_recipe: bool | Callable[[ClientTerms], bool]) -> None:
    """Show the terms; where they are unusual or a base model is to be downloaded, go on only if they are accepted.

    Args:
        terms ([`ClientTerms`]): what will be done.
        accept_recipe (`bool` or `Callable`): whether such terms are accepted, or who is asked.

    Raises:
        [`UsageError`]: such terms, not accepted.
    """
    logger.info(terms.text())
    if not (terms.unusual or terms.unconfirmed_base):
        return
    if accept_recipe(terms) if callable(accept_recipe) else accept_recipe:
        return
    if not terms.unusual:
        raise UsageError(
            "The base model that the mapper names was not accepted.",
            expected="a base model of this machine, one that you name, or a yes",
            found=terms.base.describe(),
            remedy=f"if it is the one that you mean: --base_model {terms.base.name}, or --accept_recipe "
            "(accept_recipe=True)",
        )
    raise UsageError(
        "The terms of this fine-tune are unusual, and were not accepted.",
        expected="terms that are usual, or accepted",
        found="; ".join(UNUSUAL_TERMS[code] for code in terms.unusual),
        remedy="if you trust the provider and mean it: --accept_recipe (accept_recipe=True)",
    )

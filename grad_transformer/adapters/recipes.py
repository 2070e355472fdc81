"""Recipes as adapters and mappers record them, compared field by field. A client's is text to be validated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterFormatError
from ..wording import in_ascii
from .privacy import STATEMENT_KEY


RECIPE_KEY = "recipe"

# What decides where a fine-tune ends. Not among them: which steps are recorded, and how rows are cut into passes.
_DECIDING = (
    "learning_rate",
    "max_steps",
    "rows_per_step",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "lr_scheduler_type",
    "max_length",
    "early_stopping_window",
)
# Fine-tunes with DP-SGD clip each example, draw batches of a size of their own, and never stop early.
_NOT_WHERE_PRIVATE = ("max_grad_norm", "rows_per_step", "early_stopping_window")
_MOST_FIELDS = 64


def recipe_differences(
    metadata: Mapping[str, Any], recipe: Mapping[str, Any] | None, *, path: str | None = None
) -> list[str] | None:
    """How the recipe in an adapter's metadata differs from the one of the mapper's shadow runs.

    Args:
        metadata (`Mapping`): of the client's adapter.
        recipe (`Mapping`, *optional*): of the mapper's source tokenizer.
        path (`str`, *optional*): named in errors.

    Returns:
        `field: theirs, the mapper's ours` for each field that decides where a fine-tune ends and differs; `None` where
        one of the two says nothing (a plain PEFT adapter).

    Raises:
        [`AdapterFormatError`]: the adapter's recipe is not an object of short values.
    """
    stated = metadata.get(RECIPE_KEY)
    if stated is None or recipe is None:
        return None
    if not isinstance(stated, Mapping) or len(stated) > _MOST_FIELDS or not all(map(_is_plain, stated.values())):
        raise AdapterFormatError(
            "The adapter's recipe cannot be read.",
            path=path,
            expected="an object of numbers and names",
            found=in_ascii(stated, 80),
            remedy=f"write it again with this library, or remove `{RECIPE_KEY}` from the adapter's metadata",
        )
    ours, theirs = _deciding(recipe), _deciding(stated)
    private = metadata.get(STATEMENT_KEY) is not None
    return [
        f"{name}: {_shown(theirs[name])}, the mapper's {_shown(ours[name])}"
        for name in _DECIDING
        if not _same(ours[name], theirs[name]) and not (private and name in _NOT_WHERE_PRIVATE)
    ]


def _deciding(recipe: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: recipe.get(name) for name in _DECIDING}
    sizes = recipe.get("per_device_batch_size"), recipe.get("gradient_accumulation_steps", 1)
    if all(isinstance(size, int) for size in sizes):
        values["rows_per_step"] = math.prod(sizes)
    return values


def _is_plain(value: Any) -> bool:
    # Integers of JSON have no bounds, and those of a recipe are small.
    return (
        value is None
        or (isinstance(value, str) and len(value) <= 64)
        or (isinstance(value, int | float) and abs(value) < 2**63)
    )


def _same(ours: Any, theirs: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (ours, theirs))
    return math.isclose(ours, theirs, rel_tol=1e-9) if numbers else ours == theirs


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return in_ascii(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)

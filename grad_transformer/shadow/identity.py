"""Which pairs a mapper was trained on, so that others are not taken for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import DeltaDatasetError
from ..finetuning import FineTuningRecipe
from ..modeling_grad_transformer import GradTransformer
from .plan import ROLES


if TYPE_CHECKING:
    from .dataset import DeltaDataset


logger = logging.get_logger(__name__)

_REMEDY = "give the delta dataset that the mapper was trained on, or train a mapper on this one"


def dataset_fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a delta dataset is made of: plan, roots, recipes, and the hash of every file of pairs."""
    said = {
        "plan": manifest["plan_fingerprint"],
        "roots": {role: manifest["roots"][role]["fingerprint"] for role in ROLES},
        "recipes": manifest["recipes"],
        "files": manifest["files"],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check_dataset_of(mapper: GradTransformer, deltas: DeltaDataset) -> None:
    """Refuse a delta dataset that the mapper was not trained on: whatever is fitted or measured on it would be wrong.

    Another build of the same plan, for instance with runs that were missing before, is told and accepted. Of a mapper
    from before datasets were recorded only roots and recipes can be compared, which is said.

    Raises:
        [`DeltaDatasetError`]: another plan, other roots or other recipes.
    """
    for role, tokenizer in zip(ROLES, mapper.tokenizers(), strict=True):
        expected = tokenizer.root.fingerprint
        found = deltas.manifest["roots"][role]["fingerprint"]
        if found != expected:
            raise _other(deltas, f"{role} root {expected[:12]}", found[:12])
        recipe = deltas.manifest["recipes"][role]
        if tokenizer.recipe is not None and _recipe(tokenizer.recipe) != _recipe(recipe):
            differing = sorted(name for name in recipe if recipe[name] != tokenizer.recipe.get(name))
            raise _other(
                deltas,
                f"{role} recipe with " + ", ".join(f"{name}={tokenizer.recipe.get(name)}" for name in differing),
                ", ".join(f"{name}={recipe[name]}" for name in differing) or "another recipe",
            )
    recorded = mapper.config.delta_dataset or {}
    plan, fingerprint = recorded.get("plan_fingerprint"), recorded.get("fingerprint")
    if plan is None:
        logger.warning(
            "The mapper does not record its delta dataset: roots and recipes agree, more could not be checked."
        )
    elif plan != deltas.manifest["plan_fingerprint"]:
        raise _other(deltas, f"plan {plan[:12]}", deltas.manifest["plan_fingerprint"][:12])
    elif fingerprint != deltas.fingerprint:
        logger.warning("The delta dataset is another build of the plan that the mapper was trained on.")


def _recipe(recipe: Mapping[str, Any]) -> str:
    return FineTuningRecipe.from_dict(recipe).fingerprint


def _other(deltas: DeltaDataset, expected: str, found: str) -> DeltaDatasetError:
    return DeltaDatasetError(
        "The mapper was trained on another delta dataset.",
        path=deltas.folder,
        expected=expected,
        found=found,
        remedy=_REMEDY,
    )

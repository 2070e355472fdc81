"""Checks of clients' adapters: copies, recipes, shift and norms, and what may not be mapped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grad_transformer.adapters import LoraAdapter, ShiftReference, check_clients, counted_clients, pick_weights
from grad_transformer.adapters.checks import duplicates
from grad_transformer.adapters.recipes import recipe_differences
from grad_transformer.constants import MAXIMUM_SHIFT
from grad_transformer.errors import AdapterFormatError, RecipeError, UsageError
from grad_transformer.finetuning import FineTuningRecipe
from tests.worlds import moved, tiny_root


RECIPE = FineTuningRecipe(learning_rate=0.03, adam_epsilon=0.1, max_steps=120, max_length=32).to_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_root(tmp_path_factory.mktemp("checks"))


@pytest.fixture(scope="module")
def shadows(root: Any) -> torch.Tensor:
    return deltas_of(root, [moved(root, seed=seed) for seed in range(100, 150)])


@pytest.fixture(scope="module")
def reference(root: Any, shadows: torch.Tensor) -> ShiftReference:
    return ShiftReference.fit(shadows[:30], shadows[30:], layout=root.layout)


def deltas_of(root: Any, clients: list[LoraAdapter]) -> torch.Tensor:
    return torch.stack([client.flat() - root.adapter.flat() for client in clients])


def checked(root: Any, deltas_NP: torch.Tensor, reference: ShiftReference | None = None, **arguments: Any) -> Any:
    clients = [root.adapter.with_values(root.adapter.flat() + delta_P) for delta_P in deltas_NP]
    for client in clients:
        client.metadata.update(arguments.get("metadata", {}))
    settings = {name: value for name, value in arguments.items() if name != "metadata"}
    names = [f"bank-{number}" for number in range(len(clients))]
    return check_clients(clients, deltas_NP, reference=reference, names=names, **{"recipe": RECIPE, **settings})


# Copies


def test_copies_scaled_and_rounded_ones_too_are_known_by_the_first(root: Any, shadows: torch.Tensor) -> None:
    first, second = shadows[:2]
    rounded = first.to(torch.bfloat16).float()
    assert duplicates(torch.stack([first, second, first, 3 * first, rounded, second])) == [None, None, 0, 0, 0, 1]
    # Another fine-tune that points nearly the same way is no copy, and neither is its negative.
    near = first + 0.05 * first.norm() / second.norm() * second
    zero = torch.zeros_like(first)
    assert duplicates(torch.stack([first, near, -first, zero, zero])) == [None] * 5


def test_a_copy_counts_once_unless_it_is_allowed(root: Any, shadows: torch.Tensor) -> None:
    checks = checked(root, shadows[[0, 1, 0, 0]])
    assert checks[2].describe() == "the same adapter as client 1"
    names = ["a", "b", "c", "d"]
    assert counted_clients(checks, names, allow_duplicates=False, disjoint_clients=False) == [0, 1]
    assert counted_clients(checks, names, allow_duplicates=True, disjoint_clients=False) == [0, 1, 2, 3]
    for allowed in (False, True):
        with pytest.raises(UsageError, match="not disjoint") as caught:
            counted_clients(checks, names, allow_duplicates=allowed, disjoint_clients=True)
        assert caught.value.path == "c" and "a again" in str(caught.value.found)
    assert pick_weights([1.0, 2.0, 3.0, 4.0], [0, 1], 4) == [1.0, 2.0]
    assert pick_weights(None, [0, 1], 4) is None
    with pytest.raises(UsageError, match="one weight for each"):
        pick_weights([1.0, 2.0], [0, 1], 4)


# Shift and norms


def test_b_alone_scaled_and_one_long_block_are_refused_and_honest_clients_are_not(
    root: Any, shadows: torch.Tensor, reference: ShiftReference
) -> None:
    honest = deltas_of(root, [moved(root, seed=seed) for seed in range(40)])
    assert all(check.shift.shift < MAXIMUM_SHIFT / 2 for check in checked(root, honest, reference))
    usual = shadows.norm(dim=1).mean()
    of_b = root.layout.flatten(
        {spec.key: torch.full(spec.shape, float(spec.side == "B")) for spec in root.layout.tensor_specs()}
    )
    scaled = honest[0] + honest[0] * of_b / (honest[0] * of_b).norm() * 25 * usual
    block = honest[0].clone()
    block[: root.layout.widths[0]] *= 20
    for attack in (scaled, block):
        with pytest.raises(UsageError) as caught:
            checked(root, torch.stack([honest[1], attack]), reference)
        assert caught.value.path == "bank-1"
        (check,) = checked(root, attack[None], reference, max_shift=math.inf)
        assert check.shift.size > 5 and "times its usual norm" in check.describe()


def test_a_part_can_be_too_long_where_the_whole_lies_near(root: Any, shadows: torch.Tensor) -> None:
    # A block that no shadow moved counts nowhere in the distance.
    still = shadows.clone()
    still[:, root.layout.widths[0] :] = 0
    reference = ShiftReference.fit(still[:30], still[30:], layout=root.layout)
    hiding = still[0].clone()
    hiding[root.layout.widths[0] :] = shadows[0, root.layout.widths[0] :]
    with pytest.raises(UsageError, match="Part of a client's delta"):
        checked(root, hiding[None], reference)
    with pytest.raises(UsageError, match="Part of a client's delta"):
        checked(root, hiding[None], reference, max_shift=6.0)
    assert len(checked(root, hiding[None], reference, max_shift=math.inf)) == 1


def test_limits_that_are_none_and_references_that_are_missing(root: Any, shadows: torch.Tensor) -> None:
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="no limit"):
            checked(root, shadows[:1], max_shift=wrong)
    with pytest.raises(UsageError, match="cannot be measured"):
        checked(root, shadows[:1], max_shift=2.0)
    for given in (None, math.inf):
        (check,) = checked(root, shadows[:1], max_shift=given)
        assert check.shift is None and "not checked" in check.describe()


# Recipes


def test_recipes_are_compared_field_by_field() -> None:
    other = {**RECIPE, "learning_rate": 0.001, "lr_scheduler_type": "cosine", "snapshot_last": 5}
    assert recipe_differences({"recipe": other}, RECIPE) == [
        "learning_rate: 0.001, the mapper's 0.03",
        "lr_scheduler_type: 'cosine', the mapper's 'linear'",
    ]
    cut_otherwise = {**RECIPE, "per_device_batch_size": 4, "gradient_accumulation_steps": 4, "snapshot_every": 3}
    assert recipe_differences({"recipe": cut_otherwise}, RECIPE) == []
    stops = {**RECIPE, "early_stopping_window": 7}
    assert recipe_differences({"recipe": stops}, RECIPE) == ["early_stopping_window: 7, the mapper's none"]
    assert recipe_differences({}, RECIPE) is None
    assert recipe_differences({"recipe": RECIPE}, None) is None


def test_private_clients_differ_where_the_mechanism_says_so() -> None:
    private = {**RECIPE, "max_grad_norm": 0.5, "per_device_batch_size": 64}
    assert len(recipe_differences({"recipe": private}, RECIPE) or ()) == 2
    stated = {"recipe": private, "differential_privacy": {"epsilon": 1.0}}
    assert recipe_differences(stated, RECIPE) == []
    stated["recipe"] = {**private, "max_steps": 5}
    assert recipe_differences(stated, RECIPE) == ["max_steps: 5, the mapper's 120"]


@pytest.mark.parametrize(
    "broken",
    [
        "fast",
        [1],
        {"learning_rate": [1e-3]},
        {"learning_rate": "x" * 65},
        {"max_steps": 10**400},
        {f"field {number}": 0 for number in range(65)},
    ],
)
def test_recipes_that_are_none_are_refused(broken: Any) -> None:
    with pytest.raises(AdapterFormatError, match="recipe cannot be read"):
        recipe_differences({"recipe": broken}, RECIPE)


def test_what_a_client_writes_reaches_no_terminal_as_it_is() -> None:
    (words,) = recipe_differences({"recipe": {**RECIPE, "lr_scheduler_type": "\x1b[2J\u202egood"}}, RECIPE) or ()
    assert words.isprintable() and words.isascii()


def test_another_recipe_is_refused_unless_it_is_allowed(root: Any, shadows: torch.Tensor) -> None:
    metadata = {"recipe": {**RECIPE, "max_steps": 10}}
    with pytest.raises(RecipeError, match="another recipe") as caught:
        checked(root, shadows[:1], metadata=metadata)
    assert "max_steps: 10, the mapper's 120" in str(caught.value.found)
    (check,) = checked(root, shadows[:1], metadata=metadata, allow_other_recipe=True)
    assert "another recipe (max_steps: 10, the mapper's 120)" in check.describe()
    assert "the mapper's recipe" in checked(root, shadows[:1], metadata={"recipe": RECIPE})[0].describe()
    assert "recipe not stated" in checked(root, shadows[:1])[0].describe()

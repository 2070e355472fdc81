"""What a provider learns of clients' adapters before it maps them: copies, foreign recipes, shift, norms by block.

Everything that a client sends is its own word or its own numbers. A copy that was changed a little, or a delta that
was made to look like the shadows', is not found here: rules that bear dishonest clients are for that.

Shape legend: N clients, P values of a delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..constants import MAXIMUM_SHIFT, MAXIMUM_SIZE
from ..errors import RecipeError, UsageError
from .adapter import LoraAdapter
from .recipes import recipe_differences
from .rows import column_chunks
from .shift import ShiftReference, ShiftReport


logger = logging.get_logger(__name__)

# Deltas whose cosine is above are one adapter sent twice.
DUPLICATE_COSINE = 0.9999


@dataclass(frozen=True)
class ClientCheck:
    """What was found of one client.

    Args:
        duplicate_of (`int`, *optional*): number, from 0, of the earlier client whose adapter this one is.
        recipe_differences (`list[str]`, *optional*): fields of its recipe that are not the mapper's, with both values;
            `None` where the adapter, or the mapper, names no recipe.
        shift ([`ShiftReport`], *optional*): `None` where the mapper says nothing of its shadows.
    """

    duplicate_of: int | None
    recipe_differences: list[str] | None
    shift: ShiftReport | None

    def to_dict(self) -> dict[str, Any]:
        """All but the shift, which metadata hold beside it."""
        return {"duplicate_of": self.duplicate_of, "recipe_differences": self.recipe_differences}

    def describe(self) -> str:
        """One line in words."""
        if self.duplicate_of is not None:
            return f"the same adapter as client {self.duplicate_of + 1}"
        words = [
            "distance from the shadows and norms by block not checked: the mapper was saved without a record of its "
            "shadows"
            if self.shift is None
            else self.shift.describe()
        ]
        if self.recipe_differences is None:
            words.append("recipe not stated")
        elif self.recipe_differences:
            words.append(f"another recipe ({'; '.join(self.recipe_differences)})")
        else:
            words.append("the mapper's recipe")
        return "; ".join(words)


def check_clients(
    clients: Sequence[LoraAdapter],
    deltas_NP: torch.Tensor,
    *,
    recipe: Mapping[str, Any] | None,
    reference: ShiftReference | None,
    names: Sequence[str],
    max_shift: float | None = None,
    allow_other_recipe: bool = False,
) -> list[ClientCheck]:
    """Check clients' adapters, which were read and fit the mapper's root, and refuse what must not be mapped.

    Args:
        clients (`Sequence[LoraAdapter]`), deltas_NP (`torch.Tensor`): N of them, and their deltas.
        recipe (`Mapping`, *optional*): of the mapper's TinyLM shadow runs.
        reference ([`ShiftReference`], *optional*): the mapper's.
        names (`Sequence[str]`): of the clients, for errors.
        max_shift (`float`, *optional*): refuse clients whose shift is greater; default: `MAXIMUM_SHIFT` where the
            mapper has a reference. The limit of the size is `MAXIMUM_SIZE`, or half of a `max_shift` that is more than
            twice that. Infinity switches both off.
        allow_other_recipe (`bool`, *optional*, defaults to `False`).

    Returns:
        `list[ClientCheck]`

    Raises:
        [`UsageError`]: a client lies too far or is too long; or `max_shift` is no limit, or cannot be checked.
        [`RecipeError`]: a client was fine-tuned by another recipe.
        [`AdapterFormatError`]: a client's recipe cannot be read.
    """
    if max_shift is not None and not max_shift > 0:
        raise UsageError("`max_shift` is no limit.", expected="more than 0; inf for no limit", found=max_shift)
    if reference is None and max_shift is not None and math.isfinite(max_shift):
        raise UsageError(
            "The shift of the clients cannot be measured: the mapper was saved without a record of its shadows.",
            expected="a mapper with shift.json",
            remedy="train the mapper again, or leave max_shift out",
        )
    shifts = [None] * len(clients) if reference is None else reference.measure(deltas_NP)
    checks = [
        ClientCheck(copy, recipe_differences(client.metadata, recipe, path=name), shift)
        for client, name, copy, shift in zip(clients, names, duplicates(deltas_NP), shifts, strict=True)
    ]
    limit = MAXIMUM_SHIFT if max_shift is None else max_shift
    for name, check in zip(names, checks, strict=True):
        if check.shift is not None:
            _check_shift(check.shift, limit, name)
        if check.recipe_differences and not allow_other_recipe:
            raise RecipeError(
                "A client was fine-tuned by another recipe than the mapper's shadow runs.",
                path=name,
                expected="the mapper's recipe (`grad-transformer client` uses it)",
                found="; ".join(check.recipe_differences),
                remedy="fine-tune it again by the mapper's recipe, or map it all the same with allow_other_recipe",
            )
    return checks


def _check_shift(shift: ShiftReport, limit: float, name: str) -> None:
    longest = max(MAXIMUM_SIZE, limit / 2)
    if not shift.shift <= limit:
        raise UsageError(
            "A client lies too far from what the mapper has learned.",
            path=name,
            expected=f"a shift of at most {limit:g}",
            found=shift.describe(),
            remedy="leave the client out, train the mapper on shadows like it, or raise max_shift (inf: no limit)",
        )
    if shift.size is not None and not shift.size <= longest:
        raise UsageError(
            "Part of a client's delta is much longer than any that the mapper has learned from.",
            path=name,
            expected=f"a size of at most {longest:g}",
            found=shift.describe(),
            remedy="it diverged or was scaled: leave it out, fine-tune again, or raise max_shift (inf: no limit)",
        )


def duplicates(deltas_NP: torch.Tensor) -> list[int | None]:
    """For each delta the number of the first one that points the same way, `None` where it is the first itself.

    One adapter sent several times, also scaled or rounded to another dtype, counts as one.
    """
    count = len(deltas_NP)
    inner_NN = torch.zeros(count, count, dtype=torch.float64)
    for columns in column_chunks(deltas_NP):
        part_NC = deltas_NP[:, columns].double()
        inner_NN += part_NC @ part_NC.T
    norms_N = inner_NN.diagonal().sqrt()
    same_NN = inner_NN > DUPLICATE_COSINE * norms_N[:, None] * norms_N[None, :]
    firsts: list[int | None] = []
    for number in range(count):
        earlier = [first for first in range(number) if firsts[first] is None and same_NN[number, first]]
        firsts.append(earlier[0] if earlier else None)
    return firsts


def counted_clients(
    checks: Sequence[ClientCheck], names: Sequence[str], *, allow_duplicates: bool, disjoint_clients: bool
) -> list[int]:
    """Numbers of the clients that count: each adapter once, however often it was sent, unless duplicates are allowed.

    Raises:
        [`UsageError`]: one adapter is there twice, and the clients declare that their data are disjoint.
    """
    copies = [number for number, check in enumerate(checks) if check.duplicate_of is not None]
    if copies and disjoint_clients:
        first = checks[copies[0]].duplicate_of
        assert first is not None
        raise UsageError(
            "One adapter was sent twice, so these clients' data are not disjoint.",
            path=names[copies[0]],
            expected="adapters of disjoint data, whose deltas differ",
            found=f"the adapter of {names[first]} again",
            remedy="leave the copy out, or leave disjoint_clients out: epsilons then add up",
        )
    if not copies or allow_duplicates:
        return list(range(len(checks)))
    logger.warning(
        f"{len(copies)} of {len(checks)} clients sent an adapter that another one sent too. It counts once, unless "
        "duplicates are allowed."
    )
    return [number for number, check in enumerate(checks) if check.duplicate_of is None]


def pick_weights(weights: Sequence[float] | None, counted: Sequence[int], num_clients: int) -> Sequence[float] | None:
    """The weights, where there are any, of the clients that count; a copy's weight goes with the copy.

    Raises:
        [`UsageError`]: not one weight for each client.
    """
    if weights is None:
        return None
    if len(weights) != num_clients:
        raise UsageError("Not one weight for each client.", expected=f"{num_clients} weights", found=len(weights))
    return [weights[number] for number in counted]


def public_identity(client: LoraAdapter) -> dict[str, Any]:
    """A client's repository, where everybody may see it; otherwise only what tells one adapter from another."""
    if client.origin is not None and client.origin.private is False:
        return client.origin.to_dict()
    return {"sha256": client.sha256()}

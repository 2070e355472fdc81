"""Six-digit inputs, split by a hash so that no test input is ever seen elsewhere.

`test` (one input in ten) serves the test rows of clients, `private` (three in ten) their training rows, `public` the
shadow subsets. Pretraining draws from all but `test`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..errors import UsageError


NUM_DIGITS = 6

Split = Literal["public", "private", "test"]
_SPLIT_BUCKETS: dict[str, tuple[int, ...]] = {"test": (0,), "private": (1, 2, 3), "public": (4, 5, 6, 7, 8, 9)}


def _split_buckets(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A bucket 0..9 for each six-digit number, by a multiplicative hash (splitmix64)."""
    mixed = (numbers.astype(np.uint64) + np.uint64(seed + 1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(10)).astype(np.int64)


def draw_digits(
    rng: np.random.Generator,
    count: int,
    seed: int,
    splits: Sequence[str],
    digit_weights: np.ndarray | None,
    *,
    distinct: bool = False,
) -> np.ndarray:
    """Inputs of the given splits, integers of shape (count, 6).

    Raises:
        [`UsageError`]: more distinct inputs are asked for than can be found.
    """
    buckets = [bucket for split in splits for bucket in _SPLIT_BUCKETS[split]]
    powers = 10 ** np.arange(NUM_DIGITS - 1, -1, -1)
    found = np.empty(0, dtype=np.int64)
    for _ in range(10):
        if len(found) >= count:
            return found[:count, None] // powers % 10
        size = int((count - len(found)) * 12 / len(buckets)) + 16
        if digit_weights is None:
            numbers = rng.integers(10**NUM_DIGITS, size=size)
        else:
            numbers = rng.choice(10, size=(size, NUM_DIGITS), p=digit_weights) @ powers
        found = np.concatenate([found, numbers[np.isin(_split_buckets(numbers, seed), buckets)]])
        if distinct:
            found = found[np.sort(np.unique(found, return_index=True)[1])]
    raise UsageError(
        "There are not that many distinct inputs.", expected=f"at most about {len(found)} rows", found=count
    )

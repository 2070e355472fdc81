"""The 36 tasks of a world: six permutations of six digits, each followed by one of six maps of a digit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


NUM_PERMUTATIONS = 6
NUM_DIGIT_MAPS = 6
# Compositions that public data does not show: each f and each g is seen, these pairs are not.
HELD_OUT_PAIRS = (*((index, index) for index in range(6)), (0, 3), (3, 0))

# y[i] = x[permutation[i]]
PERMUTATIONS: dict[str, tuple[int, ...]] = {
    "copy": (0, 1, 2, 3, 4, 5),
    "reverse": (5, 4, 3, 2, 1, 0),
    "rotate2": (2, 3, 4, 5, 0, 1),
    "swap": (1, 0, 3, 2, 5, 4),
    "rotate3": (3, 4, 5, 0, 1, 2),
    "interleave": (0, 3, 1, 4, 2, 5),
    "rotate1": (1, 2, 3, 4, 5, 0),
    "rotate4": (4, 5, 0, 1, 2, 3),
    "rotate5": (5, 0, 1, 2, 3, 4),
    "deinterleave": (0, 2, 4, 1, 3, 5),
    "odd_even": (1, 3, 5, 0, 2, 4),
    "reverse_pairs": (4, 5, 2, 3, 0, 1),
    "reverse_halves": (2, 1, 0, 5, 4, 3),
    "rotate_halves": (1, 2, 0, 4, 5, 3),
}
_FIRST_WORLD_PERMUTATIONS = ("copy", "reverse", "rotate2", "swap", "rotate3", "interleave")
_FIRST_WORLD_DIGIT_MAPS = ((1, 0), (1, 3), (3, 0), (9, 9), (7, 2), (1, 6))
_UNITS_MODULO_TEN = (1, 3, 7, 9)


@dataclass(frozen=True)
class LabTask:
    """One composition y = g(f(x)).

    Args:
        name (`str`): permutation and digit map, as in `"reverse|a3b1"` for g(d) = 3 d + 1 modulo 10.
        permutation_index, digit_map_index (`int`): which of the world's six f and six g.
        permutation (`tuple[int, ...]`): y takes digit i from position `permutation[i]`.
        digit_map (`tuple[int, ...]`): what each of the ten digits becomes.
        held_out (`bool`): no shadow shows it.
    """

    name: str
    permutation_index: int
    digit_map_index: int
    permutation: tuple[int, ...]
    digit_map: tuple[int, ...]
    held_out: bool

    def __call__(self, digits: np.ndarray) -> np.ndarray:
        """Answers, integers of shape (..., 6), to inputs of the same shape."""
        return np.asarray(self.digit_map)[digits[..., list(self.permutation)]]


def draw_tasks(seed: int, rng: np.random.Generator) -> tuple[LabTask, ...]:
    """The tasks of one world, all digit maps of the first permutation first.

    Args:
        seed (`int`): 0 gives the maps of the documentation, another seed draws them.
        rng (`np.random.Generator`): the stream to draw from. The first permutation and the first map are always the
            identity.
    """
    if seed == 0:
        names, digit_maps = list(_FIRST_WORLD_PERMUTATIONS), list(_FIRST_WORLD_DIGIT_MAPS)
    else:
        pool = [name for name in PERMUTATIONS if name != "copy"]
        map_pool = [(a, b) for a in _UNITS_MODULO_TEN for b in range(10) if (a, b) != (1, 0)]
        names = ["copy", *(pool[i] for i in rng.choice(len(pool), size=NUM_PERMUTATIONS - 1, replace=False))]
        chosen = rng.choice(len(map_pool), size=NUM_DIGIT_MAPS - 1, replace=False)
        digit_maps = [(1, 0), *(map_pool[i] for i in chosen)]
    return tuple(
        LabTask(
            name=f"{name}|a{factor}b{offset}",
            permutation_index=i,
            digit_map_index=j,
            permutation=PERMUTATIONS[name],
            digit_map=tuple((factor * digit + offset) % 10 for digit in range(10)),
            held_out=(i, j) in HELD_OUT_PAIRS,
        )
        for i, name in enumerate(names)
        for j, (factor, offset) in enumerate(digit_maps)
    )

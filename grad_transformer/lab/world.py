"""A world of 36 tasks on six digits, and the rows that public data, clients and pretraining draw from it.

A sequence is `[i1][i2] x1..x6 > y1..y6` with y = g(f(x)): f permutes the six digits, g maps each digit. Pretraining
names f and g; shadows and clients write `?1 ?2` instead, so a fine-tune has to select a skill that the base model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import torch

from ..errors import UsageError
from .inputs import NUM_DIGITS, Split, draw_digits
from .presets import PRESETS, LabPreset
from .tasks import NUM_DIGIT_MAPS, LabTask, draw_tasks
from .tokenizer import ANSWER_TOKEN, DIGIT_MAP_TOKENS, EOS_TOKEN, PERMUTATION_TOKENS, TOKEN_IDS, UNKNOWN_TOKENS


SEQUENCE_LENGTH = 2 + NUM_DIGITS + 1 + NUM_DIGITS + 1
# How often pretraining hides each of the two instruction tokens.
UNKNOWN_PROBABILITY = 0.15
# Exponent of the power law by which a skewed client prefers some digits.
SKEW_EXPONENT = 1.0

# Streams of random numbers: one per use, so that a change of one leaves the others as they were.
_MAPS, _PUBLIC, _CLIENTS = 1, 2, 3


@dataclass(frozen=True)
class LabClient:
    """One client and its data.

    Args:
        id (`str`): says the sort: `seen-…`, `small-…`, `skewed-…`, `mixture-…`, `unseen-…`, each with a number.
        kind (`"seen"`, `"mixture"` or `"unseen"`): `small` and `skewed` clients have tasks that shadows show: `seen`.
        task (`str`): the task's name; of a mixture, weights and names.
        train_rows, test_rows (`tuple[dict[str, str], ...]`): columns `prompt`, `completion`, `task`. No input of the
            test rows occurs in any training row. The test rows of a skewed client have its own skew.
    """

    id: str
    kind: Literal["seen", "mixture", "unseen"]
    task: str
    train_rows: tuple[dict[str, str], ...]
    test_rows: tuple[dict[str, str], ...]


class LabWorld:
    """The tasks of one seed, and seeded rows of them.

    Args:
        seed (`int`, defaults to 0): 0 is the world of the documentation; another seed draws other permutations and
            digit maps (the first of each is always the identity), and other rows.
        preset (`LabPreset` or `str`, defaults to `"full"`): sizes.

    Raises:
        [`UsageError`]: a negative seed, or a preset that does not exist.
    """

    def __init__(self, seed: int = 0, preset: LabPreset | str = "full"):
        if seed < 0:
            raise UsageError("The seed of a lab must not be negative.", expected="0, 1, 2, …", found=seed)
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise UsageError("There is no such preset.", expected=sorted(PRESETS), found=preset)
            preset = PRESETS[preset]
        self.seed = seed
        self.preset = preset
        self.tasks: tuple[LabTask, ...] = draw_tasks(seed, self._generator(_MAPS))
        self._tasks_by_name = {task.name: task for task in self.tasks}

    @property
    def shadow_tasks(self) -> tuple[LabTask, ...]:
        """The 28 tasks of the public data."""
        return tuple(task for task in self.tasks if not task.held_out)

    @property
    def held_out_tasks(self) -> tuple[LabTask, ...]:
        """The 8 compositions of which there is no public data."""
        return tuple(task for task in self.tasks if task.held_out)

    def task(self, name: str) -> LabTask:
        """The task of that name.

        Raises:
            [`UsageError`]: this world has no such task.
        """
        if name not in self._tasks_by_name:
            raise UsageError("This world has no such task.", expected=sorted(self._tasks_by_name), found=name)
        return self._tasks_by_name[name]

    def to_dict(self) -> dict[str, Any]:
        """What makes this world: seed, permutations by name, digit maps as (factor, offset)."""
        names = [task.name.split("|") for task in self.tasks]
        return {
            "seed": self.seed,
            "permutations": list(dict.fromkeys(permutation for permutation, _ in names)),
            "digit_maps": list(dict.fromkeys(digit_map for _, digit_map in names)),
        }

    def public_rows(self, rows_per_task: int | None = None) -> list[dict[str, str]]:
        """Public rows of the 28 shadow tasks, task after task.

        Args:
            rows_per_task (`int`, defaults to `preset.public_rows_per_task`): rows of each task, with distinct inputs.
        """
        count = self.preset.public_rows_per_task if rows_per_task is None else rows_per_task
        return [
            row
            for index, task in enumerate(self.shadow_tasks)
            for row in self._rows([task], [1.0], count, self._generator(_PUBLIC, index), "public", None)
        ]

    def task_rows(
        self,
        task: LabTask | str,
        num_rows: int,
        *,
        seed: int | Sequence[int] = 0,
        split: Split = "private",
        skew: bool = False,
        skew_seed: int | Sequence[int] = 0,
    ) -> list[dict[str, str]]:
        """Rows of one task, with distinct inputs.

        Args:
            task (`LabTask` or `str`): the task, or its name.
            num_rows (`int`): how many.
            seed (`int` or `Sequence[int]`, defaults to 0): draws the inputs, together with the world's seed.
            split (`"public"`, `"private"` or `"test"`, defaults to `"private"`): which part of the inputs.
            skew (`bool`, defaults to `False`): digits follow a power law instead of being equally likely.
            skew_seed (`int` or `Sequence[int]`, defaults to 0): draws which digits are the frequent ones.

        Raises:
            [`UsageError`]: no such task, or more distinct rows asked for than there are.
        """
        task = self.task(task) if isinstance(task, str) else task
        digit_weights = self._skewed_digit_weights(skew_seed) if skew else None
        return self._rows([task], [1.0], num_rows, self._generator(seed), split, digit_weights)

    def mixture_rows(
        self,
        weights: Mapping[str, float],
        num_rows: int,
        *,
        seed: int | Sequence[int] = 0,
        split: Split = "private",
    ) -> list[dict[str, str]]:
        """Rows of several tasks, with distinct inputs; each row's task is drawn with the given weights.

        Args:
            weights (`Mapping[str, float]`): a weight for each task's name; they need not sum to 1.
            num_rows, seed, split: as in [`~LabWorld.task_rows`].

        Raises:
            [`UsageError`]: no such task, or weights that are negative or all zero.
        """
        values = np.asarray(list(weights.values()), dtype=float)
        if values.size == 0 or (values < 0).any() or not np.isfinite(values).all() or values.sum() == 0:
            raise UsageError(
                "The weights of a mixture must not be negative, nor all zero.", expected="weights > 0", found=weights
            )
        tasks = [self.task(name) for name in weights]
        return self._rows(tasks, values / values.sum(), num_rows, self._generator(seed), split, None)

    def pretraining_batch(self, rng: np.random.Generator, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequences of all 36 tasks with named instructions, each name hidden with probability 0.15.

        Args:
            rng (`np.random.Generator`): the stream to draw from.
            batch_size (`int`): sequences.

        Returns:
            `input_ids` and `labels`, `int64` of shape (batch_size, 16); labels are -100 before the answer.
        """
        digits = draw_digits(rng, batch_size, self.seed, ("public", "private"), None)
        task_indices = rng.integers(len(self.tasks), size=batch_size)
        hidden = rng.random((batch_size, 2)) < UNKNOWN_PROBABILITY
        input_ids = self._token_ids(task_indices, digits, hidden)
        labels = input_ids.copy()
        labels[:, : -(NUM_DIGITS + 1)] = -100
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def skill_batch(self, rows_per_task: int, *, seed: int = 0) -> torch.Tensor:
        """Test sequences with both instructions named, `rows_per_task` of each of the 36 tasks in turn.

        Returns:
            `input_ids`, `int64` of shape (36 * rows_per_task, 16).
        """
        task_indices = np.repeat(np.arange(len(self.tasks)), rows_per_task)
        digits = draw_digits(self._generator(seed), len(task_indices), self.seed, ("test",), None)
        hidden = np.zeros((len(task_indices), 2), dtype=bool)
        return torch.from_numpy(self._token_ids(task_indices, digits, hidden))

    def clients(self) -> list[LabClient]:
        """The clients of the preset: seen, small, skewed, mixture, unseen, in this order."""
        preset = self.preset
        rng = self._generator(_CLIENTS)
        shadow_names = [task.name for task in self.shadow_tasks]
        order = self._spread_over_permutations(rng)
        sorts = [
            *["seen"] * preset.seen_clients,
            *["small"] * preset.small_clients,
            *["skewed"] * preset.skewed_clients,
        ]
        clients = [
            self._single_task_client(sort, sorts[:index].count(sort), order[index % len(order)], index)
            for index, sort in enumerate(sorts)
        ]
        for number in range(preset.mixture_clients):
            names = [str(name) for name in rng.choice(shadow_names, size=3, replace=False)]
            weights = dict(zip(names, rng.dirichlet(np.ones(3)).tolist(), strict=True))
            clients.append(self._mixture_client(number, weights))
        held_out_names = [task.name for task in self.held_out_tasks]
        unseen = [held_out_names[index] for index in rng.permutation(len(held_out_names))]
        for number in range(preset.unseen_clients):
            clients.append(self._single_task_client("unseen", number, unseen[number % len(unseen)], number))
        return clients

    def _spread_over_permutations(self, rng: np.random.Generator) -> list[str]:
        """Names of all shadow tasks in random order, neighbours with different permutations.

        A TinyLM fails at some permutations altogether, so a few clients stand for all only if they differ in them.
        """
        groups: dict[int, list[str]] = {}
        for index in rng.permutation(len(self.shadow_tasks)):
            task = self.shadow_tasks[index]
            groups.setdefault(task.permutation_index, []).append(task.name)
        return [name for turn in zip_longest(*groups.values()) for name in turn if name is not None]

    def _single_task_client(self, sort: str, number: int, task: str, stream: int) -> LabClient:
        count = self.preset.small_rows if sort == "small" else self.preset.rows_per_subset
        kind: Literal["seen", "unseen"] = "unseen" if sort == "unseen" else "seen"
        base = (_CLIENTS, ord(kind[0]), stream)
        skew = sort == "skewed"
        return LabClient(
            id=f"{sort}-{number}",
            kind=kind,
            task=task,
            train_rows=tuple(self.task_rows(task, count, seed=(*base, 0), split="private", skew=skew, skew_seed=base)),
            test_rows=tuple(
                self.task_rows(task, self.preset.test_rows, seed=(*base, 1), split="test", skew=skew, skew_seed=base)
            ),
        )

    def _mixture_client(self, number: int, weights: Mapping[str, float]) -> LabClient:
        base = (_CLIENTS, ord("m"), number)
        return LabClient(
            id=f"mixture-{number}",
            kind="mixture",
            task=" + ".join(f"{weight:.2f} {name}" for name, weight in weights.items()),
            train_rows=tuple(
                self.mixture_rows(weights, self.preset.rows_per_subset, seed=(*base, 0), split="private")
            ),
            test_rows=tuple(self.mixture_rows(weights, self.preset.test_rows, seed=(*base, 1), split="test")),
        )

    def _generator(self, *stream: int | Sequence[int]) -> np.random.Generator:
        parts = [part for item in stream for part in ([item] if isinstance(item, int) else item)]
        return np.random.default_rng([self.seed, *parts])

    def _skewed_digit_weights(self, skew_seed: int | Sequence[int]) -> np.ndarray:
        weights = np.arange(1, 11) ** -SKEW_EXPONENT
        # A stream of its own: training and test rows of a client share the skew, not the inputs.
        return self._generator(skew_seed, 10).permutation(weights / weights.sum())

    def _rows(
        self,
        tasks: Sequence[LabTask],
        weights: Sequence[float] | np.ndarray,
        num_rows: int,
        rng: np.random.Generator,
        split: Split,
        digit_weights: np.ndarray | None,
    ) -> list[dict[str, str]]:
        digits = draw_digits(rng, num_rows, self.seed, (split,), digit_weights, distinct=True)
        choices = rng.choice(len(tasks), size=num_rows, p=weights) if len(tasks) > 1 else np.zeros(num_rows, int)
        answers = np.empty_like(digits)
        for index, task in enumerate(tasks):
            answers[choices == index] = task(digits[choices == index])
        instruction = " ".join(UNKNOWN_TOKENS)
        return [
            {
                "prompt": f"{instruction} {''.join(map(str, question))} {ANSWER_TOKEN}",
                "completion": "".join(map(str, answer)),
                "task": tasks[choice].name,
            }
            for question, answer, choice in zip(digits.tolist(), answers.tolist(), choices.tolist(), strict=True)
        ]

    def _token_ids(self, task_indices: np.ndarray, digits: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Whole sequences, `int64` of shape (B, 16); hidden (B, 2) says which instruction tokens become `?1`, `?2`."""
        permutations = np.asarray([task.permutation for task in self.tasks])[task_indices]
        digit_maps = np.asarray([task.digit_map for task in self.tasks])[task_indices]
        answers = np.take_along_axis(digit_maps, np.take_along_axis(digits, permutations, axis=1), axis=1)
        f_ids = TOKEN_IDS[PERMUTATION_TOKENS[0]] + task_indices // NUM_DIGIT_MAPS
        g_ids = TOKEN_IDS[DIGIT_MAP_TOKENS[0]] + task_indices % NUM_DIGIT_MAPS
        ids = np.empty((len(digits), SEQUENCE_LENGTH), dtype=np.int64)
        ids[:, 0] = np.where(hidden[:, 0], TOKEN_IDS[UNKNOWN_TOKENS[0]], f_ids)
        ids[:, 1] = np.where(hidden[:, 1], TOKEN_IDS[UNKNOWN_TOKENS[1]], g_ids)
        ids[:, 2:8] = TOKEN_IDS["0"] + digits
        ids[:, 8] = TOKEN_IDS[ANSWER_TOKEN]
        ids[:, 9:15] = TOKEN_IDS["0"] + answers
        ids[:, 15] = TOKEN_IDS[EOS_TOKEN]
        return ids

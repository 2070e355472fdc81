"""Rows in groups: what a private fine-tune draws, clips and protects as one."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from ..errors import DataError
from .secure_random import SecureRandom


def rows_by_group(rows: Dataset | Sequence[Mapping[str, Any]], column: str) -> list[list[int]]:
    """Numbers of the rows of each group, groups in the order of their first rows.

    Values that look the same, but for space around them or the way that an accent is encoded, are one group: whoever
    was split in two would be protected half as well.

    Raises:
        [`DataError`]: no such column, or a row without a group.
    """
    columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0]) if len(rows) else []
    if column not in columns:
        raise DataError(
            "The rows have no such column to group them by.",
            expected=f"a column `{column}`",
            found=", ".join(map(str, columns)) or "no columns",
            remedy="name one of these columns with --dp_group_column",
        )
    values = rows[column] if isinstance(rows, Dataset) else [row.get(column) for row in rows]
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        name = unicodedata.normalize("NFC", str(value)).strip()
        if value is None or value != value or not name:
            raise DataError(
                f"Row {index} belongs to no group.",
                expected=f"a value in column `{column}`",
                found=value,
                remedy="give such a row a group of its own",
            )
        groups.setdefault(name, []).append(index)
    return list(groups.values())


class Units(torch.utils.data.Dataset):
    """What is drawn as one: an example, or some rows of a group. `datasets` cannot fetch an empty Poisson batch.

    Args:
        rows (`datasets.Dataset`): tokenised rows.
        groups (`Sequence[Sequence[int]]`, *optional*): numbers of each group's rows; default: each row by itself.
        max_rows (`int`): rows of a group that one fetch returns at most, drawn anew each time.
        random ([`SecureRandom`]): draws them.
    """

    def __init__(self, rows: Dataset, groups: Sequence[Sequence[int]] | None, *, max_rows: int, random: SecureRandom):
        self.rows, self.groups, self.max_rows, self.random = rows, groups, max_rows, random

    def __len__(self) -> int:
        return len(self.rows) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        if self.groups is None:
            return [self.rows[index]]
        group = self.groups[index]
        return [self.rows[group[place]] for place in self.random.sample(len(group), self.max_rows)]


def physical_batches(unit_of_row_B: torch.Tensor, size: int) -> list[tuple[int, int]]:
    """Cut a batch into parts of at most `size` rows, never through a unit: first row and end of each part.

    Args:
        unit_of_row_B (`torch.Tensor`): number of each row's unit, ascending.
        size (`int`): rows of a part; a unit with more is a part by itself.
    """
    counts = torch.bincount(unit_of_row_B).tolist() if len(unit_of_row_B) else []
    parts: list[tuple[int, int]] = []
    start = end = 0
    for count in counts:
        if end > start and end + count - start > size:
            parts.append((start, end))
            start = end
        end += count
    return [*parts, (start, end)] if end > start else parts

"""Deltas that stay on disk: a column of a delta dataset, read by rows from memory-mapped Arrow.

Shape legend: N deltas, P values of a delta.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch


# Values that code which goes through rows in chunks holds at a time (1 MiB in float32), and its least rows.
CHUNK_VALUES = 2**18
_CHUNK_ROWS = 8
# The same of code that computes with all rows at once, in chunks of columns.
_COLUMN_CHUNK_VALUES = 2**23


class DeltaRows:
    """A `(N, P)` matrix of raw deltas, of which only the rows asked for are in memory.

    `rows[7]`, `rows[3:9]` and `rows[[5, 2]]` (a list or an int64 tensor) are float32 tensors of their own, read with
    one copy. What takes a matrix row by row takes either a tensor or this.

    Args:
        split (`datasets.Dataset`): a split as it was loaded. Of one whose rows were selected or shuffled, `datasets`
            holds a copy in memory: call its `flatten_indices()` first.
        column (`str`): `source_blocks` or `target_blocks`.
    """

    ndim = 2
    device = torch.device("cpu")

    def __init__(self, split: datasets.Dataset, column: str):
        self._split = split.with_format("arrow", columns=[column])
        self._column = column
        self.shape = (len(split), int(split.features[column].length))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        if isinstance(rows, slice):
            return self[range(len(self))[rows]]
        if isinstance(rows, int):
            return self[[rows]][0]
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not -len(self) <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"row out of range: {len(self)} rows")
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        chunks, starts = self._chunks
        numbers = np.searchsorted(starts, wanted, side="right") - 1
        values = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        # Plain integers: with narrow rows, indexing by numpy's own costs more than the copy.
        places = zip(numbers.tolist(), (wanted - starts[numbers]).tolist(), strict=True)
        for position, (number, row) in enumerate(places):
            values[position] = chunks[number][row]
        return torch.from_numpy(values)

    @property
    def chunk_rows(self) -> int:
        """Rows to read at a time where all are gone through."""
        return max(_CHUNK_ROWS, CHUNK_VALUES // self.shape[1])

    def to_tensor(self) -> torch.Tensor:
        """All rows as a matrix of its own whose memory is a file: the system takes it back when it needs room.

        The file lies with the caches of `datasets`, has no name, and goes when the tensor goes.
        """
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        if 0 in self.shape:
            return torch.empty(self.shape)
        with tempfile.TemporaryFile(dir=cache) as file:
            values_NP = torch.from_numpy(np.asarray(np.memmap(file, np.float32, "w+", shape=self.shape)))
        for start in range(0, len(self), self.chunk_rows):
            values_NP[start : start + self.chunk_rows] = self[start : start + self.chunk_rows]
        return values_NP

    @cached_property
    def _chunks(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Views of the Arrow buffers, and the row that each begins with."""
        arrays = [chunk for chunk in self._split[:].column(self._column).chunks if len(chunk)]
        views = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in arrays]
        return views, np.cumsum([0, *map(len, views)])[:-1]

    def __getstate__(self) -> dict[str, Any]:
        # Processes that load data open the files themselves.
        return {name: value for name, value in self.__dict__.items() if name != "_chunks"}


Deltas = torch.Tensor | DeltaRows


def text_column(split: datasets.Dataset, name: str) -> list[Any]:
    """A column of short values, read without the deltas beside it and without a Python object for each batch."""
    return split.with_format("arrow", columns=[name])[:].column(name).to_pylist()


def column_chunks(rows_NP: torch.Tensor) -> list[slice]:
    """Slices of columns that hold a few million values of all rows."""
    step = max(1, _COLUMN_CHUNK_VALUES // max(1, rows_NP.shape[0]))
    return [slice(start, start + step) for start in range(0, rows_NP.shape[1], step)]


def column_mean(rows_NP: torch.Tensor) -> torch.Tensor:
    """Mean of the rows in float64, `(P,)`, without a copy of them in float64."""
    return torch.cat([rows_NP[:, columns].to(torch.float64).mean(0) for columns in column_chunks(rows_NP)])


def block_inverse_scale(rows_NP: torch.Tensor, mean_P: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """One over the RMS around the mean of each block of these widths, for each value, `(P,)` in float64.

    A block that never moved says nothing of a delta: its values get 0, and count nowhere.
    """
    squares = []
    for columns in column_chunks(rows_NP):
        squares.append((rows_NP[:, columns].to(torch.float64) - mean_P[columns]).square().mean(0))
    scales = [part_P.mean().sqrt().expand(len(part_P)) for part_P in torch.cat(squares).split(list(widths))]
    return torch.cat([torch.where(scale_P > 0, 1.0 / scale_P, 0.0) for scale_P in scales])


def evenly_spaced(rows_NP: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows at even spacing: a view, not a copy."""
    return rows_NP[:: max(1, -(-len(rows_NP) // most))]

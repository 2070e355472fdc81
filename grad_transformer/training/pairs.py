"""Pairs of deltas as training reads them: batches straight from memory-mapped Arrow, standardised.

Shape legend: B pairs of a batch, P values of a delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch

from ..adapters.rows import DeltaRows, text_column
from ..tokenization_lora_delta import LoraDeltaTokenizer


class DeltaPairRows(torch.utils.data.Dataset):
    """The pairs of a split, read from disk as they are asked for.

    Args:
        split (`datasets.Dataset`): with columns `source_blocks`, `target_blocks`, `shadow_id` and `task`.
    """

    def __init__(self, split: datasets.Dataset):
        self.source = DeltaRows(split, "source_blocks")
        self.target = DeltaRows(split, "target_blocks")
        self.shadow_ids: list[str] = text_column(split, "shadow_id")
        self.tasks: list[str | None] = text_column(split, "task")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.source[row], self.target[row]

    def __getitems__(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch at once: raw deltas `(B, P)` of both sides. This is what a `DataLoader` calls."""
        return self.source[rows], self.target[rows]


@dataclass
class DeltaPairCollator:
    """A batch of [`DeltaPairRows`] to standardised blocks: `source_blocks`, `labels`."""

    source_tokenizer: LoraDeltaTokenizer
    target_tokenizer: LoraDeltaTokenizer

    def __call__(self, pairs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        source_BP, target_BP = pairs
        return {
            "source_blocks": self.source_tokenizer.standardize(source_BP),
            "labels": self.target_tokenizer.standardize(target_BP),
        }

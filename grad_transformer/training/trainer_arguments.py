"""`GradTransformerTrainingArguments`: transformers' `TrainingArguments` with our options before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from .arguments import TrainingOptions


@dataclass
class GradTransformerTrainingArguments(TrainingOptions, TrainingArguments):
    """transformers' `TrainingArguments` with defaults for mappers, and what is particular to pairs of deltas."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # torch warns where there is nothing to pin for.
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False

"""`GradTransformerTrainingArguments`: transformers' `TrainingArguments` with our options before them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from .arguments import TrainingOptions


@dataclass
class GradTransformerTrainingArguments(TrainingOptions, TrainingArguments):
    """transformers' `TrainingArguments` with defaults for mappers, and what is particular to pairs of deltas."""

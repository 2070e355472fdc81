"""Training the mapper on pairs of deltas: transformers' `Trainer`, and held-out figures that expose a mapper that does
not read its input."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .arguments import MapperArguments
    from .heldout import HeldoutMetrics, evaluate_heldout
    from .identity import TrainingIdentity, remove_training
    from .pairs import DeltaPairCollator, DeltaPairRows
    from .trainer import GradTransformerTrainer, build_mapper, train_mapper
    from .trainer_arguments import GradTransformerTrainingArguments

# `grad-transformer train --help` reads the arguments alone.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "arguments": ("MapperArguments",),
        "heldout": ("HeldoutMetrics", "evaluate_heldout"),
        "identity": ("TrainingIdentity", "remove_training"),
        "pairs": ("DeltaPairCollator", "DeltaPairRows"),
        "trainer": ("GradTransformerTrainer", "build_mapper", "train_mapper"),
        "trainer_arguments": ("GradTransformerTrainingArguments",),
    },
)

__all__ = [
    "DeltaPairCollator",
    "DeltaPairRows",
    "GradTransformerTrainer",
    "GradTransformerTrainingArguments",
    "HeldoutMetrics",
    "MapperArguments",
    "TrainingIdentity",
    "build_mapper",
    "evaluate_heldout",
    "remove_training",
    "train_mapper",
]

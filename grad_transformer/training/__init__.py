"""Training the mapper on pairs of deltas: transformers' `Trainer`, and held-out figures that expose a mapper that does
not read its input."""

from .arguments import GradTransformerTrainingArguments, MapperArguments
from .heldout import HeldoutMetrics, evaluate_heldout
from .identity import TrainingIdentity, remove_training
from .pairs import DeltaPairCollator, DeltaPairRows
from .trainer import GradTransformerTrainer, build_mapper, train_mapper


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

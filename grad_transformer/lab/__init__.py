"""A small self-made world of tasks, clients and base models, on which the whole method runs on a laptop."""

from .presets import PRESETS, BaseModelPreset, LabPreset
from .pretrain import make_base_model, pretrain_base_models, skill_accuracy
from .tasks import LabTask
from .tokenizer import make_lab_tokenizer
from .world import LabClient, LabWorld


__all__ = [
    "PRESETS",
    "BaseModelPreset",
    "LabClient",
    "LabPreset",
    "LabTask",
    "LabWorld",
    "make_base_model",
    "make_lab_tokenizer",
    "pretrain_base_models",
    "skill_accuracy",
]

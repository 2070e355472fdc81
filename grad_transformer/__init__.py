"""Fine-tune small, in private; deploy large.

Maps what a small language model learned, as a LoRA delta, to a LoRA adapter of a large one.
"""

import logging as _logging
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .lazy import lazy_names as _lazy_names
from .registration import register_mappers as _register_mappers
from .verbosity import chosen_level as _chosen_level
from .version import __version__


if _TYPE_CHECKING:
    from .adapters import LoraAdapter, LoraLayout, Root, aggregate_deltas, create_root, pull_root
    from .configuration_grad_transformer import GradTransformerConfig
    from .hub import pull_folder, push_delta_dataset, push_folder
    from .modeling_grad_transformer import GradTransformer, GradTransformerOutput
    from .tokenization_lora_delta import LoraDeltaTokenizer

_logging.getLogger(__name__).setLevel(_chosen_level() or _logging.WARNING)

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "adapters": ("LoraAdapter", "LoraLayout", "Root", "aggregate_deltas", "create_root", "pull_root"),
        "configuration_grad_transformer": ("GradTransformerConfig",),
        "hub": ("pull_folder", "push_delta_dataset", "push_folder"),
        "modeling_grad_transformer": ("GradTransformer", "GradTransformerOutput"),
        "tokenization_lora_delta": ("LoraDeltaTokenizer",),
    },
)
_register_mappers()

__all__ = [
    "GradTransformer",
    "GradTransformerConfig",
    "GradTransformerOutput",
    "LoraAdapter",
    "LoraDeltaTokenizer",
    "LoraLayout",
    "Root",
    "__version__",
    "aggregate_deltas",
    "create_root",
    "pull_folder",
    "pull_root",
    "push_delta_dataset",
    "push_folder",
]

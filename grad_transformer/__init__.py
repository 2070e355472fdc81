"""Fine-tune small, in private; deploy large.

Maps what a small language model learned, as a LoRA delta, to a LoRA adapter of a large one.
"""

import logging as _logging

from transformers import AutoConfig, AutoModel
from transformers.utils import logging as _transformers_logging

from .adapters import LoraAdapter, LoraLayout, Root, aggregate_deltas, create_root, pull_root
from .configuration_grad_transformer import GradTransformerConfig
from .hub import pull_folder, push_delta_dataset, push_folder
from .modeling_grad_transformer import GradTransformer, GradTransformerOutput
from .tokenization_lora_delta import LoraDeltaTokenizer
from .version import __version__


# Our loggers lie outside transformers' own tree, which its verbosity (TRANSFORMERS_VERBOSITY) does not reach.
_logging.getLogger(__name__).setLevel(_transformers_logging.get_verbosity())

AutoConfig.register(GradTransformerConfig.model_type, GradTransformerConfig, exist_ok=True)
AutoModel.register(GradTransformerConfig, GradTransformer, exist_ok=True)

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

"""Fine-tune small, in private; deploy large.

Maps what a small language model learned, as a LoRA delta, to a LoRA adapter of a large one.
"""

from transformers import AutoConfig, AutoModel

from .adapters import LoraAdapter, LoraLayout, Root, aggregate_deltas, create_root
from .configuration_grad_transformer import GradTransformerConfig
from .modeling_grad_transformer import GradTransformer, GradTransformerOutput
from .tokenization_lora_delta import LoraDeltaTokenizer
from .version import __version__


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
]

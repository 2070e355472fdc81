"""LoRA adapters as data: layouts, safe reading, roots, sets of deltas."""

from .adapter import LoraAdapter
from .aggregation import aggregate_deltas
from .layout import BlockSpec, LoraLayout, TensorSpec
from .roots import Root, create_root, pull_root


__all__ = [
    "BlockSpec",
    "LoraAdapter",
    "LoraLayout",
    "Root",
    "TensorSpec",
    "aggregate_deltas",
    "create_root",
    "pull_root",
]

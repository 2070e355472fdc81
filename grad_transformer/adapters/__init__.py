"""LoRA adapters as data: layouts, safe reading, roots, sets of deltas."""

from .adapter import LoraAdapter
from .aggregation import AGGREGATIONS, Aggregation, aggregate_deltas
from .exact import ExactMean, aggregate_from_root, exact_mean
from .layout import BlockSpec, LoraLayout, TensorSpec
from .privacy import PrivacyStatement, compose_statements
from .roots import Root, create_root, pull_root


__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "BlockSpec",
    "ExactMean",
    "LoraAdapter",
    "LoraLayout",
    "PrivacyStatement",
    "Root",
    "TensorSpec",
    "aggregate_deltas",
    "aggregate_from_root",
    "compose_statements",
    "create_root",
    "exact_mean",
    "pull_root",
]

"""LoRA adapters as data: layouts, safe reading, roots, sets of deltas."""

from .adapter import LoraAdapter
from .aggregation import AGGREGATIONS, Aggregation, aggregate_deltas
from .checks import ClientCheck, check_clients, counted_clients, pick_weights, public_identity
from .exact import ExactMean, aggregate_from_root, exact_mean
from .layout import BlockSpec, LoraLayout, TensorSpec
from .privacy import PrivacyStatement, compose_statements
from .roots import Root, create_root, pull_root
from .shift import ShiftReference, ShiftReport


__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "ClientCheck",
    "BlockSpec",
    "ExactMean",
    "LoraAdapter",
    "LoraLayout",
    "PrivacyStatement",
    "Root",
    "ShiftReference",
    "ShiftReport",
    "TensorSpec",
    "aggregate_deltas",
    "aggregate_from_root",
    "check_clients",
    "compose_statements",
    "counted_clients",
    "create_root",
    "exact_mean",
    "pick_weights",
    "public_identity",
    "pull_root",
]

"""Manifests as this library writes them, as small as their schemas allow."""

from __future__ import annotations

from typing import Any


ROOT_FACTS = {"fingerprint": "f" * 64, "base_model": "acme/tiny", "base_revision": None, "base_fingerprint": "b" * 64}
_SIDE = {"root": ROOT_FACTS, "recipe": {}, "numel": 8}
_BOTH = ("source", "target")

PLAN: dict[str, Any] = {
    "format_version": 1,
    "source": _SIDE,
    "target": _SIDE,
    "data": {"path": "public.jsonl", "fingerprint": "d" * 64, "num_rows": 4},
    "seed": 3,
    "strategy": "mixed",
    "with_overlap": True,
    "runs": [{"shadow_id": "shadow-00000", "task": None, "split": "train", "seed": 1, "row_indices": [0, 1]}],
}
DELTA_DATASET: dict[str, Any] = {
    "format_version": 1,
    "plan_fingerprint": "p" * 64,
    "roots": dict.fromkeys(_BOTH, ROOT_FACTS),
    "recipes": {role: {} for role in _BOTH},
    "layouts": {role: {} for role in _BOTH},
    "data": PLAN["data"],
    "splits": {"train": {"runs": 1, "pairs": 2}},
    "missing_runs": [],
    "files": {"data/train-00000-of-00001.parquet": "a" * 64},
}
TOKENIZER: dict[str, Any] = {"format_version": 1, "role": "source", "center": False, "scale": "none", "fitted": False}
REPORT: dict[str, Any] = {"format_version": 1, "preset": "quick", "heldout": {"r2": 0.5}, "clients": []}

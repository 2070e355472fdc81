"""Several ways from a TinyLM delta to an LLM delta, of which a client gets the best.

Shape legend: K clients, X values of a TinyLM delta, Y values of an LLM delta.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..evaluation.controls import ShadowPredictor, fit_controls
from ..evaluation.reduced_rank import ReducedRankRegression
from ..modeling_grad_transformer import GradTransformer
from ..shadow import DeltaDataset
from .arguments import CANDIDATES


# Of fewer tasks none can be left out.
MINIMUM_TASKS = 3


def fit_candidates(deltas: DeltaDataset) -> dict[str, ShadowPredictor]:
    """The predictors among `CANDIDATES` that learn from a delta dataset; without tasks, no reduced-rank regression."""
    train = deltas.pairs("train")
    widths = deltas.source_layout.widths
    fitted = fit_controls(train.source, train.target, validation=deltas.tuning_pairs(), source_widths=widths)
    tasks = [task for task in train.tasks if task is not None]
    if len(tasks) == len(train.tasks) and len(set(tasks)) >= MINIMUM_TASKS:
        reduced = ReducedRankRegression(source_widths=widths)
        fitted["reduced_rank"] = reduced.fit_tasks(train.source, train.target, tasks)
    return {name: fitted[name] for name in CANDIDATES if name in fitted}


def candidate_deltas(
    mapper: GradTransformer, predictors: Mapping[str, ShadowPredictor], source_KX: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By name, the LLM deltas `(K, Y)` that each way gives for TinyLM deltas `(K, X)`."""
    mapped = {"mapper": mapper.generate_deltas(source_KX)}
    return mapped | {name: predictor.predict(source_KX) for name, predictor in predictors.items()}

"""The way from TinyLM deltas to LLM deltas that `generate` was asked for."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UsageError
from ..finetuning import load_rows
from ..modeling_grad_transformer import GradTransformer
from ..refinement import fit_candidates, refine_clients, refinement_metadata, shadow_annotators
from ..shadow import check_dataset_of, load_delta_dataset
from ._refinement import RefinementFlags
from ._rows import RowFlags


class Prediction:
    """From TinyLM deltas `(N, P)` to LLM deltas, in the way that was asked for; `facts` says how it went.

    Raises:
        [`UsageError`]: flags that do not go together.
    """

    def __init__(
        self,
        mapper: GradTransformer,
        method: str,
        dataset: str | None,
        refinement: RefinementFlags,
        columns: RowFlags,
        **models: str | None,
    ):
        self._mapper, self._method, self._flags, self._models = mapper, method, refinement, models
        self._columns = columns
        self.facts: list[dict[str, Any]] = []
        if method != "mapper" and dataset is None:
            raise UsageError(
                f"`--method {method}` is fitted on the mapper's training pairs.",
                expected="--dataset",
                found="none",
                remedy="give the delta dataset that the mapper was trained on",
            )
        if method == "best" and refinement.refine_data is None:
            raise UsageError(
                "`--method best` compares candidates on public prompts.",
                expected="--refine_data",
                found="none",
                remedy="give public prompts with --refine_data, or choose another --method",
            )
        self._predictors, self._annotators = {}, {}
        if dataset is not None:
            deltas = load_delta_dataset(dataset)
            check_dataset_of(mapper, deltas)
            self._predictors = fit_candidates(deltas)
            if refinement.refine_data is not None:
                self._annotators = shadow_annotators(deltas, refinement.arguments())
        if method not in ("mapper", "best", *self._predictors):
            raise UsageError(
                f"`{method}` cannot be fitted on this delta dataset.",
                path=dataset,
                expected=sorted(self._predictors),
                found=method,
            )

    def __call__(self, source_NP: torch.Tensor) -> torch.Tensor:
        if self._flags.refine_data is None:
            if self._method == "mapper":
                return self._mapper.generate_deltas(source_NP)
            return self._predictors[self._method].predict(source_NP)
        arguments = self._flags.arguments()
        refined, _ = refine_clients(
            self._mapper,
            self._predictors,
            [self._mapper.tokenizers()[0].decode_delta(delta_P) for delta_P in source_NP],
            load_rows(self._flags.refine_data, **self._columns.arguments()),
            arguments,
            annotators=self._annotators,
            candidates=None if self._method == "best" else [self._method],
            **self._models,  # type: ignore[arg-type]
        )
        self.facts = [refinement_metadata(refinement, arguments) for refinement in refined]
        return torch.stack([refinement.delta_P for refinement in refined])

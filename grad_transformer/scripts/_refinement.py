"""What the commands that refine share: their flags, and the way from TinyLM deltas to LLM deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UsageError
from ..finetuning import load_rows
from ..modeling_grad_transformer import GradTransformer
from ..refinement import RefinementArguments, fit_candidates, refine_clients, refinement_metadata, shadow_annotators
from ..shadow import load_delta_dataset


_DEFAULTS = RefinementArguments()


@dataclass(frozen=True)
class RefinementFlags:
    """Flags of the commands that refine on public prompts."""

    _argument_group_name = "refinement on public prompts"

    refine_data: str | None = field(
        default=None,
        metadata={
            "help": "Public rows: a file, or a dataset on the Hub. The client's TinyLM completes them. The adapter is "
            "refined towards what shadows of `--dataset` say in the client's words, or else towards what both say."
        },
    )
    refine_prompts: int = field(default=_DEFAULTS.num_prompts, metadata={"help": "Public prompts to use."})
    refine_rounds: int = field(
        default=_DEFAULTS.rounds, metadata={"help": "Rounds of refinement; 0 only chooses among candidates."}
    )
    refine_steps: int = field(default=_DEFAULTS.steps, metadata={"help": "Optimizer steps of a round."})
    refine_annotators: int = field(
        default=_DEFAULTS.annotators,
        metadata={"help": "Most shadow tasks of `--dataset` that are asked about the prompts; 0: none."},
    )
    refine_learning_rate: float | None = field(
        default=None, metadata={"help": "Default: a sixth of that of the LLM's shadow runs."}
    )
    refine_max_new_tokens: int = field(
        default=_DEFAULTS.max_new_tokens, metadata={"help": "Most tokens of a TinyLM's completion."}
    )

    def arguments(self, *, seed: int = 0) -> RefinementArguments:
        return RefinementArguments(
            num_prompts=self.refine_prompts,
            rounds=self.refine_rounds,
            steps=self.refine_steps,
            annotators=self.refine_annotators,
            learning_rate=self.refine_learning_rate,
            max_new_tokens=self.refine_max_new_tokens,
            seed=seed,
        )


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
        **models: str | None,
    ):
        self._mapper, self._method, self._flags, self._models = mapper, method, refinement, models
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
                "`--method best` compares candidates on public prompts.", expected="--refine_data", found="none"
            )
        self._predictors, self._annotators = {}, {}
        if dataset is not None:
            deltas = load_delta_dataset(dataset)
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
            load_rows(self._flags.refine_data),
            arguments,
            annotators=self._annotators,
            candidates=None if self._method == "best" else [self._method],
            **self._models,  # type: ignore[arg-type]
        )
        self.facts = [refinement_metadata(refinement, arguments) for refinement in refined]
        return torch.stack([refinement.delta_P for refinement in refined])


def describe_refinement(facts: Mapping[str, Any]) -> str:
    """One sentence on what became of a client."""
    first, *later = facts["agreement_by_round"]
    way = facts["candidate"].replace("_", " ")
    refined = f", {later[-1]:.0%} after refinement" if later else ", kept as it is"
    shadows = ", ".join(facts["annotators"])
    return (
        f"Agreement with the TinyLM on public prompts: {first:.0%} as generated ({way}){refined}; an LLM "
        f"without errors {facts['expected_agreement']:.0%}, the LLM without an adapter {facts['root_agreement']:.0%}."
        + (f" Refined towards what these shadows say in the client's words: {shadows}." if shadows else "")
    )

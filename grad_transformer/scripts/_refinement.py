"""What the commands that refine share: their flags, and what they say of the outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..refinement.arguments import RefinementArguments


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


def describe_refinement(facts: Mapping[str, Any]) -> str:
    """One sentence on what became of a client."""
    history = " -> ".join(f"{agreement:.3f}" for agreement in facts["agreement_by_round"])
    shadows = ", ".join(facts["annotators"])
    return (
        f"Agreement with the TinyLM on public prompts: {facts['candidate']} {history}, "
        f"an LLM without errors {facts['expected_agreement']:.3f}."
        + (f" Towards what these shadows say in the client's words: {shadows}." if shadows else "")
    )

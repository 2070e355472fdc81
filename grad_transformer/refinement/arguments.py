"""What refinement on public prompts can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UsageError


# What refinement can start from; ties go to the first.
CANDIDATES = ("mapper", "nearest_shadow", "ridge", "reduced_rank")


@dataclass(frozen=True)
class RefinementArguments:
    """How a generated adapter is refined on public prompts. Defaults were measured on tasks left out of the shadows.

    Raises:
        [`UsageError`]: a value out of its range.
    """

    num_prompts: int = field(default=1024, metadata={"help": "Public prompts, drawn by `seed` where there are more."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a TinyLM's completion."})
    rounds: int = field(
        default=2, metadata={"help": "How often the LLM is asked again for what it would say itself; 0: never."}
    )
    steps: int = field(default=80, metadata={"help": "Optimizer steps of a round."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; default: a sixth of that of the LLM's shadow runs."}
    )
    certainty_power: float = field(
        default=4.0,
        metadata={"help": "A token counts by the highest probability of its target to this power; 0: all alike."},
    )
    second_witness: bool = field(
        default=True,
        metadata={"help": "Let what the LLM says itself count as evidence beside what the TinyLM says."},
    )
    annotators: int = field(
        default=64,
        metadata={"help": "Shadow tasks (pairs, where tasks are unknown) that are asked about prompts; 0: none."},
    )
    screening_prompts: int = field(
        default=128, metadata={"help": "Prompts on which every one of them is asked; the best are asked on all."}
    )
    covered_agreement: float = field(
        default=0.85,
        metadata={
            "help": "A client keeps its best candidate as it is where the nearest shadow's agreement is this share of "
            "what an LLM without errors would reach: its task is one that shadows showed. 99: never."
        },
    )
    top_tokens: int = field(default=16, metadata={"help": "Tokens of each predicted distribution that are kept."})
    batch_size: int = field(default=256, metadata={"help": "Prompts that the TinyLM completes at once."})
    seed: int = field(default=0, metadata={"help": "Of the prompts and their order."})

    def __post_init__(self) -> None:
        least = {"num_prompts": 1, "max_new_tokens": 1, "rounds": 0, "steps": 1, "top_tokens": 1, "annotators": 0}
        for name, low in (least | {"screening_prompts": 1, "batch_size": 1}).items():
            self._check(name, getattr(self, name) >= low, f"at least {low}")
        self._check("learning_rate", self.learning_rate is None or self.learning_rate > 0, "more than 0")
        self._check("certainty_power", self.certainty_power >= 0, "0 or more")
        self._check("covered_agreement", self.covered_agreement > 0, "more than 0")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UsageError(
                f"`{name}` of the refinement is out of range.", expected=expected, found=getattr(self, name)
            )

"""From a generated adapter to a better one, on public prompts alone: choice among candidates, then refinement."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .annotators import annotator_deltas, shadow_annotators
    from .arguments import RefinementArguments
    from .candidates import candidate_deltas, fit_candidates
    from .clients import refine_clients, refinement_metadata
    from .completions import Completions, TopTokens, complete_prompts
    from .refinement import Refinement, check_same_tokens, complete_clients, public_weak_to_strong, refine
    from .student import SoftTarget, Student

# `grad-transformer generate --help` reads the arguments alone.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "annotators": ("annotator_deltas", "shadow_annotators"),
        "arguments": ("RefinementArguments",),
        "candidates": ("candidate_deltas", "fit_candidates"),
        "clients": ("refine_clients", "refinement_metadata"),
        "completions": ("Completions", "TopTokens", "complete_prompts"),
        "refinement": ("Refinement", "check_same_tokens", "complete_clients", "public_weak_to_strong", "refine"),
        "student": ("SoftTarget", "Student"),
    },
)

__all__ = [
    "Completions",
    "Refinement",
    "RefinementArguments",
    "SoftTarget",
    "Student",
    "TopTokens",
    "annotator_deltas",
    "candidate_deltas",
    "check_same_tokens",
    "complete_clients",
    "complete_prompts",
    "fit_candidates",
    "public_weak_to_strong",
    "refine",
    "refine_clients",
    "refinement_metadata",
    "shadow_annotators",
]

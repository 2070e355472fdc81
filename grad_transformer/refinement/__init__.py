"""From a generated adapter to a better one, on public prompts alone: choice among candidates, then refinement."""

from .annotators import annotator_deltas, shadow_annotators
from .arguments import RefinementArguments
from .candidates import CANDIDATES, candidate_deltas, fit_candidates
from .clients import refine_clients, refinement_metadata
from .completions import Completions, TopTokens, complete_prompts
from .refinement import Refinement, check_same_tokens, complete_clients, public_weak_to_strong, refine
from .student import SoftTarget, Student


__all__ = [
    "CANDIDATES",
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
